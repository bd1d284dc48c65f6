"""How long a step would take: each kernel by what bounds it, each collective by the links it goes over.

A kernel takes the longer of two times: its FLOPs at the peak of its dtype times an efficiency, its bytes at the
memory's bandwidth times another. A collective takes its latency and its bytes at the bandwidth of its slowest link.
Kernels run one after another, and beside them so do collectives and, by themselves, copies to and from the host: what
waits for one that is still on its way stands still.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, fx

from .flops import node_flops
from .forecast import Span, Traced
from .kernels import Kernel, Kernels, storages
from .nodes import begins, is_start, is_wait

HOST = "host"  # beside the axes of collectives, what copies to and from it go over
KNOWN = Path(__file__).with_name("hardware.json")


@dataclass(frozen=True)
class Hardware:
    """A machine. memory: bytes that a rank can use. flops: FLOP/s by dtype (bf16, fp8, fp32), dense. bandwidth, link,
    network, host: bytes/s of a device's memory, between devices of a node in one direction, of a device's share of the
    network, and to the host's memory or back. latency: seconds of a collective, within a node and beyond. launch:
    seconds a kernel takes at least. matmul, attention, moves: which part of the peak products and attention reach, and
    of the bandwidth all else. links: which part of a link's bandwidth collectives reach. sources: where the figures are
    from.
    """

    name: str
    memory: float
    node: int
    flops: Mapping[str, float]
    bandwidth: float
    link: float
    network: float
    host: float
    latency: tuple[float, float]
    launch: float
    matmul: float
    attention: float
    moves: float
    links: float
    sources: str


def find_hardware(which: str) -> Hardware:
    """A name of `hardware.json`, or a JSON file with the fields of one. Raises ValueError, which lists them."""
    known = json.loads(KNOWN.read_text())
    if which in known:
        return Hardware(name=which, **known[which])
    if not which.endswith(".json"):
        raise ValueError(f"--hardware {which}: known are {', '.join(known)}; or a JSON file with one's fields")
    try:
        given = json.loads(Path(which).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--hardware {which}: {error}") from None
    wanted = {field.name for field in fields(Hardware)} - {"name"}
    if not isinstance(given, dict) or given.keys() != wanted:
        raise ValueError(f"--hardware {which}: must have the fields {', '.join(sorted(wanted))}")
    return Hardware(name=Path(which).stem, **given)


class Times(NamedTuple):
    """Seconds of a step, and what they are made of. exposed: of the step, waiting for collectives, by axes, and for
    copies from the host. busy: of kernels, by what bounds them. sent: seconds that collectives of each axes take, and
    copies."""

    step: float
    exposed: dict[str, float]
    busy: dict[str, float]
    sent: dict[str, float]


def predict(traced: Traced, pieces: Mapping[tuple, Kernels], hardware: Hardware) -> Times:
    known: dict[tuple, list[tuple]] = {}
    exposed, busy, sent = Counter(), Counter(), Counter()
    now, free = 0.0, Counter()  # when the device is done with what it was given, and the network, and the host's link
    done: dict[object, tuple[float, str]] = {}
    for number, instruction in enumerate(traced.program.instructions):
        if instruction.key not in known:
            known[instruction.key] = list(_events(traced, pieces[instruction.key], instruction.key, hardware))
        for kind, what, seconds, label in known[instruction.key]:
            if kind == "kernel":
                now += seconds
                busy[label] += seconds
            elif kind == "start":
                link = label == HOST
                free[link] = max(free[link], now) + seconds
                sent[label] += seconds
                where = instruction.gives[0] if what is None else (number, what)
                done[where] = free[link], label
            else:  # what was kept from the forward may be waited for again, and is there
                at, label = done.pop(instruction.takes[0] if what is None else (number, what), (now, ""))
                exposed[label] += max(0.0, at - now)
                now = max(now, at)
    waited = {axes: seconds for axes, seconds in exposed.items() if seconds}
    return Times(now, waited, dict(busy), dict(sent))


def _events(traced: Traced, piece: Kernels, key: tuple, hardware: Hardware):
    """(kind, which collective, or None of one that is a piece of its own, seconds, label) of a piece, in its order."""
    module = traced.program.pieces[key]
    nodes = [n for n in module.graph.nodes if n.op == "call_function"]
    of_node = {kernel.node: kernel for kernel in piece.run}
    alone = len(nodes) == 1
    for node in nodes:
        if is_wait(node):
            yield "wait", None if alone else node.args[0].name, 0.0, ""
        elif is_start(node):
            span = traced.groups[node.args[-1]]
            yield "start", None if alone else node.name, seconds_of(node, span, hardware), "+".join(span.axes)
        elif begins(node):
            seconds = sum(storages(node).values()) / (hardware.host * hardware.links)
            yield "start", None if alone else node.name, seconds, HOST
        elif node in of_node:
            label, seconds = kernel_seconds(of_node[node], piece, hardware, traced.within)
            yield "kernel", None, seconds, label


def kernel_seconds(
    kernel: Kernel, piece: Kernels, hardware: Hardware, within: Mapping[int, float]
) -> tuple[str, float]:  # fmt: skip
    """-> what bounds it, and how long it takes. within: as in `Traced`."""
    moved = sum(piece.bytes[s] for s in {*kernel.reads, *kernel.makes}) / (hardware.bandwidth * hardware.moves)
    flops = node_flops(kernel.node)
    if not flops:
        return "memory", max(hardware.launch, moved)
    attention = "by_document" in str(kernel.node.target)
    if attention and not kernel.node.args[-1]:  # what is not causal looks at all of its own item
        flops *= 2 * within.get(kernel.node.args[-3].meta["val"].shape[1], 1.0)
    kind, part = ("attention", hardware.attention) if attention else ("products", hardware.matmul)
    computed = flops / (hardware.flops[_dtype(kernel.node)] * part)
    return (kind, max(hardware.launch, computed)) if computed >= moved else ("memory", max(hardware.launch, moved))


def _dtype(node: fx.Node) -> str:
    of = [n.meta["val"].dtype for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    of = [dtype for dtype in of if dtype.is_floating_point]
    size = min(dtype.itemsize for dtype in of)
    return {1: "fp8", 2: "bf16"}.get(size, "fp32")


def seconds_of(start: fx.Node, span: Span, hardware: Hardware) -> float:
    """A ring's, or of an all-to-all that of the messages that leave the node."""
    n, kind = len(span.ranks), start.target.__name__.split(".")[0]
    nodes = Counter(rank // hardware.node for rank in span.ranks)
    local, within = max(nodes.values()), len(nodes) == 1
    latency = hardware.latency[0 if within else 1]
    size = max(sum(storages(start).values()), sum(storages(start.args[0]).values()))
    link, network = hardware.link * hardware.links, hardware.network * hardware.links
    if "all_to_all" in kind:
        inside, outside = size * (local - 1) / n, size * (n - local) / n
        return latency + max(inside / link, outside / network)
    bandwidth = link if within else min(link, network * local)
    rounds = 2 if "all_reduce" in kind else 1
    return rounds * (latency + size * (n - 1) / n / bandwidth)

"""What the machine can do at ftrain's own shapes, all ranks busy at once, and how much of it ftrain's step asks for.

Matrix products of the model's own shapes, in its dtype; memory; the collectives of ftrain's step as it is compiled, at
the mean size that it has of each kind.
"""

import re
import statistics
import time
from collections.abc import Callable

import ftrain_run
import shared
import torch
import torch.distributed as dist

from ftrain.equivalence import Traffic
from ftrain.flops import flops_per_token
from ftrain.launch import finish, init

LONG_ENOUGH = 0.15  # seconds
KIND = re.compile("all_gather|reduce_scatter|all_reduce|all_to_all")
TRIAD = 1 << 24  # elements of each of three fp32 tensors: more than caches hold


def seconds(fn: Callable[[], object]) -> float:
    """The median time of a call, begun on all ranks together."""
    fn()
    dist.barrier()
    times, end = [], time.perf_counter() + LONG_ENOUGH
    while time.perf_counter() < end or len(times) < 3:
        began = time.perf_counter()
        fn()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def products(specs, tokens: int, ep: int) -> dict[tuple[int, int, int], int]:
    """The forward products of this rank, (rows, out, in) -> how many. tokens: of this rank.

    Experts are taken to be chosen equally often.
    """
    found: dict[tuple[int, int, int], int] = {}
    for spec in specs.values():
        if len(spec.shape) < 2 or not spec.active:
            continue
        *stacked, out, into = spec.shape
        rows, many = tokens, 1
        if stacked:  # experts: those of this rank see the tokens of all ep ranks
            many = stacked[0] // ep
            rows = round(tokens * spec.active * ep)
        found[rows, out, into] = found.get((rows, out, into), 0) + many
    return found


def matmuls(specs, tokens: int, ep: int, dtype: torch.dtype) -> list[dict]:
    """Forward, and backward to the input (dgrad) and to the weight (wgrad): how fast each of them is."""
    found = []
    for (rows, out, into), many in products(specs, tokens, ep).items():
        x, w, dy = (torch.randn(shape, dtype=dtype) for shape in ((rows, into), (out, into), (rows, out)))
        for kind, a, b in (("fwd", x, w.t()), ("dgrad", dy, w), ("wgrad", dy.t(), x)):
            result = torch.empty(a.shape[0], b.shape[1], dtype=dtype)
            took = seconds(lambda: torch.mm(a, b, out=result))
            flops = 2 * rows * out * into
            found.append({"kind": kind, "shape": [rows, out, into], "count": many, "flops": flops, "seconds": took})
    return found


def memory() -> float:
    """Bytes a second of a = b + 2 c, of what is read and written."""
    a, b, c = (torch.ones(TRIAD) for _ in range(3))
    return 3 * 4 * TRIAD / seconds(lambda: torch.add(b, c, alpha=2, out=a))


def collective(kind: str, size: int) -> float:
    """Seconds of one over all ranks; size: bytes of the larger of what goes in and what comes out."""
    ranks = dist.get_world_size()
    n = max(1, size // 4 // ranks)
    whole, other, part = torch.ones(n * ranks), torch.ones(n * ranks), torch.ones(n)
    calls = {
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_to_all": lambda: dist.all_to_all_single(whole, other),
    }
    times = []
    for _ in range(12):  # a number that all ranks know
        dist.barrier()
        began = time.perf_counter()
        calls[kind]()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def asked_for(step: Callable, ids) -> dict[str, tuple[int, int]]:
    """The collectives of a captured step, kind -> (how many, bytes).

    Of a kind with sizes that depend on the data (expert dispatch), the bytes are those of this step, the mean of the
    ranks.
    """
    found: dict[str, tuple[int, int]] = {}
    unknown = set()
    for of in step.program(ids).collectives():
        kind = KIND.match(of.kind).group()
        count, size = found.get(kind, (0, 0))
        found[kind] = count + 1, size + (of.bytes or 0)
        unknown |= {kind} if of.bytes is None else set()
    traffic = Traffic()
    with traffic:
        step(ids)
    for kind in sorted(unknown):
        mean = torch.tensor(traffic.seen[kind][1], dtype=torch.float64)
        dist.all_reduce(mean)
        found[kind] = found[kind][0], int(mean / dist.get_world_size())
    return found


def main() -> None:
    work = shared.read()
    init()
    job, step = ftrain_run.make_step(work, "aot_eager")  # inductor's graph, which is not compiled only to be counted
    ids = work.ids()[0]
    asked = asked_for(step, ids)
    specs, dtype = job.model.specs, torch.bfloat16 if work.dtype == "bf16" else torch.float32
    limits = {
        "flops": ids.size * flops_per_token(specs, job.model.cfg, ids.shape[1]),
        "parameters": sum(spec.numel for spec in specs.values()),
        "read": sum(spec.numel // (work.ep if spec.experts else 1) for spec in specs.values()),
        "itemsize": dtype.itemsize,
        "ranks": work.ranks,
        "matmuls": matmuls(specs, ids.size // work.ranks, work.ep, dtype),
        "memory": memory(),
        "collectives": {
            kind: {"count": count, "bytes": size, "seconds": collective(kind, size // count)}
            for kind, (count, size) in asked.items()
        },
    }
    shared.write(work, shared.Seen(), limits=limits)
    finish()


if __name__ == "__main__":
    main()

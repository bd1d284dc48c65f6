"""The peak memory of a train step: measured, when it is reached, and by what is then held.

A step's program (program.py) is run once for real, and the allocator asked, instruction by instruction, how much it
had given out at most. What lies in the program's slots is sorted by what made it; the rest is the piece's that runs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.profiler import ProfilerActivity, profile, record_function

from .nodes import begins, is_light, is_wait, mutates
from .program import Program
from .schedule import base, is_region
from .state import State

# Of the step's arguments (step.py); all others are the batch and numbers.
ROLES = {"params": "parameters", "mu": "optimizer", "nu": "optimizer", "extra": "optimizer", "total": "gradients"}
CATEGORIES = (
    "parameters", "optimizer", "gradients", "batch", "gathered weights", "activations", "logits and loss", "temporary",
)  # fmt: skip


@dataclass(frozen=True)
class Peak:
    """bytes: the most that was held at once, inputs included. at: the instruction that ran then, and its number.

    by: bytes of each of CATEGORIES. activations: made by the forward, to be used later. logits and loss: made between
    forward and backward, the unembedding's gradient aside. gathered weights: whole ones, and casts of own ones.
    temporary: all beside what was held when the instruction began: what is made within a piece, its results, and what
    collectives on their way hold. Only what torch's allocator gives out is counted.
    most: of each category but the last, the most that was held between two instructions, whenever that was.
    """

    bytes: int
    at: str
    by: dict[str, int]
    most: dict[str, int]


def measure(train_step: Callable, state: State, microbatches: Sequence[Mapping[str, Tensor]]) -> Peak:
    """The peak of the second of two steps, which are taken: the first one captures and compiles.

    Of several microbatches, that of the highest. Raises ValueError where the step is not a captured one (mode "off"),
    and where one of ROLES is no argument of it.
    """
    graph = train_step.graph
    if graph.mode == "off":
        raise ValueError("the memory of an uncompiled step is not measured: compile it, by inductor or aot_eager")
    if missing := ROLES.keys() - set(graph.names):
        raise ValueError(f"the step has no argument {', '.join(sorted(missing))}, whose memory would be the batch's")
    train_step(state, microbatches)
    peaks: list[Peak] = []

    def measuring(program: Program, names: list[str], inputs: list) -> list:
        outputs, peak = run(program, inputs, [ROLES.get(name, "batch") for name in names])
        peaks.append(peak)
        return outputs

    with graph.run_by(measuring):
        train_step(state, microbatches)
    return max(peaks, key=lambda peak: peak.bytes)


def run(program: Program, inputs: list, roles: Sequence[str]) -> tuple[list, Peak]:
    """`program(inputs)`, and its peak. roles: of each input, its category."""
    device = next(t.device.type for t in inputs if isinstance(t, Tensor))
    kinds = categories(program, roles)
    slots = program.filled(inputs)
    held = [_held(slots, kinds, device)]  # before each instruction
    with (of_profiler if device == "cpu" else of_allocator)() as (mark, above):
        for _ in program.run(slots):
            mark()
            held.append(_held(slots, kinds, device))
    start = sum(held[0].values())
    at, most = max(enumerate(above()), key=lambda found: found[1])
    by = dict.fromkeys(CATEGORIES, 0) | held[at]
    by["temporary"] = start + most - sum(held[at].values())
    name = f"{program.instructions[at].name}, {at + 1} of {len(program.instructions)}"
    ever = {kind: max(of.get(kind, 0) for of in held) for kind in CATEGORIES[:-1]}
    return program.results(slots), Peak(start + most, name, by, ever)


Meter = Iterator[tuple[Callable[[], None], Callable[[], list[int]]]]


@contextmanager
def of_profiler() -> Meter:
    """-> (mark, above): to be called after each instruction; and after all, the most bytes in each, above the start."""

    def mark() -> None:
        with record_function("ftrain: an instruction's end"):
            pass

    def above() -> list[int]:
        events = prof.profiler.kineto_results.events()
        peaks, now, most = [], 0, 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
            elif event.name() == "ftrain: an instruction's end":
                peaks.append(most)
                most = now
        return peaks

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        yield mark, above


@contextmanager
def of_allocator() -> Meter:
    """As `of_profiler`, by the accelerator's allocator, which counts as the host issues."""
    peaks: list[int] = []
    start = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()

    def mark() -> None:
        peaks.append(torch.accelerator.max_memory_allocated() - start)
        torch.accelerator.reset_peak_memory_stats()

    yield mark, lambda: peaks


def categories(program: Program, roles: Sequence[str]) -> list[str]:
    """What each slot of a program holds. roles: of each input."""
    nodes = program.nodes
    found: dict[fx.Node, str] = dict(zip((n for n in nodes if n.op == "placeholder"), roles, strict=True))
    forward = max((i for i, n in enumerate(nodes) if _is_region(n, "forward")), default=-1)
    # Gradients that are added up where they lie.
    summed = {base(n.args[0]) for n in nodes if mutates(n) and isinstance(n.args[0], fx.Node)}
    for i, node in enumerate(nodes):
        if node in found:
            continue
        of = {found[n] for n in node.all_input_nodes}
        moves = is_light(node) or begins(node) or is_wait(node)
        if moves and of and of <= {"parameters", "gathered weights"}:
            found[node] = "gathered weights"
        elif _is_region(node, "backward") or "gradients" in of or node in summed:
            found[node] = "gradients"
        elif moves and len(of) == 1:
            [found[node]] = of
        else:
            found[node] = "activations" if i <= forward else "logits and loss"
    return [found[n] for n in nodes]


def _is_region(node: fx.Node, which: str) -> bool:
    return is_region(node) and node.target.__name__.endswith(f"_{which}")


def _held(slots: Sequence, kinds: Sequence[str], device: str) -> dict[str, int]:
    """Bytes on the device by category; of several that share a storage, the first one's."""
    seen: set[int] = set()
    held: dict[str, int] = {}
    for value, kind in zip(slots, kinds, strict=True):
        if isinstance(value, Tensor) and value.device.type == device:
            storage = value.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                held[kind] = held.get(kind, 0) + storage.nbytes()
    return held

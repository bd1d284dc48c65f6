"""A step's memory, instruction by instruction, from its program alone.

As it is measured (memory.py): what the program's slots hold between instructions, and what a piece makes meanwhile.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from torch import fx

from .kernels import Kernel, Kernels, kernels
from .memory import CATEGORIES, Peak, categories
from .nodes import begins, is_start, is_wait
from .offload import to_host
from .program import Instruction, Program

Workspace = Callable[[fx.Node], int]  # bytes that an operator takes for itself while it runs


class Moment(NamedTuple):
    """An instruction: its name, what was held when it began, by category, and the most while it ran, in bytes."""

    name: str
    held: dict[str, int]
    most: int


class Timeline:
    """moments: one for each instruction of a program. pieces: what runs in each distinct one.

    fuse, dear: as `kernels` takes them. workspace: what an operator takes for itself. host: whether what waits on the
    host counts, as on a CPU.
    """

    def __init__(
        self, program: Program, roles: Sequence[str], fuse: bool, workspace: Workspace = lambda node: 0,
        dear: Collection = (), host: bool = False,
    ):  # fmt: skip
        self.program, self.fuse, self.workspace = program, fuse, workspace
        self.pieces: dict[tuple, Kernels] = {
            key: kernels(module, fuse and not _alone(module), dear) for key, module in program.pieces.items()
        }
        if not host:
            self.pieces |= {key: _elsewhere(piece) for key, piece in self.pieces.items() if _sends_away(piece)}
        self._above: dict[tuple, int] = {}
        self.moments: list[Moment] = []
        self._walk(roles)

    def _walk(self, roles: Sequence[str]) -> None:
        program, kinds = self.program, categories(self.program, roles)
        slots: dict[int, tuple] = {}  # the storage in each
        holders: Counter = Counter()
        size: dict[tuple, int] = {}
        kind: dict[tuple, str] = {}
        by: Counter = Counter()
        on_the_way: dict[tuple, tuple] = {}  # what a collective gives -> what it reads until it is waited for

        def hold(storage: tuple, of: str) -> None:
            if not holders[storage]:
                kind[storage] = of
                by[of] += size[storage]
            holders[storage] += 1

        def release(storage: tuple) -> bool:
            holders[storage] -= 1
            if not holders[storage]:
                by[kind[storage]] -= size[storage]
            return not holders[storage]

        nodes = program.nodes
        for i in program.inputs:
            value = nodes[i].meta.get("val")
            storage = ("input", value.untyped_storage()._cdata)
            size[storage] = int(value.untyped_storage().nbytes())
            slots[i] = storage
            hold(storage, kinds[i])
            holders[storage] += 1  # the caller's
        for number, instruction in enumerate(program.instructions):
            piece = self.pieces[instruction.key]
            held = {name: by[name] for name in CATEGORIES if by[name]}
            given = [slots.get(i) for i in instruction.takes]
            dying = []
            for i in instruction.drops:
                storage = slots.pop(i, None)
                if storage is not None:
                    holders[storage] -= 1
                    if not holders[storage]:
                        dying.append(storage)
            above = self._most_above(instruction, piece, [storage in dying for storage in given])
            self.moments.append(Moment(instruction.name, held, sum(held.values()) + above))
            outer = dict(zip(piece.inputs, given))
            for at, i in enumerate(instruction.gives):
                inner = piece.outputs[at]
                if i is None or inner is None:
                    continue
                storage = outer.get(inner) or (number, inner)
                size.setdefault(storage, piece.bytes[inner])
                slots[i] = storage
                if storage in dying:
                    dying.remove(storage)
                    holders[storage] += 1
                else:
                    hold(storage, kinds[i])
            head = piece.run[0].node if len(piece.run) == 1 else None
            if head is not None and is_start(head) and instruction.gives[0] is not None:
                on_the_way[slots[instruction.gives[0]]] = given[0]
                if given[0] in dying:
                    dying.remove(given[0])
                holders[given[0]] += 1
            if head is None and len(instruction.takes) == 1 and given[0] in on_the_way and not piece.run:
                kept = on_the_way.pop(given[0])
                release(kept)
            for storage in dying:
                by[kind[storage]] -= size[storage]
        self.end = dict(by)

    def _most_above(self, instruction: Instruction, piece: Kernels, dying: Sequence[bool]) -> int:
        known = (instruction.key, tuple(dying))
        if known not in self._above:
            gone = {storage for storage, dies in zip(piece.inputs, dying) if dies and storage is not None}
            self._above[known] = most_above(piece, gone if self.fuse else set(), self.workspace)
        return self._above[known]

    def peak(self) -> Peak:
        at, moment = max(enumerate(self.moments), key=lambda found: found[1].most)
        by = dict.fromkeys(CATEGORIES, 0) | moment.held
        by["temporary"] = moment.most - sum(moment.held.values())
        ever = {name: max(m.held.get(name, 0) for m in self.moments) for name in CATEGORIES[:-1]}
        return Peak(moment.most, f"{moment.name}, {at + 1} of {len(self.moments)}", by, ever)


def most_above(piece: Kernels, dying: set[int], workspace: Workspace) -> int:
    """The most bytes beside what was there when the piece began; `dying` inputs go after their last use."""
    last: dict[int, int] = {}
    for i, kernel in enumerate(piece.run):
        last |= dict.fromkeys([*kernel.reads, *kernel.makes], i)
        if is_start(kernel.node):  # read until it is waited for, which is when its result is first read
            result = kernel.makes[0]
            until = next((j for j in range(i + 1, len(piece.run)) if result in piece.run[j].reads), i)
            last |= {s: max(last[s], until) for s in kernel.reads}
    stays = set(piece.outputs) | (set(piece.inputs) - dying)
    now = most = 0
    for i, kernel in enumerate(piece.run):
        ends = [s for s in {*kernel.reads, *kernel.makes} if last[s] == i and s not in stays]
        new = sum(piece.bytes[s] for s in kernel.makes)
        over = _written_over(kernel, ends, piece)
        most = max(most, now + new - over + workspace(kernel.node))
        now += new - sum(piece.bytes[s] for s in ends)
    return most


def _written_over(kernel: Kernel, ends: Sequence[int], piece: Kernels) -> int:
    """Bytes that need no memory of their own: an element-wise kernel writes over what it is the last to read, unless it
    has several results, for which it reads that."""
    if not kernel.fused or len(kernel.makes) > 1:
        return 0
    free = [piece.bytes[s] for s in ends if s in kernel.reads]
    over = 0
    for size in (piece.bytes[s] for s in kernel.makes):
        if size in free:
            free.remove(size)
            over += size
    return over


def _alone(module: fx.GraphModule) -> bool:
    nodes = [n for n in module.graph.nodes if n.op == "call_function"]
    return len(nodes) == 1 and (begins(nodes[0]) or is_wait(nodes[0]))


def _sends_away(piece: Kernels) -> bool:
    return any(kernel.node.target is to_host for kernel in piece.run)


def _elsewhere(piece: Kernels) -> Kernels:
    """A piece whose results are in the memory of another device."""
    return piece._replace(bytes=dict(piece.bytes) | {s: 0 for kernel in piece.run for s in kernel.makes})

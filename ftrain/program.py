"""A captured graph, made to run: its repeating regions and what lies between them, each compiled once.

The graph is one straight line of nodes. Collectives and updates in place run as they stand; the rest is cut
there into pieces, of which equal ones are compiled once, and run with what they no longer need given up.
"""

import operator
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from .nodes import begins, computes, is_ours, is_wait, mutates
from .passes import add_in_order, share_maxima, widen_products
from .region import structure
from .schedule import Collective, collectives, in_order, is_region, one_line, overlap

DECOMPOSED = "decomposed"


@dataclass
class Compiled:
    """What compiling gave and cost: distinct pieces, how many of them the cache on disk had, the kernels in them,
    how often pieces are called in a step, and seconds."""

    pieces: int = 0
    cached: int = 0
    kernels: int = 0
    calls: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.calls} calls of {self.pieces} compiled pieces with {self.kernels} kernels, made in "
            f"{self.seconds:.1f} s, {self.cached} of them from the cache"
        )


class Instruction(NamedTuple):
    """call(the slots `takes`, as a list) -> what goes to the slots `gives`; those in `drops` are given up before.

    key: of the piece that it runs.
    """

    call: Callable[[list], Sequence]
    takes: tuple[int, ...]
    gives: tuple[int | None, ...]
    drops: tuple[int, ...]
    name: str
    key: tuple


class Piece(NamedTuple):
    """A run of nodes as a module of its own: takes -> gives, of which None is for what nothing uses.

    key: equal where pieces do the same. open: whether a compiler may take it.
    """

    name: str
    module: fx.GraphModule
    key: tuple
    takes: Sequence[fx.Node]
    gives: Sequence[fx.Node | None]
    open: bool


class Program:
    """The nodes of a graph in the order they run, made callable: list of inputs -> list of outputs.

    mode: `inductor` compiles; `aot_eager` runs the operators as they were captured; DECOMPOSED, which is to be looked at
    and not run, has them as inductor would be given them for an accelerator.
    """

    def __init__(self, traced: fx.GraphModule, mode: str):
        self.nodes = in_order(list(traced.graph.nodes))
        self.size = len(self.nodes)
        slot = {node: i for i, node in enumerate(self.nodes)}
        [result] = self.nodes[-1].args
        self.inputs = [slot[n] for n in self.nodes if n.op == "placeholder"]
        self.outputs = [slot[n] for n in result]
        pieces = [bounded(nodes, slot.keys()) for nodes in cut(self.nodes)]
        self.pieces: dict[tuple, fx.GraphModule] = {}  # the distinct ones, by their structure
        self.compiled = Compiled()
        calls = self._calls(pieces, mode)
        self.instructions = [
            Instruction(
                calls[piece.key], tuple(slot[n] for n in piece.takes),
                tuple(None if n is None else slot[n] for n in piece.gives), tuple(slot[n] for n in drops), piece.name,
                piece.key,
            )
            for piece, drops in zip(pieces, last_uses(pieces, set(result)), strict=True)
        ]  # fmt: skip

    def _calls(self, pieces: Sequence[Piece], mode: str) -> dict[tuple, Callable[[list], Sequence]]:
        """What runs each distinct piece, by its key: compiled where there is something to compile."""
        calls: dict[tuple, Callable[[list], Sequence]] = {}
        compiled: set[tuple] = set()
        for piece in pieces:
            if piece.key not in calls:
                module = self.pieces[piece.key] = prepared(piece.module, mode) if piece.open else piece.module
                if mode == "inductor" and piece.open and any(map(computes, module.graph.nodes)):
                    calls[piece.key] = self._compile(module)
                    compiled.add(piece.key)
                else:
                    calls[piece.key] = unboxed(module)
            self.compiled.calls += piece.key in compiled
        return calls

    def collectives(self) -> list[Collective]:
        """What this rank exchanges with others, in the order it begins."""
        return collectives(self.nodes, self.pieces)

    def line(self) -> list[fx.Node]:
        """All operators in the order they run, those of regions in the regions' places."""
        return [node for _, node in one_line(self.nodes, self.pieces)]

    def __call__(self, inputs: list) -> list:
        slots = self.filled(inputs)
        for _ in self.run(slots):
            pass
        return self.results(slots)

    def filled(self, inputs: list) -> list:
        """The slots before the first instruction. Takes the inputs out of their list."""
        slots: list[Any] = [None] * self.size
        for i in reversed(self.inputs):
            slots[i] = inputs.pop()
        return slots

    def results(self, slots: list) -> list:
        """The outputs, among the slots after the last instruction."""
        return [slots[i] for i in self.outputs]

    def run(self, slots: list) -> Iterator[Instruction]:
        """Each instruction, after it has run: between two of them, only the slots hold what was computed."""
        for instruction in self.instructions:
            call, takes, gives, drops, *_ = instruction
            taken = [slots[i] for i in takes]
            for i in drops:
                slots[i] = None
            given = call(taken)
            for at, i in enumerate(gives):
                if i is not None:
                    slots[i] = given[at]
            del taken, given  # else they would live through the next call
            yield instruction

    def _compile(self, module: fx.GraphModule) -> Callable[[list], Sequence]:
        from torch._dynamo.utils import counters
        from torch._inductor import metrics

        start, hits = time.perf_counter(), counters["inductor"]["fxgraph_cache_hit"]
        kernels = metrics.generated_kernel_count
        call = inductor(module)
        done = self.compiled
        done.pieces += 1
        done.cached += counters["inductor"]["fxgraph_cache_hit"] - hits
        done.kernels += metrics.generated_kernel_count - kernels
        done.seconds += time.perf_counter() - start
        return call


def prepared(module: fx.GraphModule, mode: str) -> fx.GraphModule:
    """What is compiled in place of a piece: its operators without updates in place, in the order that hides
    communication."""
    module = ordered(module, module.graph.nodes)  # its own stays as it was captured, and as its key says
    share_maxima(module.graph)
    add_in_order(module.graph)
    module.recompile()
    if mode in ("inductor", DECOMPOSED) or any(mutates(n) for n in module.graph.nodes):
        module = functional(module, mode)
    return ordered(module, overlap(list(module.graph.nodes)))


def ordered(module: fx.GraphModule, nodes: Iterable[fx.Node]) -> fx.GraphModule:
    """A copy of a graph, its nodes in this order."""
    graph, copied = fx.Graph(), {}
    for n in nodes:
        copied[n] = graph.node_copy(n, copied.__getitem__)
    return fx.GraphModule(module, graph)


def functional(module: fx.GraphModule, mode: str) -> fx.GraphModule:
    """The same operators without updates in place, for inductor taken apart as it wants them."""
    from torch._inductor.decomposition import select_decomp_table

    inputs = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
    fake = fake_mode(module.graph)
    table = None if mode == "aot_eager" else select_decomp_table()
    with fake, torch.no_grad():
        flat = make_fx(torch.func.functionalize(module), table, record_module_stack=False)(*inputs)
    if mode != DECOMPOSED:
        widen_products(flat.graph)
    flat.graph.eliminate_dead_code()
    return flat


def unboxed(module: fx.GraphModule) -> Callable[[list], Sequence]:
    def call(values: list) -> Sequence:
        return module(*values)

    return call


def as_module(piece: Sequence[fx.Node], takes: Sequence[fx.Node], gives: Sequence[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for n in takes:
        copied[n] = graph.placeholder(n.name)
        copied[n].meta = dict(n.meta)
    for n in piece:
        copied[n] = graph.node_copy(n, copied.__getitem__)
    graph.output(tuple(copied[n] for n in gives))
    return fx.GraphModule(piece[0].graph.owning_module, graph)


def inductor(module: fx.GraphModule) -> Callable[[list], Sequence]:
    """A functional graph, compiled. Results have the strides that the graph says."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.virtualized import V

    inputs = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
    output = module.graph.output_node()
    output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))
    fake = fake_mode(module.graph)
    with fake, tracing(TracingContext(fake)), V.set_fake_mode(fake), torch.no_grad():
        return compile_fx_inner(module, inputs)


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """That of a graph's values, and not of its inputs alone: it may have none."""
    return detect_fake_mode([n.meta.get("val") for n in graph.nodes])


def bounded(nodes: Sequence[fx.Node], used: Collection[fx.Node]) -> Piece:
    """A run of nodes, cut out where it ends. used: the nodes of the graph; others are nobody's."""
    head, inside = nodes[0], set(nodes)
    if is_region(head):
        module = head.target.module
        gives: list[fx.Node | None] = [None] * len(module.graph.output_node().args[0])
        for user in head.users:
            if user in used:
                gives[user.args[1]] = user
        return Piece(head.name, module, head.target.key, head.args, gives, open=True)
    takes = list(dict.fromkeys(m for n in nodes for m in n.all_input_nodes if m not in inside))
    gives = [n for n in nodes if any(u in used and u not in inside for u in n.users)]
    if len(nodes) == 1 and head.users and all(u.target is operator.getitem for u in head.users):
        gives = sorted((u for u in head.users if u in used), key=lambda u: u.args[1])
        nodes = [head, *gives]
    module = as_module(nodes, takes, gives)
    return Piece(head.name, module, structure(module), takes, gives, open=not alone(head))


def last_uses(pieces: Sequence[Piece], kept: set[fx.Node]) -> list[list[fx.Node]]:
    """Of each piece, what no later one takes, but for what is kept."""
    last = {n: i for i, piece in enumerate(pieces) for n in piece.takes}
    found: list[list[fx.Node]] = [[] for _ in pieces]
    for n, i in last.items():
        if n not in kept:
            found[i].append(n)
    return found


def alone(node: fx.Node) -> bool:
    """Whether a node is a piece of its own, which no compiler takes."""
    if node.op != "call_function":
        return False
    return is_region(node) or begins(node) or is_wait(node) or mutates(node) or of_many(node)


def of_many(node: fx.Node) -> bool:
    """Whether a node is an operator of ours on a list of tensors: compiled, it would be another for each model."""
    return is_ours(node.target) and bool(node.args) and isinstance(node.args[0], (list, tuple))


def cut(nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Runs of nodes: those that stand alone, and what lies between them."""
    pieces: list[list[fx.Node]] = []
    open_piece: list[fx.Node] = []
    for node in nodes:
        if node.op in ("placeholder", "output") or (node.target is operator.getitem and alone(node.args[0])):
            continue  # one of several results: taken apart where they are made
        if alone(node):
            if open_piece:
                pieces.append(open_piece)
            pieces.append([node])
            open_piece = []
        else:
            open_piece.append(node)
    return pieces + [open_piece] * bool(open_piece)

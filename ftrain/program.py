"""A captured graph, made to run: its repeating regions and what lies between them, each compiled once.

The graph is one straight line of nodes. Collectives and updates in place run as they stand; the rest is cut
there into pieces, of which equal ones are compiled once, and run with what they no longer need given up.
"""

import operator
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from .schedule import (
    Collective, collectives, gather_ahead, is_region, late_waits, live, one_by_one, one_line, overlap,
)  # fmt: skip


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
    """call(the slots `takes`, as a list) -> what goes to the slots `gives`; those in `drops` are given up before."""

    call: Callable[[list], Sequence]
    takes: tuple[int, ...]
    gives: tuple[int | None, ...]
    drops: tuple[int, ...]
    name: str


class Program:
    """The nodes of a graph in the order they run, made callable: list of inputs -> list of outputs."""

    def __init__(self, traced: fx.GraphModule, mode: str):
        self.nodes = live(late_waits(one_by_one(gather_ahead(list(traced.graph.nodes)))))
        self.compiled = Compiled()
        slot = {node: i for i, node in enumerate(self.nodes)}
        self.inputs = [slot[n] for n in self.nodes if n.op == "placeholder"]
        [result] = self.nodes[-1].args
        self.outputs = [slot[n] for n in result]
        pieces = cut(self.nodes)
        last: dict[fx.Node, int] = {}
        for i, piece in enumerate(pieces):
            last |= {m: i for n in piece for m in n.all_input_nodes}
        kept = set(result)
        self.pieces: dict[tuple, fx.GraphModule] = {}  # the distinct ones, by their structure
        calls: dict[tuple, Callable[[list], Sequence]] = {}
        compiled: set[tuple] = set()
        self.instructions = []
        for i, piece in enumerate(pieces):
            inside = set(piece)
            takes = list(dict.fromkeys(m for n in piece for m in n.all_input_nodes if m not in inside))
            gives: list[fx.Node | None] = [n for n in piece if any(u in slot and u not in inside for u in n.users)]
            head = piece[0]
            if is_region(head):
                takes, module, key = list(head.args), head.target.module, head.target.key
                gives = [None] * len(module.graph.output_node().args[0])
                for user in head.users:
                    if user in slot:
                        gives[user.args[1]] = user
            else:
                if len(piece) == 1 and head.users and all(u.target is operator.getitem for u in head.users):
                    gives = sorted((u for u in head.users if u in slot), key=lambda u: u.args[1])
                    piece = [head, *gives]
                module = as_module(piece, takes, gives)
                key = structure(module)
            if key not in calls:
                takes_a_compiler = is_region(head) or not alone(head)
                if takes_a_compiler:
                    module = prepared(module, mode)
                self.pieces[key] = module
                if mode == "inductor" and takes_a_compiler and any(computes(n) for n in module.graph.nodes):
                    calls[key] = self._compile(module)
                    compiled.add(key)
                else:
                    calls[key] = unboxed(module)
            self.compiled.calls += key in compiled
            drops = {m for n in piece for m in n.all_input_nodes if last.get(m) == i and m not in inside} - kept
            self.instructions.append(Instruction(
                calls[key], tuple(slot[n] for n in takes), tuple(None if n is None else slot[n] for n in gives),
                tuple(slot[n] for n in drops), head.name,
            ))  # fmt: skip
        self.size = len(self.nodes)

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
        return [slots[i] for i in self.outputs]

    def filled(self, inputs: list) -> list:
        """The slots before the first instruction. Takes the inputs out of their list."""
        slots: list[Any] = [None] * self.size
        for i in reversed(self.inputs):
            slots[i] = inputs.pop()
        return slots

    def run(self, slots: list) -> Iterator[Instruction]:
        """Each instruction, after it has run: between two of them, only the slots hold what was computed."""
        for instruction in self.instructions:
            call, takes, gives, drops, _ = instruction
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
    if mode == "inductor" or any(mutates(n) for n in module.graph.nodes):
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
    table = select_decomp_table() if mode == "inductor" else None
    with fake, torch.no_grad():
        flat = make_fx(torch.func.functionalize(module), table, record_module_stack=False)(*inputs)
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

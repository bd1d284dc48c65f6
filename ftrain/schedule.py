"""In which order a captured graph runs: communication begins as early, and is waited for as late, as memory allows.

A collective is two nodes, one that starts it and one that waits. What lies between them runs meanwhile.
"""

import operator
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import fx

from .nodes import begins, computes, is_light, is_reduction, is_start, is_view, is_wait, mutates, sources
from .offload import to_device
from .region import Region

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

# What makes float8 of parameters, by scales that ranks agree on, before they are gathered.
SCALING = {
    aten.abs.default, aten.amax.default, aten.reciprocal.default, aten.mul.Tensor, aten.clamp.default,
    c10d.all_reduce.default, c10d.wait_tensor.default,
}  # fmt: skip


def is_region(node: fx.Node) -> bool:
    return isinstance(node.target, Region)


def base(node: fx.Node) -> fx.Node:
    """What a node may be a view of."""
    while node.all_input_nodes:
        source = node.all_input_nodes[0]
        if node.target is operator.getitem and is_region(source):  # one of its outputs, which may be one of its inputs
            inner = source.target.module.graph
            inputs, [outputs] = [n for n in inner.nodes if n.op == "placeholder"], inner.output_node().args
            of = base(outputs[node.args[1]])
            if of.op != "placeholder":
                return node
            node = source.args[inputs.index(of)]
        elif is_light(node) or is_view(node):
            node = source
        else:
            return node
    return node


def changed(node: fx.Node) -> set[fx.Node]:
    """What a node changes in place."""
    return {base(n) for n in node.all_input_nodes} if mutates(node) else set()


def reads(node: fx.Node) -> set[fx.Node]:
    """What must be as it is when a node runs. Until it is waited for, a collective reads its input."""
    return {base(m) for n in ([node, node.args[0]] if is_wait(node) else [node]) for m in n.all_input_nodes}


def in_order(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes of a captured graph as they run: by all of the rules below but `overlap`, which is for within regions.

    Gatherings are moved first: what is held back after that is not asked for earlier again.
    """
    return live(late_waits(one_by_one(gather_ahead(nodes))))


def late_waits(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The same nodes, computations in the same order; waits, and what only moves things, just before they are used.

    A reduction keeps what it reduces until it is waited for, a layer's whole gradients: that is done as soon as it had
    one region to hide behind.
    """
    order: dict[fx.Node, None] = {}

    def emit(node: fx.Node) -> None:
        stack = [node]
        while stack:
            top = stack[-1]
            todo = [n for n in top.all_input_nodes if n not in order]
            if todo:
                stack += reversed(todo)
            else:
                order[stack.pop()] = None
                if top.users and all(n.target is operator.getitem for n in top.users):
                    order.update(dict.fromkeys(top.users))  # several results are taken apart at once

    deferred: list[fx.Node] = []
    for node in nodes:
        if node.op in ("placeholder", "get_attr"):
            order[node] = None
        elif node.op == "output" or computes(node) or begins(node):
            if new := changed(node):  # what reads them must have done so
                for n in deferred:
                    if n not in order and new & reads(n):
                        emit(n)
            hidden = [n for n in deferred if is_reduction(n) and n.args[0] in order] if is_region(node) else []
            emit(node)
            for n in hidden:
                if n not in order:
                    emit(n)
        else:
            deferred.append(node)
    return list(order)


def live(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Without what nothing uses."""
    used: set[fx.Node] = set()
    for node in reversed(nodes):
        if node.op in ("placeholder", "output") or mutates(node) or node in used:
            used.add(node)
            used.update(node.all_input_nodes)
    return [node for node in nodes if node in used]


def gather_ahead(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Each gathering of parameters, and what comes back from the host, begins before the region that runs ahead of
    the one that needs it, and what ranks agree on for a gathering one region before that.

    So at most two layers are gathered at a time. A gathering that would begin where the same parameters are
    already at hand (the last layer's, between its forward and its backward) is left out.
    """
    order = list(nodes)
    gathers = [n for n in nodes if n.target in (c10d.all_gather_into_tensor.default, to_device)]
    for start in gathers + [n for n in nodes if n.target is c10d.all_reduce.default]:
        chain = set() if start.target is to_device else _from_parameters(start)
        if chain is None:
            continue
        of_chain = reads(start).union(*map(reads, chain))
        at = order.index(start)
        first = max((order.index(n) + 1 for n in start.all_input_nodes), default=0) if start.target is to_device else 0
        ahead = next((i for i in range(at - 1, first - 1, -1) if is_region(order[i])), None)
        if ahead is None:  # the first layer's, before whatever comes before it
            ahead = next((i for i in range(first, at) if computes(order[i]) and order[i] not in chain), None)
        if ahead is None:
            continue
        if any(changed(n) & of_chain for n in order[ahead:at]):
            continue
        same = _gathered_for(order[ahead], start) if is_start(start) else None
        if same is not None:
            [wait], [again] = start.users, same.users
            wait.replace_all_uses_with(again)
            order.remove(wait)
            order.remove(start)
            continue
        moved = [n for n in order[ahead:at] if n in chain] + [start]
        early = set(moved)
        rest = [n for n in order if n not in early]
        ahead = rest.index(order[ahead])
        order = rest[:ahead] + moved + rest[ahead:]
    return order


def one_by_one(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """A collective that goes on with another's result begins a region later, not before that has arrived."""
    order: list[fx.Node] = []
    held: list[fx.Node] = []
    for node in nodes:
        on_held = any(m in held for m in node.all_input_nodes)
        chained = is_start(node) and any(map(is_wait, _moved(node))) and _from_parameters(node) is None
        if chained or (on_held and (is_wait(node) or is_light(node))):
            held.append(node)
            continue
        if node.op == "output" or mutates(node) or on_held:
            order += held
            held = []
        order.append(node)
        if is_region(node):
            order += held
            held = []
    return order


def _moved(start: fx.Node) -> set[fx.Node]:
    """What a collective's input is moved and cast from."""
    return sources(start.all_input_nodes, is_light)


def _from_parameters(start: fx.Node) -> set[fx.Node] | None:
    """What a collective's input is made of, where that is inputs of the graph alone, moved, cast and scaled."""
    found = sources(start.all_input_nodes, _scales)
    made = {n for n in found if n.op != "placeholder"}
    return made if all(map(_scales, made)) else None


def _scales(node: fx.Node) -> bool:
    return is_light(node) or node.target in SCALING


def _gathered_for(region: fx.Node, start: fx.Node) -> fx.Node | None:
    """Among the gatherings that a region reads, the one that is the same as `start`."""
    for n in region.all_input_nodes:
        while is_light(n) and len(n.all_input_nodes) == 1:
            [n] = n.all_input_nodes
        if is_wait(n) and n.args[0].target is start.target and _equal(n.args[0], start):
            return n.args[0]
    return None


def _equal(a, b) -> bool:
    """Whether two nodes compute the same from the same inputs of the graph."""
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(map(_equal, a, b))
        return type(a) is type(b) and a == b
    if a is b:
        return True
    if a.op != b.op or a.op == "placeholder" or a.target != b.target:
        return False
    return _equal(a.args, b.args) and _equal(tuple(a.kwargs.items()), tuple(b.kwargs.items()))


def overlap(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Within a region: each collective begins as soon as its input is there, in their order, and before one is waited
    for, everything runs that does not need what is on its way.

    So queries are on their way to their ranks while keys are computed, and rows to their experts while shared ones work.
    """
    if not any(map(is_start, nodes)):
        return list(nodes)
    order: dict[fx.Node, None] = {}
    inputs = [n for n in nodes if n.op in ("placeholder", "get_attr")]
    order |= dict.fromkeys(inputs)
    body = [n for n in nodes if n not in order]

    for goal in [n for n in body if is_start(n) or n.op == "output"]:
        needed = sources([goal], lambda n: n not in order)
        for node in [n for n in body if n in needed and n not in order]:
            if is_wait(node) and node not in order:
                for other in body:  # all that is ready, and waits for nothing
                    if other not in order and not is_wait(other) and other.op != "output" and not is_start(other):
                        if all(n in order for n in other.all_input_nodes):
                            order[other] = None
            order[node] = None
    return list(order)


class Collective(NamedTuple):
    """One of a step's: its kind, its group's name, the bytes that it leaves or takes here (whichever is more; None
    where that depends on the data), and whether nothing is computed between its start and its wait."""

    kind: str
    group: str
    bytes: int | None
    exposed: bool


def one_line(nodes: Sequence[fx.Node], pieces: Mapping[tuple, fx.GraphModule]) -> list[tuple[int, fx.Node]]:
    """A graph's nodes with those of its regions in the regions' places, each with the number of its region, or -1.

    pieces: the regions as they run, by key.
    """
    line: list[tuple[int, fx.Node]] = []
    for i, node in enumerate(nodes):
        if is_region(node):
            line += [(i, n) for n in pieces[node.target.key].graph.nodes]
        else:
            line.append((-1, node))
    return line


def collectives(nodes: Sequence[fx.Node], pieces: Mapping[tuple, fx.GraphModule]) -> list[Collective]:
    """Those of a graph in the order they start, within its regions too. pieces: as for `one_line`."""
    line = one_line(nodes, pieces)
    place = {at: i for i, at in enumerate(line)}
    busy = list(accumulate((computes(n) for _, n in line), initial=0))
    found = []
    for i, (within, start) in enumerate(line):
        if is_start(start):
            [wait] = [place[within, n] for n in start.users if is_wait(n)]
            sizes = [n.meta["val"].numel() * n.meta["val"].element_size() for n in (start, start.args[0])]
            known = max(sizes) if all(isinstance(size, int) for size in sizes) else None
            kind = start.target.__name__.split(".")[0]
            found.append(Collective(kind, start.args[-1], known, busy[wait] == busy[i]))
    return found

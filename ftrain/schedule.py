"""In which order a captured graph runs: communication begins as early, and is waited for as late, as memory allows.

A collective is two nodes, one that starts it and one that waits. What lies between them runs meanwhile.
"""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import fx

from .region import Region

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

# What moves or casts, and does not compute.
LIGHT = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.t.default, aten.transpose.int,
    aten.permute.default, aten.split.Tensor, aten.split_with_sizes.default, aten.slice.Tensor, aten.narrow.default,
    aten.unbind.int, aten.select.int, aten.cat.default, aten.stack.default, aten.clone.default, aten._to_copy.default,
    aten.detach.default, aten.alias.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.constant_pad_nd.default, aten.empty_like.default,
}  # fmt: skip


def is_start(node: fx.Node) -> bool:
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and node.target.namespace == "_c10d_functional"
        and node.target is not c10d.wait_tensor.default
    )


def is_wait(node: fx.Node) -> bool:
    return node.target is c10d.wait_tensor.default


def is_light(node: fx.Node) -> bool:
    return node.target is operator.getitem or node.target in LIGHT


def mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def computes(node: fx.Node) -> bool:
    """Whether a collective can hide behind it."""
    return node.op == "call_function" and not (is_start(node) or is_wait(node) or is_light(node))


def is_view(node: fx.Node) -> bool:
    """Whether a node's result is its first argument's memory, by its operator's schema."""
    return isinstance(node.target, torch._ops.OpOverload) and any(r.alias_info for r in node.target._schema.returns)


def base(node: fx.Node) -> fx.Node:
    """What a node may be a view of."""
    while node.all_input_nodes:
        source = node.all_input_nodes[0]
        if node.target is operator.getitem and isinstance(source.target, Region):  # whose outputs may be its inputs
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


def late_waits(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The same nodes, computations in the same order; waits, and what only moves things, just before they are used."""
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
        elif node.op == "output" or computes(node) or is_start(node):
            if new := changed(node):  # what reads them must have done so
                for n in deferred:
                    if n not in order and new & reads(n):
                        emit(n)
            emit(node)
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
    """Each gathering of parameters begins before the region that runs ahead of the one that needs it.

    So at most two layers are gathered at a time. A gathering that would begin where the same parameters are
    already at hand (the last layer's, between its forward and its backward) is left out.
    """
    order = list(nodes)
    for start in [n for n in nodes if n.target is c10d.all_gather_into_tensor.default]:
        chain = _from_parameters(start)
        if chain is None:
            continue
        of_chain = reads(start).union(*map(reads, chain))
        at = order.index(start)
        ahead = next((i for i in range(at - 1, -1, -1) if isinstance(order[i].target, Region)), None)
        if ahead is None or any(changed(n) & of_chain for n in order[ahead:at]):
            continue
        same = _gathered_for(order[ahead], start)
        if same is not None:
            [wait], [again] = start.users, same.users
            wait.replace_all_uses_with(again)
            order.remove(wait)
            order.remove(start)
            continue
        moved = [n for n in order[ahead:at] if n in chain] + [start]
        rest = [n for n in order if n not in set(moved)]
        ahead = rest.index(order[ahead])
        order = rest[:ahead] + moved + rest[ahead:]
    return order


def _from_parameters(start: fx.Node) -> set[fx.Node] | None:
    """What a collective's input is made of, where that is inputs of the graph alone, moved and cast."""
    found, stack = set(), list(start.all_input_nodes)
    while stack:
        node = stack.pop()
        if node.op == "placeholder" or node in found:
            continue
        if not is_light(node):
            return None
        found.add(node)
        stack += node.all_input_nodes
    return found


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

    def ancestors(node: fx.Node) -> list[fx.Node]:
        found, stack = set(), [node]
        while stack:
            n = stack.pop()
            if n not in found and n not in order:
                found.add(n)
                stack += n.all_input_nodes
        return [n for n in body if n in found]

    for goal in [n for n in body if is_start(n) or n.op == "output"]:
        for node in ancestors(goal):
            if is_wait(node) and node not in order:
                for other in body:  # all that is ready, and waits for nothing
                    if other not in order and not is_wait(other) and other.op != "output" and not is_start(other):
                        if all(n in order for n in other.all_input_nodes):
                            order[other] = None
            order[node] = None
    return list(order)


class Collective(NamedTuple):
    """One of a step's: its kind, the group's name, the bytes this rank receives, and whether nothing is computed
    between its start and its wait."""

    kind: str
    group: str
    bytes: int
    exposed: bool

"""What a node of a graph does, by its operator alone, and what it is made from."""

import operator
from collections.abc import Callable, Iterable

import torch
from torch import fx

from .offload import arrived, to_device, to_host

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

# What only rearranges or casts.
MOVES = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.t.default, aten.transpose.int,
    aten.permute.default, aten.split.Tensor, aten.split_with_sizes.default, aten.slice.Tensor, aten.narrow.default,
    aten.unbind.int, aten.select.int, aten.cat.default, aten.clone.default, aten._to_copy.default, aten.detach.default,
    aten.alias.default,
}  # fmt: skip
# And what does not compute beside these.
LIGHT = MOVES | {
    aten.stack.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.constant_pad_nd.default,
    aten.empty_like.default, aten.view.dtype,
}  # fmt: skip


def is_ours(op) -> bool:
    """Whether an operator is one of ftrain's own."""
    return isinstance(op, torch._ops.OpOverload) and op.namespace == "ftrain"


def is_start(node: fx.Node) -> bool:
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and node.target.namespace == "_c10d_functional"
        and node.target is not c10d.wait_tensor.default
    )


def is_wait(node: fx.Node) -> bool:
    return node.target is c10d.wait_tensor.default or node.target is arrived


def begins(node: fx.Node) -> bool:
    """Whether a node starts something that another waits for, or that goes on by itself."""
    return is_start(node) or node.target in (to_host, to_device)


def is_reduction(node: fx.Node) -> bool:
    """Whether a node waits for a reduce-scatter."""
    return is_wait(node) and node.args[0].target is c10d.reduce_scatter_tensor.default


def is_light(node: fx.Node) -> bool:
    return node.target is operator.getitem or node.target in LIGHT


def mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def computes(node: fx.Node) -> bool:
    """Whether a collective can hide behind it."""
    return node.op == "call_function" and not (begins(node) or is_wait(node) or is_light(node))


def is_view(node: fx.Node) -> bool:
    """Whether a node's result is its first argument's memory, by its operator's schema."""
    return isinstance(node.target, torch._ops.OpOverload) and any(r.alias_info for r in node.target._schema.returns)


def sources(nodes: Iterable[fx.Node], through: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """These nodes and what they are made from, of which only what `through` holds for is looked behind."""
    found, stack = set(), list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if through(node):
                stack += node.all_input_nodes
    return found

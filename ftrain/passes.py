"""What is changed in a graph before it is compiled: the same results, by operators that serve better."""

import torch
from torch import Tensor, fx

from .flops import emulated
from .nodes import mutates
from .schedule import changed

aten = torch.ops.aten

ALIASES = (aten.view.default, aten.t.default, aten.detach.default, aten.alias.default)


def share_maxima(graph: fx.Graph) -> None:
    """Take the largest magnitude of the same tensor once, where float8 products that share an operand take it each.

    It saves work, and inductor's C++ does not compile where one kernel takes three of them in bf16.
    Other common subexpressions stay: they are what layers recompute on purpose.
    """
    first: dict[tuple, fx.Node] = {}
    rewritten = set().union(*map(changed, graph.nodes))
    for node in list(graph.nodes):
        if mutates(node):
            first.clear()  # what is taken from here on may be of other numbers
        if node in rewritten:
            continue  # it does not stay what it was made as
        if node.target in (*ALIASES, aten.abs.default, aten.amax.default, aten.max.default):
            same = first.setdefault((node.target, node.args, tuple(node.kwargs.items())), node)
            if same is not node:
                node.replace_all_uses_with(same)
                graph.erase_node(node)


def add_in_order(graph: fx.Graph) -> None:
    """Leave the embedding's gradient to torch's own kernel: inductor's adds atomically, no two runs alike."""
    for node in graph.nodes:
        if node.target is aten.embedding_dense_backward.default:
            node.target = torch.ops.ftrain.embedding_gradient.default


@torch.library.custom_op("ftrain::embedding_gradient", mutates_args=())
def embedding_gradient(grad: Tensor, ids: Tensor, rows: int, padding: int, scale: bool) -> Tensor:
    """aten.embedding_dense_backward, which adds in a fixed order."""
    return aten.embedding_dense_backward(grad, ids, rows, padding, scale)


@embedding_gradient.register_fake
def _(grad, ids, rows, padding, scale):
    return grad.new_empty(rows, grad.shape[-1])


def widen_products(graph: fx.Graph) -> None:
    """Products of bf16 in fp32, rounded after, where they would be emulated."""
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.target not in (aten.mm.default, aten.addmm.default, aten.bmm.default):
            continue
        if not emulated(value):
            continue
        with graph.inserting_before(node):
            wide = [n if not isinstance(n, fx.Node) else cast(graph, n, torch.float32) for n in node.args]
            product = graph.call_function(node.target, tuple(wide), node.kwargs)
            product.meta["val"] = value.float()
            narrow = cast(graph, product, torch.bfloat16)
        node.replace_all_uses_with(narrow)
        graph.erase_node(node)


def cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    out = graph.call_function(torch.ops.prims.convert_element_type.default, (node, dtype))
    out.meta["val"] = node.meta["val"].to(dtype)
    return out

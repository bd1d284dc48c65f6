"""A function of tensors -> one graph, compiled whole.

The function is captured once on fake tensors, down to aten operators: its inner `autograd.grad`
is by then ordinary operators, and what layers recompute stands in the graph where it runs. The
compiler sees that flat graph, takes it as a whole or refuses, and updates buffers in place.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from .program import Program

aten = torch.ops.aten

ALIASES = (aten.view.default, aten.t.default, aten.detach.default, aten.alias.default)
MODES = ("inductor", "aot_eager", "off")


def one_graph(fn: Callable, mode: str) -> Callable:
    """`fn` compiled whole at its first call; `off` runs it as it is.

    Takes and returns pytrees of tensors. Called with other shapes, it compiles again for those.
    """
    if mode not in MODES:
        raise ValueError(f"--compile {mode}: valid modes are {', '.join(MODES)}")
    if mode == "off":
        return fn
    programs: dict[tuple, tuple[Program, object]] = {}

    def run(*args):
        flat, tree = tree_flatten(args)
        key = (tree, tuple((t.shape, t.dtype) for t in flat))
        if key not in programs:
            result = []

            def flat_fn(*leaves):
                out, spec = tree_flatten(fn(*tree_unflatten(leaves, tree)))
                result.append(spec)
                return out

            # Activation checkpointing is to act while it is captured, not to leave tags for a compiler.
            with torch.compiler._non_strict_tracing_context():
                graph = make_fx(flat_fn, tracing_mode="fake")(*flat)
            share_maxima(graph.graph)
            add_in_order(graph.graph)
            programs[key] = Program(graph, mode), result[0]
        program, spec = programs[key]
        with torch.no_grad():
            return tree_unflatten(program(flat), spec)

    return run


def share_maxima(graph: torch.fx.Graph) -> None:
    """Take the largest magnitude of the same tensor once, where float8 products that share an operand take it each.

    It saves work, and inductor's C++ does not compile where one kernel takes three of them in bf16.
    Other common subexpressions stay: they are what layers recompute on purpose.
    """
    first: dict[tuple, torch.fx.Node] = {}
    for node in list(graph.nodes):
        if node.target in (*ALIASES, aten.abs.default, aten.amax.default, aten.max.default):
            same = first.setdefault((node.target, node.args, tuple(node.kwargs.items())), node)
            if same is not node:
                node.replace_all_uses_with(same)
                graph.erase_node(node)


def add_in_order(graph: torch.fx.Graph) -> None:
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

"""A function of tensors -> one graph, compiled whole.

The function is captured once on fake tensors, down to ATen operators: its inner `autograd.grad` is by then ordinary
operators, and what layers recompute stands in the graph where it runs. Layers are nodes of that graph (region.py); it
is put in order (schedule.py), and each of its distinct pieces is compiled once (program.py).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from .blocks import naming_values
from .program import Program

MODES = ("inductor", "aot_eager", "off")


class OneGraph:
    """`fn` as one graph, captured and compiled at its first call, and again for other shapes.

    programs: what was captured, by the `layout` of its arguments.
    """

    def __init__(self, fn: Callable, mode: str):
        self.fn, self.mode = fn, mode
        self.programs: dict[tuple, tuple[Program, object]] = {}

    def __call__(self, *args):
        flat, tree = tree_flatten(args)
        program, spec = self._program(flat, tree)
        with torch.no_grad():
            return tree_unflatten(program(flat), spec)

    def program(self, *args) -> Program:
        """What a call with such arguments runs."""
        return self._program(*tree_flatten(args))[0]

    def _program(self, flat: list[Tensor], tree) -> tuple[Program, object]:
        key = (tree, layout(flat))
        if key not in self.programs:
            self.programs[key] = self._capture(flat, tree)
        return self.programs[key]

    def _capture(self, flat: list[Tensor], tree) -> tuple[Program, object]:
        result = []

        def flat_fn(*leaves):
            out, spec = tree_flatten(self.fn(*tree_unflatten(leaves, tree)))
            result.append(spec)
            return out

        # Activation checkpointing is to act while it is captured, not to leave tags for a compiler.
        with torch.compiler._non_strict_tracing_context(), naming_values():
            graph = make_fx(flat_fn, tracing_mode="fake", _allow_non_fake_inputs=True)(*flat)
        return Program(graph, self.mode), result[0]


def layout(tensors: Sequence[Tensor]) -> tuple:
    """What one graph serves: shapes, strides, dtypes, and which arguments are one tensor (of two that are, the capture
    takes the first for both)."""
    first: dict[int, int] = {}
    return tuple(
        (t.shape, tuple(stride for stride, n in zip(t.stride(), t.shape) if n > 1), t.dtype, first.setdefault(id(t), i))
        for i, t in enumerate(tensors)
    )


def one_graph(fn: Callable, mode: str) -> Callable:
    """`fn`, which takes and returns pytrees of tensors, compiled whole; `off` runs it as it is."""
    if mode not in MODES:
        raise ValueError(f"--compile {mode}: valid modes are {', '.join(MODES)}")
    return fn if mode == "off" else OneGraph(fn, mode)

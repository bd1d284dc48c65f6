"""A function of tensors -> one graph, compiled whole.

The function is captured once on fake tensors, down to ATen operators: its inner `autograd.grad` is by then ordinary
operators, and what layers recompute stands in the graph where it runs. Layers are nodes of that graph (region.py); it
is put in order (schedule.py), and each of its distinct pieces is compiled once (program.py).
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from .blocks import naming_values
from .program import Program

MODES = ("inductor", "aot_eager", "off")

# What runs a program in its place: (program, of each input the name of fn's argument that it is of, inputs) -> outputs.
Runner = Callable[[Program, list[str], list], list]


class OneGraph:
    """`fn`, which takes and returns pytrees of tensors, as one graph: captured and compiled at its first call, and
    again for arguments of another `layout`. Mode `off` captures nothing, and calls fn."""

    def __init__(self, fn: Callable, mode: str):
        self.fn, self.mode = fn, mode
        self._captured: dict[tuple, tuple[Program, object]] = {}
        self._runner: Runner | None = None

    @property
    def programs(self) -> list[Program]:
        """What was captured until now, the newest last."""
        return [program for program, _ in self._captured.values()]

    def __call__(self, *args):
        if self.mode == "off":
            return self.fn(*args)
        flat, tree = tree_flatten(args)
        program, spec = self._program(flat, tree)
        with torch.no_grad():
            outputs = self._runner(program, self._of_leaves(tree), flat) if self._runner else program(flat)
            return tree_unflatten(outputs, spec)

    def program(self, *args) -> Program:
        """What a call with such arguments runs, captured if it was not. Raises ValueError in mode `off`."""
        if self.mode == "off":
            raise ValueError(f"--compile off captures no graph: compile it, by {' or '.join(MODES[:-1])}")
        return self._program(*tree_flatten(args))[0]

    def traced(self, *args) -> tuple[fx.GraphModule, list[str]]:
        """What a call with such arguments, fake ones too, is captured as, not yet made to run; and of each of its
        inputs, the name of fn's argument that it is of."""
        flat, tree = tree_flatten(args)
        return self._trace(flat, tree)[0], self._of_leaves(tree)

    @contextmanager
    def run_by(self, runner: Runner) -> Iterator[None]:
        """Within, calls run what is captured by this function: to look at a program while it runs."""
        before, self._runner = self._runner, runner
        try:
            yield
        finally:
            self._runner = before

    @property
    def names(self) -> list[str]:
        """Of fn's arguments."""
        return list(inspect.signature(self.fn).parameters)

    def _of_leaves(self, tree) -> list[str]:
        return [name for name, of in zip(self.names, tree.children()) for _ in range(of.num_leaves)]

    def _program(self, flat: list[Tensor], tree) -> tuple[Program, object]:
        key = (tree, layout(flat))
        if key not in self._captured:
            self._captured[key] = self._capture(flat, tree)
        return self._captured[key]

    def _capture(self, flat: list[Tensor], tree) -> tuple[Program, object]:
        graph, spec = self._trace(flat, tree)
        return Program(graph, self.mode), spec

    def _trace(self, flat: list[Tensor], tree) -> tuple[fx.GraphModule, object]:
        result = []

        def flat_fn(*leaves):
            out, spec = tree_flatten(self.fn(*tree_unflatten(leaves, tree)))
            result.append(spec)
            return out

        # Activation checkpointing is to act while it is captured, not to leave tags for a compiler.
        with torch.compiler._non_strict_tracing_context(), naming_values():
            graph = make_fx(flat_fn, tracing_mode="fake", _allow_non_fake_inputs=True)(*flat)
        return graph, result[0]


def layout(tensors: Iterable[Tensor]) -> tuple:
    """What one graph serves: shapes, strides, dtypes, and which arguments are one tensor (of two that are, the capture
    takes the first for both)."""
    first: dict[int, int] = {}
    return tuple(
        (t.shape, tuple(stride for stride, n in zip(t.stride(), t.shape) if n > 1), t.dtype, first.setdefault(id(t), i))
        for i, t in enumerate(tensors)
    )


def one_graph(fn: Callable, mode: str) -> OneGraph:
    """`fn`, which takes and returns pytrees of tensors, compiled whole; `off` runs it as it is."""
    if mode not in MODES:
        raise ValueError(f"--compile {mode}: valid modes are {', '.join(MODES)}")
    return OneGraph(fn, mode)

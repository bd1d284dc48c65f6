"""Whether a function does the same as it did before, found out in a fraction of the time that a trace takes.

Its operators are noted as they run on fake tensors, with all arguments, and then the graph that autograd made of them:
two functions with one outline have the same forward and the same backward, whatever Python wrote them.
"""

import re
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Outline(NamedTuple):
    """key: equal where all operators, arguments and gradients are. outside: the tensors that came from elsewhere, in
    the order of their first use."""

    key: tuple
    outside: list[Tensor]


class _Noting(TorchDispatchMode):
    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()
        self.number = {id(t): i for i, t in enumerate(inputs)}
        self.kept: list[Any] = list(inputs)  # alive, so that no other tensor gets their ids
        self.symbols: dict[str, int] = {}
        self.rows: list[tuple] = []
        self.outside: list[Tensor] = []

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self.number:
                self.number[id(value)] = len(self.number)
                self.kept.append(value)
                self.outside.append(value)
                self.rows.append(("outside", len(self.outside), *self.kind(value)))
            return ("tensor", self.number[id(value)])
        if isinstance(value, (list, tuple)):
            return tuple(self.of(v) for v in value)
        if isinstance(value, dict):
            return tuple((k, self.of(v)) for k, v in value.items())
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return ("symbol", self.renamed(value))
        if not isinstance(value, Hashable):
            self.kept.append(value)
            return ("object", id(value))
        return (type(value).__name__, value)  # 1, 1.0 and True are not the same argument

    def renamed(self, value: Any) -> str:
        return re.sub(r"[us]\d+", lambda m: f"#{self.symbols.setdefault(m[0], len(self.symbols))}", str(value))

    def kind(self, t: Tensor) -> tuple:
        sizes = self.renamed([*t.shape, *t.stride()])
        values = tuple(t.flatten().tolist()) if type(t) is Tensor else None  # a constant
        return sizes, t.dtype, t.device, t.requires_grad, values

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.rows.append((op, self.of(args), self.of(kwargs or {})))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and id(t) not in self.number:
                self.number[id(t)] = len(self.number)
                self.kept.append(t)
        return out


def outline(fn: Callable, inputs: Sequence[Tensor]) -> Outline:
    """Of `fn(*inputs)`, a pytree of tensors, with the gradients that the inputs' requires_grad asks for."""
    noting = _Noting(inputs)
    noting.rows.append(tuple(noting.kind(t) for t in inputs))
    fake = detect_fake_mode(list(inputs))
    fresh = fake.shape_env.ignore_fresh_unbacked_symbols() if fake and fake.shape_env else nullcontext()
    with fresh, noting:
        result = fn(*inputs)
    noting.rows.append(tree_map(str, tree_map(noting.of, result)).__repr__())
    noting.rows += _backward(noting, [t for t in tree_leaves(result) if isinstance(t, Tensor)], inputs)
    return Outline(tuple(noting.rows), noting.outside)


def _backward(noting: _Noting, ends: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[tuple]:
    """The graph of autograd's nodes from `ends` back to where the function began."""
    begin = {id(t.grad_fn): ("outside", i) for i, t in enumerate(noting.outside) if t.grad_fn is not None}
    leaves = {id(t): i for i, t in enumerate([*inputs, *noting.outside])}
    number: dict[Any, int] = {}
    rows: list[tuple] = [tuple(None if t.grad_fn is None else t.output_nr for t in ends)]
    stack = [t.grad_fn for t in reversed(ends) if t.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in number:
            continue
        number[node] = len(number)
        if id(node) in begin:
            rows.append(begin[id(node)])
            continue
        row: tuple = (type(node).__qualname__, node.name())
        if hasattr(node, "variable"):
            row += (leaves.get(id(node.variable), "constant"),)
        # What a Function of Python's noted on its ctx for the backward.
        row += tuple((k, noting.of(v)) for k, v in sorted(getattr(node, "__dict__", {}).items()))
        nexts = [n for n, _ in node.next_functions]
        rows.append((*row, tuple(i for _, i in node.next_functions), tuple(n is None for n in nexts)))
        stack += [n for n in reversed(nexts) if n is not None]
        rows.append(tuple(number[n] for n in nexts if n in number))
    return rows

"""Whether a function does the same as it did before, found out in a fraction of the time that a trace takes.

Its operators and those of its gradient are noted as they run on fake tensors, with all arguments: two functions with
one outline have the same forward and the same backward, whatever Python (hooks, autograd.Functions) made of them.
"""

import re
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves


class Outline(NamedTuple):
    """key: equal where all operators, arguments and gradients are. outside: the tensors that came from elsewhere, in
    the order of their first use."""

    key: tuple
    outside: list[Tensor]


def exact(value: Hashable) -> tuple:
    """Equal where values are the same argument: 1, 1.0 and True are not, nor are 0.0 and -0.0."""
    return type(value).__name__, value.hex() if isinstance(value, float) else value


def constant(t: Tensor) -> tuple:
    """What equal constants have in common. Raises ValueError for what is none: a tensor that an earlier capture made."""
    if isinstance(t, FakeTensor):
        raise ValueError(f"a tensor is kept from one call to another ({t.dtype} {tuple(t.shape)}): make it anew in each")
    with unset_fake_temporarily():
        return t.dtype, tuple(t.shape), tuple(map(exact, t.flatten().tolist()))


SYMBOL = re.compile(r"\b[a-z]+\d+\b")


class _Noting(TorchDispatchMode):
    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()
        self.number = {id(t): i for i, t in enumerate(inputs)}
        self.kept: list[Any] = list(inputs)  # alive, so that no other tensor gets their ids
        self.given = [(t, t._version) for t in inputs]
        self.symbols: dict[str, int | str] = {}
        self.rows: list[tuple] = []
        self.outside: list[Tensor] = []

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self.number:
                self.number[id(value)] = len(self.number)
                self.kept.append(value)
                self.outside.append(value)
                self.given.append((value, value._version))
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
        return exact(value)

    def renamed(self, value: Any) -> str:
        return SYMBOL.sub(lambda m: f"#{self.symbols.setdefault(m[0], len(self.symbols))}", str(value))

    def kind(self, t: Tensor) -> tuple:
        for name in SYMBOL.findall(str([*t.shape, *t.stride()])):
            self.symbols[name] = name  # of the graph around: no other will do
        sizes = self.renamed([*t.shape, *t.stride()])
        values = None if isinstance(t, FakeTensor) else constant(t)
        return sizes, t.dtype, t.device, t.requires_grad, values

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if any(not issubclass(t, FakeTensor) for t in types if t not in (Tensor, torch.nn.Parameter)):
            return NotImplemented  # a tensor made of others (torchao's float8): what it does with those is noted
        if op is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # two of three calls: autograd asks, and the tensor alone says
        out = op(*args, **(kwargs or {}))
        row: tuple = (op, self.of(args), self.of(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and id(t) not in self.number:
                self.number[id(t)] = len(self.number)
                self.kept.append(t)
            elif not isinstance(t, Tensor):
                row += (self.of(t),)  # a size: which one is known by where it came from
        self.rows.append(row)
        return out


def outline(fn: Callable, inputs: Sequence[Tensor]) -> Outline:
    """Of `fn(*inputs)`, a pytree of tensors, with the gradients that the inputs' requires_grad asks for.

    Raises ValueError where it changes what it did not make: recomputed, it would do so twice.
    """
    noting = _Noting(inputs)
    noting.rows.append(tuple(noting.kind(t) for t in inputs))
    fake = detect_fake_mode(list(inputs))
    fresh = fake.shape_env.ignore_fresh_unbacked_symbols() if fake and fake.shape_env else nullcontext()
    with fresh, noting:
        leaves, spec = tree_flatten(fn(*inputs))
        noting.rows.append((spec, noting.of(leaves)))
        ends = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
        learning = [t for t in (*inputs, *noting.outside) if t.requires_grad]
        if ends and learning:
            above = [torch.empty_like(t) for t in ends]
            noting.rows.append(noting.of(torch.autograd.grad(ends, learning, above, allow_unused=True)))
    for t, version in noting.given:
        if t._version != version:
            kind = f"tensor of {t.dtype} {tuple(t.shape)}"
            raise ValueError(f"a {kind} that comes from outside the layer is changed in place there: return it instead")
    return Outline(tuple(noting.rows), noting.outside)

"""What a model declares of each parameter, once: everything else walks this dictionary."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

# (shape, generator) -> the initial fp32 values, drawn from the generator alone.
Init = Callable[[tuple[int, ...], torch.Generator], Tensor]


def normal(std: float) -> Init:
    return lambda shape, generator: torch.randn(shape, generator=generator) * std


def ones(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.ones(shape)


def zeros(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.zeros(shape)


class Within(NamedTuple):
    """Where a checkpoint keeps a parameter [E, I, H] that it does not hold alone: in the tensor `name`, which is
    [E, rows, H], or [E, H, rows] where it is `turned`, from row `start` on."""

    name: str
    rows: int
    start: int = 0
    turned: bool = False

    def shapes(self, spec: "ParamSpec") -> list[tuple[int, ...]]:
        """The tensor's shape as it is written, then another that is read as well.

        transformers takes a tensor for turned only where its shape says so, and so do we."""
        experts, _, columns = spec.shape
        straight, turned = (experts, self.rows, columns), (experts, columns, self.rows)
        return [turned, straight] if self.turned else [straight]


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of a model.

    shape: the whole tensor's shape, whatever the plan.
    init: draws the initial values.
    decay: whether decoupled weight decay applies (matrices yes, norms and biases no).
    experts: dimension 0 indexes experts; a plan that shards it over `ep` keeps
        the experts where they are and sends the tokens to them.
    active: the fraction of the elements that one token is multiplied with
        (top-k/experts for experts, 0 for a table that is only looked up).
    lr: factor on the learning rate; 0 freezes the parameter: no gradient, no optimizer state, no backward.
    parts: for a parameter stacked along dimension 0, the checkpoint's name of
        each slice; empty when the checkpoint holds the tensor whole, under its own name.
    within: for a parameter that shares a tensor of the checkpoint with its neighbours, where. The parameters of one
        such tensor follow each other, in the order of their rows.
    """

    shape: tuple[int, ...]
    init: Init
    decay: bool = True
    experts: bool = False
    active: float = 1.0
    lr: float = 1.0
    parts: tuple[str, ...] = ()
    within: Within | None = None

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n


Specs = Mapping[str, ParamSpec]  # by name


def trainable(specs: Specs) -> dict[str, ParamSpec]:
    """The parameters that are not frozen."""
    return {name: spec for name, spec in specs.items() if spec.lr}


def stored(specs: Specs) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the model's checkpoint: stacked parameters taken apart, shared tensors whole."""
    out: dict[str, tuple[int, ...]] = {}
    for name, spec in specs.items():
        if spec.within:
            out[spec.within.name] = spec.within.shapes(spec)[0]
        elif spec.parts:
            out.update({part: spec.shape[1:] for part in spec.parts})
        else:
            out[name] = spec.shape
    return out


def to_stored(specs: Specs, tensors: Iterator[Tensor]) -> Iterator[Tensor]:
    """The tensors that `stored` names, in its order, from the parameters' as they arrive."""
    for shared, members in groupby(specs.values(), key=lambda spec: spec.within and spec.within.name):
        if shared is None:
            for spec in members:
                tensor = next(tensors)
                yield from tensor.unbind() if spec.parts else [tensor]
        else:
            members = list(members)
            whole = torch.cat([next(tensors) for _ in members], 1)
            yield whole if whole.shape == members[0].within.shapes(members[0])[0] else whole.transpose(1, 2)

"""What a model declares of each parameter, once: everything else walks this dictionary."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
    """

    shape: tuple[int, ...]
    init: Init
    decay: bool = True
    experts: bool = False
    active: float = 1.0
    lr: float = 1.0
    parts: tuple[str, ...] = ()

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
    """Name -> shape of every tensor in the model's checkpoint, stacked parameters taken apart."""
    out: dict[str, tuple[int, ...]] = {}
    for name, spec in specs.items():
        if spec.parts:
            out.update({part: spec.shape[1:] for part in spec.parts})
        else:
            out[name] = spec.shape
    return out

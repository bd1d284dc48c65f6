"""From an encoder's width to the language model's: a linear layer, then more of them, an activation before each."""

from collections.abc import Callable, Mapping
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from ..ops import Ops
from ..specs import ParamSpec
from . import fields
from .decoder import projection

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu, "silu": F.silu,
}  # fmt: skip


def activation(hf: Mapping, key: str = "hidden_act", default: str = "gelu") -> str:
    """The name of an activation, checked."""
    name = fields.read(hf, key, default)
    if name not in list(ACTIVATIONS):  # a list, because the value may be anything that JSON can hold
        fields.refuse(key, name, f"one of {', '.join(ACTIVATIONS)}")
    return name


def specs(prefix: str, into: int, out: int, depth: int, std: float) -> dict[str, ParamSpec]:
    """`depth` linear layers, all but the first from `out` to `out`."""
    found = projection(f"{prefix}.fc1", out, into, True, std)
    for layer in range(depth - 1):
        found |= projection(f"{prefix}.hidden_layers.{layer}", out, out, True, std)
    return found


def align(p: Mapping[str, Tensor], prefix: str, x: Tensor, depth: int, act: str, ops: Ops) -> Tensor:
    """x [M, into] -> [M, out]."""
    x = ops.linear(x, p[f"{prefix}.fc1.weight"], p[f"{prefix}.fc1.bias"])
    for layer in range(depth - 1):
        at = f"{prefix}.hidden_layers.{layer}"
        x = ops.linear(ACTIVATIONS[act](x), p[f"{at}.weight"], p[f"{at}.bias"])
    return x

"""From an encoder's width to the language model's: a linear layer, then more of them, an activation before each."""

from collections.abc import Mapping

from torch import Tensor

from ..ops import Ops
from ..specs import ParamSpec
from .layers import ACTIVATIONS, project, projection


def specs(prefix: str, into: int, out: int, depth: int, std: float) -> dict[str, ParamSpec]:
    """`depth` linear layers, all but the first from `out` to `out`."""
    found = projection(f"{prefix}.fc1", out, into, True, std)
    for layer in range(depth - 1):
        found |= projection(f"{prefix}.hidden_layers.{layer}", out, out, True, std)
    return found


def align(p: Mapping[str, Tensor], prefix: str, x: Tensor, depth: int, act: str, ops: Ops) -> Tensor:
    """x [M, into] -> [M, out]."""
    x = project(p, f"{prefix}.fc1", x, ops)
    for layer in range(depth - 1):
        x = project(p, f"{prefix}.hidden_layers.{layer}", ACTIVATIONS[act](x), ops)
    return x

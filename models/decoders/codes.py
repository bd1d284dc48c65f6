"""Images to draw, as the discrete codes of a VQ model: hidden states -> the next code's logits and their loss.

Checked against transformers' Janus (`generation_head`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...loss import IGNORE, cross_entropy
from ...ops import Ops
from ...specs import ParamSpec
from .. import fields
from ..layers import ACTIVATIONS, activation, project, projection

TINY = {"num_embeddings": 37, "projection_dim": 12}


@dataclass(frozen=True, kw_only=True)
class CodesConfig:
    codes: int  # in the codebook
    inner: int
    act: str
    std: float


def config(hf: Mapping) -> CodesConfig:
    """From Janus's `vq_config`; what is absent is as transformers has it."""
    return CodesConfig(
        codes=fields.size(hf, "num_embeddings", 16384),
        inner=fields.size(hf, "projection_dim", 2048),
        act=activation(hf),
        std=fields.number(hf, "initializer_range", 0.02),
    )


def width(cfg: CodesConfig, into: int) -> int:
    """Of the stream, whatever comes in."""
    return cfg.inner


def specs(cfg: CodesConfig, prefix: str, width: int) -> dict[str, ParamSpec]:
    return {
        **projection(f"{prefix}.proj_out", cfg.inner, width, True, cfg.std),
        **projection(f"{prefix}.vision_head", cfg.codes, cfg.inner, True, cfg.std),
    }


def stream(p: Mapping[str, Tensor], prefix: str, x: Tensor, cfg: CodesConfig, ops: Ops) -> Tensor:
    """x [..., H] -> [..., inner], of which the logits are a linear function."""
    return ACTIVATIONS[cfg.act](project(p, f"{prefix}.proj_out", x, ops))


def logits(p: Mapping[str, Tensor], prefix: str, x: Tensor, cfg: CodesConfig, ops: Ops) -> Tensor:
    """x [..., H] -> [..., codes]."""
    return project(p, f"{prefix}.vision_head", stream(p, prefix, x, cfg, ops), ops)


def decode(
    p: Mapping[str, Tensor], prefix: str, x: Tensor, targets: Mapping[str, Tensor], cfg: CodesConfig, ops: Ops
) -> tuple[Tensor, Tensor]:
    """x [B, S, H], targets: labels [B, S], the code that comes next or -100 -> (stream [B, S, inner], the summed
    cross-entropy in fp32)."""
    y = stream(p, prefix, x, cfg, ops)
    # The bias as one more column: the loss never holds all logits, and so takes what they are a product of.
    weight = torch.cat([p[f"{prefix}.vision_head.weight"], p[f"{prefix}.vision_head.bias"][:, None]], 1)
    return y, cross_entropy(F.pad(y, (0, 1), value=1.0), weight.to(y.dtype), targets["labels"])


def blank(cfg: CodesConfig, shape: tuple[int, int]) -> dict[str, Tensor]:
    """No targets."""
    return {"labels": torch.full(shape, IGNORE)}


def example(cfg: CodesConfig, generator: torch.Generator, shape: tuple[int, int]) -> dict[str, Tensor]:
    labels = torch.randint(cfg.codes, shape, generator=generator)
    return {"labels": labels.masked_fill(torch.rand(shape, generator=generator) < 0.5, IGNORE)}

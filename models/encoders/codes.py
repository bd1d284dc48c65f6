"""Images already drawn, as the discrete codes of a VQ model: an embedding of each, and an aligner behind it.

Checked against transformers' Janus (`prepare_embeddings_for_image_generation`). One output for each code.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...items import Item
from ...ops import Ops
from ...specs import ParamSpec, normal
from .. import aligner, fields
from ..layers import activation

TINY = {"num_embeddings": 37, "embed_dim": 6, "projection_dim": 20}


@dataclass(frozen=True, kw_only=True)
class CodesConfig:
    codes: int  # in the codebook
    embed: int  # of a code's embedding
    width: int  # of its outputs, the aligner's
    depth: int  # the aligner's layers
    act: str
    std: float


def config(hf: Mapping) -> CodesConfig:
    """From Janus's `vq_config`; what is absent is as transformers has it."""
    return CodesConfig(
        codes=fields.size(hf, "num_embeddings", 16384),
        embed=fields.size(hf, "embed_dim", 8),
        width=fields.size(hf, "projection_dim", 2048),
        depth=fields.size(hf, "num_hidden_layers", 2),
        act=activation(hf),
        std=fields.number(hf, "initializer_range", 0.02),
    )


def specs(cfg: CodesConfig, prefix: str) -> dict[str, ParamSpec]:
    table = {f"{prefix}.generation_embeddings.weight": ParamSpec((cfg.codes, cfg.embed), normal(cfg.std), active=0.0)}
    return table | aligner.specs(f"{prefix}.generation_aligner", cfg.embed, cfg.width, cfg.depth, cfg.std)


def encode(p: Mapping[str, Tensor], prefix: str, x: Mapping[str, Tensor], cfg: CodesConfig, ops: Ops) -> Tensor:
    """x: codes [...] -> [..., width]."""
    y = F.embedding(x["codes"], p[f"{prefix}.generation_embeddings.weight"])
    return aligner.align(p, f"{prefix}.generation_aligner", y, cfg.depth, cfg.act, ops)


def items(raw: Tensor, cfg: CodesConfig) -> list[Item]:
    """One image's codes [n]. Raises ValueError for a code that is not in the codebook."""
    raw = torch.as_tensor(raw).long()
    if len(raw) and not 0 <= int(raw.min()) <= int(raw.max()) < cfg.codes:
        raise ValueError(f"image codes from {int(raw.min())} to {int(raw.max())}: they must be 0 to {cfg.codes - 1}")
    return [Item({"codes": raw}, torch.arange(len(raw)))]


def example(cfg: CodesConfig, generator: torch.Generator, n: int = 9) -> Tensor:
    return torch.randint(cfg.codes, (n,), generator=generator)


def blank(cfg: CodesConfig) -> Item:
    return Item({"codes": torch.zeros(1, dtype=torch.long)}, torch.full((1,), -1))

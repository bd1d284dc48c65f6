"""Whisper's encoder (arXiv 2212.04356), for sounds of any length up to its thirty seconds.
Checked against transformers' `WhisperEncoder`.

An item is one sound, filled up to a multiple of 2 * `stack` frames. A convolution halves the frames, and `stack` of the
encoder's outputs, one after the other, are one output of ours: so a language model reads fewer of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...items import Item
from ...ops import Ops
from ...specs import ParamSpec, normal
from .. import fields
from . import qwen2_5_audio
from .qwen2_5_audio import (  # noqa: F401 - sounds are read alike
    convolution_specs, convolved, layer_norm, layer_specs, layers, load, spectrogram,
)  # fmt: skip

TINY = qwen2_5_audio.TINY | {"max_source_positions": 20, "stack": 2}


@dataclass(frozen=True, kw_only=True)
class WhisperConfig:
    layers: int
    hidden: int
    inner: int
    heads: int
    mels: int
    positions: int
    stack: int
    std: float
    rate: int = 16_000  # samples of a sound, a second

    @property
    def width(self) -> int:
        """Of the outputs."""
        return self.stack * self.hidden


def config(hf: Mapping) -> WhisperConfig:
    """From Whisper's config.json, and `stack`. Raises ValueError, naming key and value, for what is impossible."""
    same = qwen2_5_audio.common({"d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6,
                                 "encoder_ffn_dim": 1536, "num_mel_bins": 80, **hf}, 100)  # fmt: skip
    return WhisperConfig(
        **{key: value for key, value in same.items() if key not in ("width", "chunk")},
        positions=fields.size(hf, "max_source_positions", 1500),
        stack=fields.size(hf, "stack", 1),
    )


def specs(cfg: WhisperConfig, prefix: str) -> dict[str, ParamSpec]:
    # Sinusoids that Whisper does not train: the checkpoint holds them nevertheless.
    table = ParamSpec((cfg.positions, cfg.hidden), normal(cfg.std), active=0.0, lr=0.0)
    out = convolution_specs(cfg, prefix) | {f"{prefix}.embed_positions.weight": table}
    return out | layer_specs(cfg, prefix, k_bias=False, norm="layer_norm")


def encode(p: Mapping[str, Tensor], prefix: str, x: Mapping[str, Tensor], cfg: WhisperConfig, ops: Ops) -> Tensor:
    """x: features [P, mels], position [P] (the frame's in its sound, -1: filled up), item [P]
    -> [P / (2 * stack), stack * hidden]."""
    h = convolved(p, prefix, x, ops)
    position, item = x["position"][::2], x["item"][::2]
    h = h + F.embedding(position.clamp(min=0) // 2, p[f"{prefix}.embed_positions.weight"]).to(h.dtype)
    h = layers(p, prefix, h, item, position >= 0, cfg, ops)
    h = layer_norm(p, f"{prefix}.layer_norm", h) * (position >= 0)[:, None]
    return h.unflatten(0, (-1, cfg.stack)).flatten(1)


def blank(cfg: WhisperConfig) -> Item:
    frames = 2 * cfg.stack
    return Item({"features": torch.zeros(frames, cfg.mels), "position": torch.full((frames,), -1)}, torch.tensor([-1]))


def items(raw, cfg: WhisperConfig) -> list[Item]:
    """A log-mel spectrogram [frames, mels] -> its one item. Raises ValueError for another shape, or a longer sound."""
    raw = spectrogram(raw, cfg)
    if not 0 < len(raw) <= 2 * cfg.positions:
        raise ValueError(f"a spectrogram of {len(raw)} frames: it must have 1 to {2 * cfg.positions}")
    more = -len(raw) % (2 * cfg.stack)
    position = F.pad(torch.arange(len(raw)), (0, more), value=-1)
    outputs = torch.arange(len(position) // (2 * cfg.stack))
    return [Item({"features": F.pad(raw, (0, 0, 0, more)), "position": position}, outputs)]


def example(cfg: WhisperConfig, generator: torch.Generator) -> Tensor:
    """A random spectrogram [frames, mels]."""
    frames = int(torch.randint(1, min(8 * cfg.stack, 2 * cfg.positions) + 1, (), generator=generator))
    return torch.randn(frames, cfg.mels, generator=generator)

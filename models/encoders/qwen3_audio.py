"""Qwen3-Omni's audio tower (arXiv 2509.17765): three convolutions over time and pitch in chunks of a second, then
Whisper's layers over windows of several chunks. Checked against transformers' `Qwen3OmniMoeAudioEncoder`.

An item is a window. Its chunks are filled up to a multiple of 8 frames, of which an output is made. P frames of all
items, H hidden, C channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...items import Item
from ...ops import Ops
from ...specs import ParamSpec, normal, zeros
from .. import fields
from ..layers import project, projection
from . import qwen2_5_audio
from .qwen2_5_audio import (  # noqa: F401 - samples are alike
    example, layer_norm, layer_specs, layers, load, reaches, sinusoids, spectrogram,
)  # fmt: skip

FRAMES = 8  # of the spectrogram, that make one output
TINY = qwen2_5_audio.TINY | {"downsample_hidden_size": 4, "n_window_infer": 40}


@dataclass(frozen=True, kw_only=True)
class AudioConfig(qwen2_5_audio.AudioConfig):
    channels: int
    window: int  # chunks

    @property
    def pitches(self) -> int:
        """What the convolutions leave of the spectrogram's bins."""
        return -(-self.mels // FRAMES)


def config(hf: Mapping) -> AudioConfig:
    """From an `audio_config`. Raises ValueError, naming key and value, for what is missing or impossible."""
    same = qwen2_5_audio.common(hf, 50)
    window = fields.size(hf, "n_window_infer", 800)
    if window < same["chunk"]:
        fields.refuse("n_window_infer", window, f"at least {same['chunk']}, the frames of a chunk")
    reaches(hf, -(-same["chunk"] // FRAMES))
    channels = fields.size(hf, "downsample_hidden_size", 480)
    return AudioConfig(channels=channels, window=window // same["chunk"], **same)


def specs(cfg: AudioConfig, prefix: str) -> dict[str, ParamSpec]:
    H, std = cfg.hidden, cfg.std
    out = {}
    for layer, into in enumerate((1, cfg.channels, cfg.channels), 1):
        out[f"{prefix}.conv2d{layer}.weight"] = ParamSpec((cfg.channels, into, 3, 3), normal(std))
        out[f"{prefix}.conv2d{layer}.bias"] = ParamSpec((cfg.channels,), zeros, decay=False)
    out |= projection(f"{prefix}.conv_out", H, cfg.channels * cfg.pitches, False, std)
    out |= layer_specs(cfg, prefix, k_bias=True) | projection(f"{prefix}.proj1", H, H, True, std)
    return out | projection(f"{prefix}.proj2", cfg.width, H, True, std)


def encode(p: Mapping[str, Tensor], prefix: str, x: Mapping[str, Tensor], cfg: AudioConfig, ops: Ops) -> Tensor:
    """x: features [P, mels], position [P] (the frame's in its chunk; -1: silence, -2: nothing), item [P]
    -> [P / 8, width]."""
    position = x["position"]
    h = x["features"][..., None].to(p[f"{prefix}.conv2d1.weight"].dtype)
    for layer in (1, 2, 3):
        position = position[::2]
        name = f"{prefix}.conv2d{layer}"
        h = _convolved(h, position == 0, p[f"{name}.weight"], p[f"{name}.bias"], ops)
        h = h * (position > -2)[:, None, None]
    h = project(p, f"{prefix}.conv_out", h.transpose(1, 2).flatten(1), ops)
    h = h + sinusoids(position // FRAMES, cfg.hidden).to(h.dtype)
    h = layers(p, prefix, h, x["item"][::FRAMES], position >= 0, cfg, ops)
    h = F.gelu(project(p, f"{prefix}.proj1", layer_norm(p, f"{prefix}.ln_post", h), ops))
    return project(p, f"{prefix}.proj2", h, ops)


def _convolved(x: Tensor, first: Tensor, weight: Tensor, bias: Tensor, ops: Ops) -> Tensor:
    """Every second frame and pitch with its neighbours, gelu: x [P, F, C], weight [out, C, 3, 3] (pitch, time),
    first [P / 2] where a chunk begins -> [P / 2, ceil(F / 2), out]."""
    even, odd = x.unflatten(0, (-1, 2)).unbind(1)
    before = F.pad(odd[:-1], (0, 0, 0, 0, 1, 0)) * ~first[:, None, None]
    near = F.pad(torch.stack([before, even, odd], -1), (0, 0, 0, 0, 1, 1)).unfold(1, 3, 2)
    return F.gelu(ops.linear(near.transpose(-1, -2).flatten(-3), weight.flatten(1), bias))


def blank(cfg: AudioConfig) -> Item:
    return Item({"features": torch.zeros(FRAMES, cfg.mels), "position": torch.full((FRAMES,), -2)}, torch.tensor([-1]))


def outputs(frames: int, cfg: AudioConfig) -> int:
    """How many outputs, and so placeholder tokens, a sound of so many frames has."""
    whole, rest = divmod(frames, cfg.chunk)
    return whole * -(-cfg.chunk // FRAMES) + -(-rest // FRAMES)


def items(raw: Tensor, cfg: AudioConfig) -> list[Item]:
    """A log-mel spectrogram [frames, mels] -> an item for each window. Raises ValueError for another shape."""
    return from_processor([raw], cfg)


def from_processor(sounds: list[Tensor], cfg: AudioConfig) -> list[Item]:
    """Spectrograms [frames, mels], each without padding -> an item for each window, slots counting on through all.

    As in transformers, a chunk is followed by silence up to the longest chunk of all that are given together: the
    convolutions' biases are heard in it. It matters to what is shorter than a chunk in all.
    """
    sounds = [spectrogram(sound, cfg) for sound in sounds]
    longest = min(cfg.chunk, max((len(sound) for sound in sounds), default=0))
    out, first = [], 0
    for sound in sounds:
        for window in sound.split(cfg.chunk * cfg.window):
            chunks = [_chunk(chunk, longest) for chunk in window.split(cfg.chunk) if len(chunk)]
            if chunks:
                known = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
                n = outputs(len(window), cfg)
                slots = F.pad(first + torch.arange(n), (0, len(known["position"]) // FRAMES - n), value=-1)
                out.append(Item(known, slots))
                first += n
    return out


def _chunk(chunk: Tensor, longest: int) -> dict[str, Tensor]:
    L, silence, nothing = len(chunk), longest - len(chunk), -longest % FRAMES
    position = F.pad(F.pad(torch.arange(L), (0, silence), value=-1), (0, nothing), value=-2)
    return {"features": F.pad(chunk, (0, 0, 0, silence + nothing)), "position": position}

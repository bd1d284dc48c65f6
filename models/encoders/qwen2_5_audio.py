"""Qwen2.5-Omni's audio tower (arXiv 2503.20215): Whisper's encoder over chunks of two seconds, two frames then
averaged. Checked against transformers' `Qwen2_5OmniAudioEncoder`.

An item is a chunk, its last frames filled up to a multiple of 4, of which an output is made. A convolution halves the
frames. P frames of all items, H hidden, N heads, D head size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...items import Item
from ...ops import Ops
from ...specs import ParamSpec, normal, zeros
from .. import fields
from ..layers import layer_norm, norm_specs, project, projection

FRAMES = 4  # of the spectrogram, that make one output
TINY = {
    "d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 40, "num_mel_bins": 11,
    "n_window": 10, "output_dim": 20,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    layers: int
    hidden: int
    inner: int
    heads: int
    width: int  # of the outputs
    mels: int
    chunk: int  # frames
    std: float
    rate: int = 16_000  # samples of a sound, a second


def config(hf: Mapping) -> AudioConfig:
    """From an `audio_config`. Raises ValueError, naming key and value, for what is missing or impossible."""
    found = AudioConfig(**common(hf, 100))
    if found.chunk % FRAMES:
        fields.refuse("n_window", found.chunk // 2, "even, because pairs of its frames are averaged")
    reaches(hf, found.chunk // 2)
    return found


def common(hf: Mapping, window: int) -> dict:
    """What both of Qwen's audio towers read; window: the default of `n_window`."""
    hidden, heads = fields.size(hf, "d_model", 1280), fields.size(hf, "encoder_attention_heads", 20)
    if hidden % heads or hidden % 2 or hidden < 4:
        fields.refuse("d_model", hidden, f"an even multiple of encoder_attention_heads = {heads}, at least 4")
    if fields.read(hf, "activation_function", "gelu") != "gelu":
        fields.refuse("activation_function", hf["activation_function"], "'gelu'")
    for key in ("dropout", "attention_dropout", "activation_dropout"):
        if fields.read(hf, key, 0) != 0:
            fields.refuse(key, hf[key], "0: dropout is not implemented")
    if fields.flag(hf, "scale_embedding", False):
        fields.refuse("scale_embedding", True, "false")
    return {
        "layers": fields.size(hf, "encoder_layers", 32),
        "hidden": hidden,
        "inner": fields.size(hf, "encoder_ffn_dim", 5120),
        "heads": heads,
        "width": fields.size(hf, "output_dim", 3584),
        "mels": fields.size(hf, "num_mel_bins", 128),
        "chunk": 2 * fields.size(hf, "n_window", window),
        "std": fields.number(hf, "initializer_range", 0.02),
    }


def reaches(hf: Mapping, positions: int) -> None:
    most = fields.size(hf, "max_source_positions", 1500)
    if most < positions:
        fields.refuse("max_source_positions", most, f"at least {positions}, the positions of a chunk")


def convolution_specs(cfg: AudioConfig, prefix: str) -> dict[str, ParamSpec]:
    """Of the two convolutions over time, three frames wide."""
    out = {}
    for name, into in (("conv1", cfg.mels), ("conv2", cfg.hidden)):
        out[f"{prefix}.{name}.weight"] = ParamSpec((cfg.hidden, into, 3), normal(cfg.std))
        out[f"{prefix}.{name}.bias"] = ParamSpec((cfg.hidden,), zeros, decay=False)
    return out


def layer_specs(cfg: AudioConfig, prefix: str, k_bias: bool, norm: str = "ln_post") -> dict[str, ParamSpec]:
    """norm: the name of the one behind the layers."""
    out, H = {}, cfg.hidden
    for layer in range(cfg.layers):
        at = f"{prefix}.layers.{layer}"
        for name in ("q", "k", "v", "out"):
            out |= projection(f"{at}.self_attn.{name}_proj", H, H, k_bias or name != "k", cfg.std)
        out |= norm_specs(f"{at}.self_attn_layer_norm", H) | norm_specs(f"{at}.final_layer_norm", H)
        out |= projection(f"{at}.fc1", cfg.inner, H, True, cfg.std)
        out |= projection(f"{at}.fc2", H, cfg.inner, True, cfg.std)
    return out | norm_specs(f"{prefix}.{norm}", H)


def specs(cfg: AudioConfig, prefix: str) -> dict[str, ParamSpec]:
    H, std = cfg.hidden, cfg.std
    out = convolution_specs(cfg, prefix)
    # For the marks around a sound, which the published models have as tokens of text: nothing reads it.
    out[f"{prefix}.audio_bos_eos_token.weight"] = ParamSpec((2, cfg.width), normal(std), active=0.0, lr=0.0)
    return out | layer_specs(cfg, prefix, k_bias=False) | projection(f"{prefix}.proj", cfg.width, H, True, std)


def encode(p: Mapping[str, Tensor], prefix: str, x: Mapping[str, Tensor], cfg: AudioConfig, ops: Ops) -> Tensor:
    """x: features [P, mels], position [P] (the frame's in its chunk, -1: filled up), item [P] -> [P / 4, width]."""
    h = convolved(p, prefix, x, ops)
    position, item = x["position"][::2], x["item"][::2]
    h = h + sinusoids(position // 2, cfg.hidden).to(h.dtype)
    h = layers(p, prefix, h, item, position >= 0, cfg, ops)
    h = h.unflatten(0, (-1, 2)).mean(1)
    return project(p, f"{prefix}.proj", layer_norm(p, f"{prefix}.ln_post", h), ops)


def convolved(p: Mapping[str, Tensor], prefix: str, x: Mapping[str, Tensor], ops: Ops) -> Tensor:
    """Whisper's two convolutions, each within its item: features [P, mels] -> [P / 2, H]."""
    item = x["item"]
    weight, bias = p[f"{prefix}.conv1.weight"], p[f"{prefix}.conv1.bias"]
    h = x["features"].to(weight.dtype)
    same = item[1:] == item[:-1]
    before = F.pad(h[:-1] * same[:, None], (0, 0, 1, 0))
    after = F.pad(h[1:] * same[:, None], (0, 0, 0, 1))
    h = F.gelu(ops.linear(torch.stack([before, h, after], -1).flatten(1), weight.flatten(1), bias))
    h = h * (x["position"] >= 0)[:, None]

    even, odd = h.unflatten(0, (-1, 2)).unbind(1)
    before = F.pad(odd[:-1] * same[1::2, None], (0, 0, 1, 0))
    weight, bias = p[f"{prefix}.conv2.weight"], p[f"{prefix}.conv2.bias"]
    return F.gelu(ops.linear(torch.stack([before, even, odd], -1).flatten(1), weight.flatten(1), bias))


def sinusoids(position: Tensor, size: int) -> Tensor:
    """[P] -> [P, size]: sines, then cosines, of size / 2 frequencies from 1 to 1 / 10000 each."""
    step = 9.210340371976184 / (size // 2 - 1)  # log 10000
    angles = position[:, None] * torch.exp(-step * torch.arange(size // 2, device=position.device).float())
    return torch.cat([angles.sin(), angles.cos()], 1)


def layers(p, prefix: str, h: Tensor, item: Tensor, valid: Tensor, cfg: AudioConfig, ops: Ops) -> Tensor:
    """Whisper's layers: h [P, H]; the valid positions of an item see each other."""
    mask = ops.local_mask((2 * item + ~valid)[None])  # what an item is filled up with stands at its end

    def block(q, h, layer):
        y = layer_norm(q, "self_attn_layer_norm", h)
        query, key, value = (project(q, f"self_attn.{n}_proj", y, ops).unflatten(-1, (cfg.heads, -1)) for n in "qkv")
        seen = ops.local_attention(query[None], key[None], value[None], mask)[0].flatten(1)
        h = h + project(q, "self_attn.out_proj", seen, ops)
        y = F.gelu(project(q, "fc1", layer_norm(q, "final_layer_norm", h), ops))
        return h + project(q, "fc2", y, ops), None

    return ops.scan(block, p, f"{prefix}.layers", cfg.layers, h)[0]


def blank(cfg: AudioConfig) -> Item:
    return Item({"features": torch.zeros(FRAMES, cfg.mels), "position": torch.full((FRAMES,), -1)}, torch.tensor([-1]))


def outputs(frames: int, cfg: AudioConfig) -> int:
    """How many outputs, and so placeholder tokens, a sound of so many frames has."""
    return -(-frames // 2) // 2


def items(raw: Tensor, cfg: AudioConfig) -> list[Item]:
    """A log-mel spectrogram [frames, mels] -> an item for each chunk. Raises ValueError for another shape."""
    return from_processor([raw], cfg)


def spectrogram(raw: Tensor, cfg: AudioConfig) -> Tensor:
    """`raw` in fp32. Raises ValueError where it is not [frames, mels]."""
    raw = torch.as_tensor(raw)
    if raw.ndim != 2 or raw.shape[1] != cfg.mels:
        raise ValueError(f"a spectrogram of {list(raw.shape)}: it must be [frames, {cfg.mels}], of num_mel_bins")
    return raw.float()


def from_processor(sounds: list[Tensor], cfg: AudioConfig) -> list[Item]:
    """Spectrograms [frames, mels], each without padding -> an item for each chunk, slots counting on through all."""
    out, first = [], 0
    for sound in sounds:
        for chunk in spectrogram(sound, cfg).split(cfg.chunk):
            L, n = len(chunk), outputs(len(chunk), cfg)
            more = -L % FRAMES
            known = {"features": F.pad(chunk, (0, 0, 0, more)), "position": F.pad(torch.arange(L), (0, more), value=-1)}
            if L:
                out.append(Item(known, F.pad(first + torch.arange(n), (0, (L + more) // FRAMES - n), value=-1)))
            first += n
    return out


def load(sound, cfg: AudioConfig) -> Tensor:
    """A sound's samples, `rate` of them a second, in [-1, 1] -> its log-mel spectrogram [frames, mels]."""
    found = _extractor(cfg.mels)(np.asarray(sound), sampling_rate=cfg.rate, padding=False, return_tensors="pt")
    return found["input_features"][0].T


@cache
def _extractor(mels: int):
    from transformers import WhisperFeatureExtractor  # seconds to import

    return WhisperFeatureExtractor(feature_size=mels)


def example(cfg: AudioConfig, generator: torch.Generator) -> Tensor:
    """A random spectrogram [frames, mels], of up to three chunks."""
    frames = FRAMES + int(torch.randint(3 * cfg.chunk, (), generator=generator))
    return torch.randn(frames, cfg.mels, generator=generator)

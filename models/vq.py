"""A VQ-VAE with a convolutional encoder and decoder (arXiv 2203.13131): pixels to discrete codes, and back.

Checked against transformers' `JanusVQVAE`. It is frozen and no part of a forward: pixels become codes before training,
and codes become pixels after drawing. B images, C channels, n = h * w codes an image, row by row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from ..ops import layer_params
from ..specs import Init, ParamSpec, normal, ones, zeros
from . import fields

GROUPS, EPS = 32, 1e-6  # of the norms


@dataclass(frozen=True, kw_only=True)
class VqConfig:
    codes: int  # in the codebook
    width: int  # of a code's vector
    latent: int
    base: int
    multipliers: tuple[int, ...]  # of `base`, at each resolution; the next one's pixels are twice as wide
    blocks: int  # at each resolution
    into: int  # channels
    out: int  # channels
    std: float


def vq_config(hf: Mapping) -> VqConfig:
    """From Janus's `vq_config`; what is absent is as transformers has it."""
    base = fields.size(hf, "base_channels", 128)
    multipliers = fields.read(hf, "channel_multiplier", (1, 1, 2, 2, 4))
    whole = isinstance(multipliers, (list, tuple)) and multipliers
    if not whole or any(type(m) is not int or m < 1 for m in multipliers):
        fields.refuse("channel_multiplier", multipliers, "a list of positive integers")
    if base % GROUPS:
        fields.refuse("base_channels", base, f"a multiple of {GROUPS}, the groups of its norms")
    if fields.flag(hf, "double_latent", False):
        fields.refuse("double_latent", True, "false: it is not implemented")
    if fields.read(hf, "dropout", 0) != 0:
        fields.refuse("dropout", hf["dropout"], "0: dropout is not implemented")
    return VqConfig(
        codes=fields.size(hf, "num_embeddings", 16384),
        width=fields.size(hf, "embed_dim", 8),
        latent=fields.size(hf, "latent_channels", 256),
        base=base,
        multipliers=tuple(multipliers),
        blocks=fields.size(hf, "num_res_blocks", 2),
        into=fields.size(hf, "in_channels", 3),
        out=fields.size(hf, "out_channels", 3),
        std=fields.number(hf, "initializer_range", 0.02),
    )


# A net is a list of steps: kind, name, channels in, channels out.
Step = tuple[str, str, int, int]


def _middle(name: str, width: int) -> list[Step]:
    kinds = {"block_1": "residual", "attn_1": "attention", "block_2": "residual"}
    return [(kind, f"{name}.mid.{part}", width, width) for part, kind in kinds.items()]


def _level(name: str, blocks: int, into: int, out: int, attends: bool) -> list[Step]:
    steps: list[Step] = []
    for i in range(blocks):
        steps.append(("residual", f"{name}.block.{i}", out if i else into, out))
        if attends:
            steps.append(("attention", f"{name}.attn.{i}", out, out))
    return steps


def encoder(cfg: VqConfig) -> list[Step]:
    width, last = cfg.base, len(cfg.multipliers) - 1
    steps: list[Step] = [("conv", "encoder.conv_in", cfg.into, width)]
    for level, times in enumerate(cfg.multipliers):
        name = f"encoder.down.{level}"
        steps += _level(name, cfg.blocks, width, cfg.base * times, level == last)
        width = cfg.base * times
        if level < last:
            steps.append(("down", f"{name}.downsample.conv", width, width))
    steps += _middle("encoder", width)
    steps += [("norm", "encoder.norm_out", width, width), ("conv", "encoder.conv_out", width, cfg.latent)]
    return [*steps, ("point", "quant_conv", cfg.latent, cfg.width)]


def decoder(cfg: VqConfig) -> list[Step]:
    width, last = cfg.base * cfg.multipliers[-1], len(cfg.multipliers) - 1
    steps: list[Step] = [("point", "post_quant_conv", cfg.width, cfg.latent)]
    steps += [("conv", "decoder.conv_in", cfg.latent, width), *_middle("decoder", width)]
    for level, times in enumerate(reversed(cfg.multipliers)):
        name = f"decoder.up.{level}"
        steps += _level(name, cfg.blocks + 1, width, cfg.base * times, level == 0)
        width = cfg.base * times
        if level < last:
            steps.append(("up", f"{name}.upsample.conv", width, width))
    return [*steps, ("norm", "decoder.norm_out", width, width), ("conv", "decoder.conv_out", width, cfg.out)]


def _parts(kind: str, into: int, out: int) -> dict[str, tuple[int, ...]]:
    """The weights that a step has, by their names below its own; each has a bias besides."""
    if kind == "residual":
        parts = {"norm1": (into,), "conv1": (out, into, 3, 3), "norm2": (out,), "conv2": (out, out, 3, 3)}
        return parts if into == out else parts | {"nin_shortcut": (out, into, 1, 1)}
    if kind == "attention":
        return {"norm": (into,)} | {name: (into, into, 1, 1) for name in ("q", "k", "v", "proj_out")}
    return {"": {"norm": (into,), "point": (out, into, 1, 1)}.get(kind, (out, into, 3, 3))}


def specs(cfg: VqConfig, prefix: str) -> dict[str, ParamSpec]:
    frozen = partial(ParamSpec, decay=False, active=0.0, lr=0.0)
    out = {f"{prefix}.quantize.embedding.weight": frozen((cfg.codes, cfg.width), normal(1.0))}
    for kind, name, into, width in encoder(cfg) + decoder(cfg):
        for part, shape in _parts(kind, into, width).items():
            at = f"{prefix}.{name}.{part}".rstrip(".")
            init: Init = ones if len(shape) == 1 else normal(cfg.std)
            out |= {f"{at}.weight": frozen(shape, init), f"{at}.bias": frozen(shape[:1], zeros)}
    return out


def _norm(q: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, GROUPS, q[f"{name}weight"], q[f"{name}bias"], EPS)


def _conv(q: Mapping[str, Tensor], name: str, x: Tensor, stride: int = 1, padding: int | str = "same") -> Tensor:
    return F.conv2d(x, q[f"{name}weight"], q[f"{name}bias"], stride, padding)


def _residual(q: Mapping[str, Tensor], x: Tensor) -> Tensor:
    y = _conv(q, "conv1.", F.silu(_norm(q, "norm1.", x)))
    y = _conv(q, "conv2.", F.silu(_norm(q, "norm2.", y)))
    return y + (_conv(q, "nin_shortcut.", x) if "nin_shortcut.weight" in q else x)


def _attention(q: Mapping[str, Tensor], x: Tensor) -> Tensor:
    y = _norm(q, "norm.", x)
    query, key, value = (_conv(q, f"{name}.", y).flatten(2).transpose(1, 2) for name in "qkv")
    seen = F.scaled_dot_product_attention(query, key, value)
    return x + _conv(q, "proj_out.", seen.transpose(1, 2).unflatten(2, x.shape[2:]))


STEPS = {
    "residual": _residual,
    "attention": _attention,
    "norm": lambda q, x: F.silu(_norm(q, "", x)),
    "conv": lambda q, x: _conv(q, "", x),
    "point": lambda q, x: _conv(q, "", x),
    "down": lambda q, x: _conv(q, "", F.pad(x, (0, 1, 0, 1)), 2, 0),
    "up": lambda q, x: _conv(q, "", F.interpolate(x, scale_factor=2.0, mode="nearest")),
}


def _run(steps: list[Step], p: Mapping[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    for kind, name, _, _ in steps:
        x = STEPS[kind](layer_params(p, f"{prefix}.{name}"), x)
    return x


def latents(p: Mapping[str, Tensor], prefix: str, pixels: Tensor, cfg: VqConfig) -> Tensor:
    """pixels [B, C, H, W], as the processor gives them -> [B, h, w, width], what codes are chosen by."""
    return _run(encoder(cfg), p, prefix, pixels).permute(0, 2, 3, 1)


def encode(p: Mapping[str, Tensor], prefix: str, pixels: Tensor, cfg: VqConfig, cosine: bool = True) -> Tensor:
    """pixels [B, C, H, W], as the processor gives them -> codes [B, n].

    cosine: the code whose direction is nearest, as Janus was trained and as its codes are decoded;
    otherwise the code whose vector is nearest, which is what transformers' `encode` gives.
    """
    z, table = latents(p, prefix, pixels, cfg), p[f"{prefix}.quantize.embedding.weight"]
    if cosine:
        z, table = F.normalize(z, dim=-1), F.normalize(table, dim=-1)
    distance = table.square().sum(-1) - 2 * z.flatten(1, 2) @ table.T
    return distance.argmin(-1)


def decode(p: Mapping[str, Tensor], prefix: str, codes: Tensor, cfg: VqConfig) -> Tensor:
    """codes [B, n] of square images, or [B, h, w] -> pixels [B, C, H, W].

    Raises ValueError where n is no square.
    """
    if codes.ndim == 2:
        side = round(codes.shape[1] ** 0.5)
        if side**2 != codes.shape[1]:
            raise ValueError(f"{codes.shape[1]} codes of an image: they must be a square, or come as [B, h, w]")
        codes = codes.unflatten(1, (side, side))
    z = F.normalize(F.embedding(codes, p[f"{prefix}.quantize.embedding.weight"]), dim=-1)
    return _run(decoder(cfg), p, prefix, z.permute(0, 3, 1, 2))

"""Wan 2.1's diffusion transformer (arXiv 2503.20314): text to images and video, trained by flow matching. Checked
against diffusers' `WanTransformer3DModel`.

B rows, one image or video each; S tokens a row, each a patch of pt x ph x pw latents of C channels; H hidden, N heads,
D head size, L tokens of the text's embeddings. A token's F = C * pt * ph * pw numbers lie in this order.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import Ops, Output
from ..specs import ParamSpec, normal
from . import fields, flow, layers
from .layers import norm_specs, project, rms_norm
from .mrope import grid

CLASS_NAME = "WanTransformer3DModel"  # diffusers' configs have it in place of a model_type
THETA = 10_000.0  # of the rotary embedding and of the time's
TIMES = 1000  # the model is told the time in thousandths
CONDITION = "condition_embedder"


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    layers: int
    heads: int
    head_dim: int
    inner: int  # of the MLP
    channels: int  # of the latents
    patch: tuple[int, int, int]  # latents of time, height and width that make a token
    text: int  # size of the text's embeddings
    frequencies: int  # the time is told as so many cosines and sines
    cross_norm: bool  # whether there is a norm before the attention to the text
    eps: float  # of the norms
    max_positions: int  # tokens along each of time, height and width
    vocab: int = 0

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def features(self) -> int:
        return self.channels * math.prod(self.patch)


def config(hf: Mapping) -> WanConfig:
    """From diffusers' config.json. Raises ValueError for what is impossible, or not text to image or video."""
    for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
        if hf.get(key) is not None:
            fields.refuse(key, hf[key], "null: image to video is not implemented")
    channels = fields.size(hf, "in_channels", 16)
    if fields.size(hf, "out_channels", channels) != channels:
        fields.refuse(
            "out_channels", hf["out_channels"], f"in_channels = {channels}: image to video is not implemented"
        )
    if fields.read(hf, "qk_norm", "rms_norm_across_heads") != "rms_norm_across_heads":
        fields.refuse("qk_norm", hf["qk_norm"], "'rms_norm_across_heads'")
    patch = fields.read(hf, "patch_size", (1, 2, 2))
    whole = isinstance(patch, (list, tuple)) and all(type(n) is int and n > 0 for n in patch)
    if not whole or len(patch) != 3:
        fields.refuse("patch_size", patch, "three positive integers: time, height, width")
    for key, default in (("attention_head_dim", 128), ("freq_dim", 256)):
        if fields.size(hf, key, default) % 2:
            fields.refuse(key, hf[key], "even")
    return WanConfig(
        layers=fields.size(hf, "num_layers", 40),
        heads=fields.size(hf, "num_attention_heads", 40),
        head_dim=fields.size(hf, "attention_head_dim", 128),
        inner=fields.size(hf, "ffn_dim", 13824),
        channels=channels,
        patch=tuple(patch),
        text=fields.size(hf, "text_dim", 4096),
        frequencies=fields.size(hf, "freq_dim", 256),
        cross_norm=fields.flag(hf, "cross_attn_norm", True),
        eps=fields.number(hf, "eps", 1e-6),
        max_positions=fields.size(hf, "rope_max_seq_len", 1024),
    )


def _projection(name: str, out: int, into: int) -> dict[str, ParamSpec]:
    return layers.projection(name, out, into, True, math.sqrt(2 / (out + into)))


def _block_specs(cfg: WanConfig, at: str) -> dict[str, ParamSpec]:
    H = cfg.hidden
    specs = {f"{at}.scale_shift_table": ParamSpec((1, 6, H), normal(H**-0.5), decay=False)}
    for attention in (f"{at}.attn1", f"{at}.attn2"):
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            specs |= _projection(f"{attention}.{name}", H, H)
        specs |= norm_specs(f"{attention}.norm_q", H, bias=False) | norm_specs(f"{attention}.norm_k", H, bias=False)
    if cfg.cross_norm:
        specs |= norm_specs(f"{at}.norm2", H)
    return specs | _projection(f"{at}.ffn.net.0.proj", cfg.inner, H) | _projection(f"{at}.ffn.net.2", H, cfg.inner)


def specs(cfg: WanConfig) -> dict[str, ParamSpec]:
    H, patches = cfg.hidden, _projection("patch_embedding", cfg.hidden, cfg.features)
    matrix = patches["patch_embedding.weight"]
    out = {
        **patches,
        "patch_embedding.weight": ParamSpec((H, cfg.channels, *cfg.patch), matrix.init),  # a convolution's, stored
        **_projection(f"{CONDITION}.time_embedder.linear_1", H, cfg.frequencies),
        **_projection(f"{CONDITION}.time_embedder.linear_2", H, H),
        **_projection(f"{CONDITION}.time_proj", 6 * H, H),
        **_projection(f"{CONDITION}.text_embedder.linear_1", H, cfg.text),
        **_projection(f"{CONDITION}.text_embedder.linear_2", H, H),
    }
    for layer in range(cfg.layers):
        out |= _block_specs(cfg, f"blocks.{layer}")
    out["scale_shift_table"] = ParamSpec((1, 2, H), normal(H**-0.5), decay=False)
    return out | _projection("proj_out", cfg.features, H)


def _turns(cfg: WanConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, 1, D/2], fp32: height and width each turn a third of the pairs, time those that are left."""
    third = 2 * (cfg.head_dim // 6)
    angles = []
    for axis, size in enumerate((cfg.head_dim - 2 * third, third, third)):
        freq = torch.tensor([THETA ** (-i / size) for i in range(0, size, 2)], device=positions.device)
        angles.append(positions[..., axis, None].float() * freq)
    angle = torch.cat(angles, -1)[..., None, :]
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (2i, 2i + 1) of a head by its angle: x [B, S, N, D]."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


def _features_of(time: Tensor, size: int) -> Tensor:
    """time [B] in [0, 1] -> [B, size] fp32: cosines, then sines."""
    half = size // 2
    freq = torch.exp(-math.log(THETA) * torch.arange(half, device=time.device) / half)
    angle = TIMES * time.float()[:, None] * freq
    return torch.cat((angle.cos(), angle.sin()), -1)


def _layer_norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Over the last dimension, in fp32 whatever x is -> fp32."""
    affine = (None, None) if weight is None else (weight.float(), bias.float())
    return F.layer_norm(x.float(), x.shape[-1:], *affine, eps)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return (_layer_norm(x, eps) * (1 + scale) + shift).to(x.dtype)


def _attention(q: Mapping, name: str, x: Tensor, of: Tensor, look: Callable, cfg: WanConfig, ops: Ops) -> Tensor:
    """x [B, S, H] looks at `of` [B, S or L, H] by look(query, key, value) -> [B, S, H]. The norms of queries and keys
    go over all heads together."""
    query = rms_norm(project(q, f"{name}.to_q", x, ops), q[f"{name}.norm_q.weight"], cfg.eps)
    key = rms_norm(project(q, f"{name}.to_k", of, ops), q[f"{name}.norm_k.weight"], cfg.eps)
    value = project(q, f"{name}.to_v", of, ops)
    seen = look(*(t.unflatten(-1, (-1, cfg.head_dim)) for t in (query, key, value)))
    return project(q, f"{name}.to_out.0", seen.flatten(-2), ops)


def velocity(p: Mapping[str, Tensor], batch: Mapping[str, Tensor], cfg: WanConfig, ops: Ops) -> Tensor:
    """The predicted velocity, from data to noise [B, S, F], at the points `batch["noised"]` [B, S, F] and the times
    `row_time` [B], given the texts `row_context` [B, L, text]. All L are looked at: Wan's texts are filled up with
    zeros that count. Also of the batch: `position_ids` [B, S, 3], `segment_ids` [B, S].
    """
    filters = p["patch_embedding.weight"]
    dtype = filters.dtype
    x = ops.linear(batch["noised"].to(dtype), filters.flatten(1), p["patch_embedding.bias"])
    time = _features_of(batch["row_time"], cfg.frequencies).to(dtype)
    time = project(p, f"{CONDITION}.time_embedder.linear_1", time, ops)
    time = project(p, f"{CONDITION}.time_embedder.linear_2", F.silu(time), ops)
    changes = project(p, f"{CONDITION}.time_proj", F.silu(time), ops).unflatten(-1, (6, -1)).float()
    context = project(p, f"{CONDITION}.text_embedder.linear_1", batch["row_context"].to(dtype), ops)
    context = project(p, f"{CONDITION}.text_embedder.linear_2", F.gelu(context, approximate="tanh"), ops)

    cos, sin = _turns(cfg, batch["position_ids"])
    of_row = ops.mask(batch["segment_ids"], causal=False)
    # Padding looks at the text, too: it must look at something, and nobody looks at it.
    of_text = torch.zeros_like(batch["row_context"][..., 0], dtype=torch.long)
    of_text = ops.local_mask(torch.zeros_like(batch["segment_ids"]), of_text)

    def look_around(query, key, value):
        return ops.attention(_rotate(query, cos, sin), _rotate(key, cos, sin), value, of_row)

    def look_at_text(query, key, value):
        return ops.local_attention(query, key, value, of_text)

    def block(q, x, layer):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (q["scale_shift_table"].float() + changes).chunk(6, dim=1)
        y = _modulated(x, shift, scale, cfg.eps)
        x = (x + gate * _attention(q, "attn1", y, y, look_around, cfg, ops)).to(x.dtype)
        y = _layer_norm(x, cfg.eps, q["norm2.weight"], q["norm2.bias"]).to(x.dtype) if cfg.cross_norm else x
        x = x + _attention(q, "attn2", y, context, look_at_text, cfg, ops)
        y = project(q, "ffn.net.0.proj", _modulated(x, shift_mlp, scale_mlp, cfg.eps), ops)
        y = project(q, "ffn.net.2", F.gelu(y, approximate="tanh"), ops)
        return (x + gate_mlp * y).to(x.dtype), None

    x, _ = ops.scan(block, p, "blocks", cfg.layers, x)
    shift, scale = (p["scale_shift_table"].float() + time.float()[:, None]).chunk(2, dim=1)
    y = project(p, "proj_out", _modulated(x, shift, scale, cfg.eps), ops)
    return y.unflatten(-1, (-1, cfg.channels)).transpose(-1, -2).flatten(-2)  # what comes out has the channels last


def forward(p: Mapping[str, Tensor], batch: Mapping[str, Tensor], cfg: WanConfig, ops: Ops) -> Output:
    """The squared error of the velocity, summed over the tokens that are no padding. batch: as from `prepare`."""
    latents, noise = batch["latents"].float(), batch["noise"].float()
    noised = flow.between(latents, noise, batch["row_time"].float()[:, None, None])
    error = velocity(p, {**batch, "noised": noised}, cfg, ops).float() - (noise - latents)
    valid = batch["segment_ids"] >= 0
    return Output(losses={"loss": torch.where(valid, error.square().sum(-1), 0.0).sum()})


def targets(batch: Mapping[str, Tensor], cfg: WanConfig) -> dict[str, Tensor]:
    return {"loss": (batch["segment_ids"] >= 0).sum() * cfg.features}


def patchify(x: Tensor, cfg: WanConfig) -> Tensor:
    """[B, C, T, height, width] -> [B, S, F], time slowest."""
    pt, ph, pw = cfg.patch
    x = x.unflatten(4, (-1, pw)).unflatten(3, (-1, ph)).unflatten(2, (-1, pt))
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(x: Tensor, size: tuple[int, int, int], cfg: WanConfig) -> Tensor:
    """[B, S, F] -> [B, C, T, height, width], which `size` gives the last three of."""
    x = x.unflatten(1, [n // p for n, p in zip(size, cfg.patch, strict=True)]).unflatten(-1, (-1, *cfg.patch))
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)


def prepare(inputs: Mapping[str, Tensor], cfg: WanConfig) -> dict[str, Tensor]:
    """latents and noise [B, C, T, height, width], time [B] in [0, 1] and context [B, L, text] -> the batch.

    Raises ValueError, naming it, for what is missing or of another shape.
    """
    if lacking := [name for name in ("latents", "noise", "time", "context") if name not in inputs]:
        raise ValueError(f"the inputs lack {', '.join(lacking)}: they have {', '.join(inputs)}")
    latents, noise, time, context = (inputs[name] for name in ("latents", "noise", "time", "context"))
    if latents.ndim != 5 or latents.shape[1] != cfg.channels:
        raise ValueError(f"latents are {list(latents.shape)}: they must be [B, {cfg.channels}, T, height, width]")
    tokens, left = zip(*map(divmod, latents.shape[2:], cfg.patch))
    if any(left) or not min(tokens) or max(tokens) > cfg.max_positions:
        raise ValueError(
            f"latents are {list(latents.shape)}: time, height and width must be multiples of the patch's "
            f"{list(cfg.patch)}, and at most {cfg.max_positions} times that"
        )
    B = len(latents)
    if noise.shape != latents.shape:
        raise ValueError(f"noise is {list(noise.shape)}: it must be as the latents, {list(latents.shape)}")
    if time.shape != (B,) or not bool(((time >= 0) & (time <= 1)).all()):
        raise ValueError(f"time is {time.tolist()}: it must be {B} numbers from 0 to 1")
    if context.ndim != 3 or len(context) != B or context.shape[2] != cfg.text:
        raise ValueError(f"context is {list(context.shape)}: it must be [{B}, L, {cfg.text}]")
    positions = grid(*tokens)
    return {
        "latents": patchify(latents, cfg),
        "noise": patchify(noise, cfg),
        "position_ids": positions.expand(B, -1, -1),
        "segment_ids": torch.zeros(B, len(positions), dtype=torch.long),
        "row_time": time,
        "row_context": context,
    }


@torch.no_grad()
def sample(
    p: Mapping[str, Tensor], noise: Tensor, context: Tensor, cfg: WanConfig, ops: Ops,
    steps: int = 50, shift: float = 3.0, guidance: float = 1.0, negative: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Latents [B, C, T, height, width] from noise, on one device, by Euler steps.

    shift: 3 for small images, 5 for large ones, as Wan's authors have it. guidance: how far the velocity is taken
    from what the texts `negative` [B, L, text] give (classifier-free guidance, arXiv 2207.12598); 1 does without them.
    """
    if guidance != 1 and negative is None:
        raise ValueError(f"guidance = {guidance} needs the negative texts' embeddings")
    start = prepare({"latents": noise, "noise": noise, "time": noise.new_ones(len(noise)), "context": context}, cfg)
    start = {name: t.to(noise.device) for name, t in start.items()}

    def along(x: Tensor, time: float) -> Tensor:
        at = {**start, "noised": x, "row_time": start["row_time"] * time}
        v = velocity(p, at, cfg, ops).float()
        if guidance == 1:
            return v
        without = velocity(p, {**at, "row_context": negative}, cfg, ops).float()
        return without + guidance * (v - without)

    end = flow.euler(along, start["latents"].float(), flow.schedule(steps, shift))
    return unpatchify(end, noise.shape[2:], cfg)


def examples(cfg: WanConfig, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """An image and a video."""
    pt, ph, pw = cfg.patch

    def example(frames: int, height: int, width: int) -> dict[str, Tensor]:
        shape = (1, cfg.channels, frames * pt, height * ph, width * pw)
        draw = partial(torch.randn, generator=generator)
        time = torch.rand(1, generator=generator)
        return {"latents": draw(shape), "noise": draw(shape), "time": time, "context": draw(1, 5, cfg.text)}

    return [example(1, 3, 2), example(2, 2, 3)]


def _preset(heads: int, head_dim: int, layers: int, inner: int, **more) -> dict:
    return {
        "_class_name": CLASS_NAME,
        "_diffusers_version": "0.33.0",
        "added_kv_proj_dim": None,
        "attention_head_dim": head_dim,
        "cross_attn_norm": True,
        "eps": 1e-06,
        "ffn_dim": inner,
        "freq_dim": 256,
        "image_dim": None,
        "in_channels": 16,
        "num_attention_heads": heads,
        "num_layers": layers,
        "out_channels": 16,
        "patch_size": [1, 2, 2],
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": 4096,
        **more,
    }


PRESETS = {
    "wan-tiny": _preset(4, 12, 2, 56, freq_dim=20, in_channels=3, out_channels=3, rope_max_seq_len=64, text_dim=22),
    "Wan2.1-T2V-1.3B": _preset(12, 128, 30, 8960),
    "Wan2.1-T2V-14B": _preset(40, 128, 40, 13824),
}

"""Janus's eye: SigLIP's vision transformer (arXiv 2303.15343) on images of one size, and the aligner behind it.

Checked against transformers' `JanusVisionModel`. One output for each patch; P patches, C channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...items import Item
from ...ops import Ops
from ...specs import ParamSpec, normal, zeros
from .. import aligner, fields
from ..layers import ACTIVATIONS, activation, layer_norm, norm_specs, project, projection

TINY = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_ratio": 2.0, "image_size": 6,
    "patch_size": 2, "num_image_tokens": 9, "projection_dim": 20,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    width: int  # of its outputs, the aligner's
    hidden: int
    inner: int
    layers: int
    heads: int
    channels: int
    patch: int  # pixels a side
    side: int  # patches a side
    bias: bool  # of queries, keys and values
    eps: float
    act: str
    std: float
    depth: int  # the aligner's layers

    @property
    def patches(self) -> int:
        return self.side**2


def config(hf: Mapping) -> SiglipConfig:
    """From Janus's `vision_config`; what is absent is as transformers has it."""
    hidden, heads = fields.size(hf, "hidden_size", 1024), fields.size(hf, "num_attention_heads", 16)
    if hidden % heads:
        fields.refuse("hidden_size", hidden, f"a multiple of num_attention_heads = {heads}")
    image, patch = fields.size(hf, "image_size", 384), fields.size(hf, "patch_size", 16)
    if image < patch:
        fields.refuse("image_size", image, f"at least patch_size = {patch}")
    side = image // patch
    if fields.size(hf, "num_image_tokens", 576) != side**2:
        fields.refuse("num_image_tokens", hf.get("num_image_tokens", 576), f"(image_size // patch_size)² = {side**2}")
    if fields.flag(hf, "use_qk_norm", False):
        fields.refuse("use_qk_norm", True, "false: it is not implemented")
    for key in ("attention_dropout", "hidden_dropout_rate", "projection_dropout"):
        if fields.read(hf, key, 0) != 0:
            fields.refuse(key, hf[key], "0: dropout is not implemented")
    return SiglipConfig(
        width=fields.size(hf, "projection_dim", 2048),
        hidden=hidden,
        inner=int(hidden * fields.number(hf, "mlp_ratio", 4.0)),
        layers=fields.size(hf, "num_hidden_layers", 24),
        heads=heads,
        channels=fields.size(hf, "num_channels", 3),
        patch=patch,
        side=side,
        bias=fields.flag(hf, "attention_bias", True),
        eps=fields.number(hf, "layer_norm_eps", 1e-6),
        act=activation(hf),
        std=fields.number(hf, "initializer_range", 0.02),
        depth=fields.size(hf, "depth", 2),
    )


def specs(cfg: SiglipConfig, prefix: str) -> dict[str, ParamSpec]:
    H, std, at = cfg.hidden, cfg.std, f"{prefix}.vision_model"

    out = {
        f"{at}.embeddings.patch_embedding.weight": ParamSpec((H, cfg.channels, cfg.patch, cfg.patch), normal(std)),
        f"{at}.embeddings.patch_embedding.bias": ParamSpec((H,), zeros, decay=False),
        f"{at}.embeddings.position_embedding.weight": ParamSpec((cfg.patches, H), normal(std), active=0.0),
    }
    for layer in range(cfg.layers):
        name = f"{at}.encoder.layers.{layer}"
        out |= norm_specs(f"{name}.layer_norm1", H) | norm_specs(f"{name}.layer_norm2", H)
        for part in ("q_proj", "k_proj", "v_proj"):
            out |= projection(f"{name}.self_attn.{part}", H, H, cfg.bias, std)
        out |= projection(f"{name}.self_attn.projection_layer", H, H, True, std)
        out |= projection(f"{name}.mlp.fc1", cfg.inner, H, True, std)
        out |= projection(f"{name}.mlp.fc2", H, cfg.inner, True, std)
    out |= norm_specs(f"{at}.post_layernorm", H)
    return out | aligner.specs(f"{prefix}.aligner", H, cfg.width, cfg.depth, std)


def encode(p: Mapping[str, Tensor], prefix: str, x: Mapping[str, Tensor], cfg: SiglipConfig, ops: Ops) -> Tensor:
    """x: patches [P, C * patch * patch], position [P] in their image, item [P] -> [P, width]."""
    at = f"{prefix}.vision_model"
    weight = p[f"{at}.embeddings.patch_embedding.weight"].flatten(1)
    y = ops.linear(x["patches"].to(weight.dtype), weight, p[f"{at}.embeddings.patch_embedding.bias"])
    y = y + F.embedding(x["position"], p[f"{at}.embeddings.position_embedding.weight"]).to(y.dtype)
    mask = ops.local_mask(x["item"][None])

    def block(q, y, layer):
        z = layer_norm(q, "layer_norm1", y, cfg.eps)
        heads = (project(q, f"self_attn.{n}_proj", z, ops).unflatten(-1, (cfg.heads, -1))[None] for n in "qkv")
        z = ops.local_attention(*heads, mask)[0].flatten(-2)
        y = y + project(q, "self_attn.projection_layer", z, ops)
        z = ACTIVATIONS[cfg.act](project(q, "mlp.fc1", layer_norm(q, "layer_norm2", y, cfg.eps), ops))
        return y + project(q, "mlp.fc2", z, ops), None

    y, _ = ops.scan(block, p, f"{at}.encoder.layers", cfg.layers, y)
    y = layer_norm(p, f"{at}.post_layernorm", y, cfg.eps)
    return aligner.align(p, f"{prefix}.aligner", y, cfg.depth, cfg.act, ops)


def from_processor(pixels: Tensor, cfg: SiglipConfig) -> list[Item]:
    """Images [images, C, height, width] as the processor gives them -> their items, whose slots count through all.

    Raises ValueError for images of another size.
    """
    pixels, n, s = torch.as_tensor(pixels), cfg.patch, cfg.side
    size = (cfg.channels, s * n, s * n)
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != size:
        raise ValueError(f"pixel_values are {list(pixels.shape)}: they must be images {list(size)}")
    patches = pixels.reshape(-1, cfg.channels, s, n, s, n).permute(0, 2, 4, 1, 3, 5).reshape(-1, s * s, size[0] * n * n)
    slots = torch.arange(len(patches) * cfg.patches).view(-1, cfg.patches)
    position = torch.arange(cfg.patches)
    return [Item({"patches": one, "position": position}, of_one) for one, of_one in zip(patches, slots)]


def items(raw: Tensor, cfg: SiglipConfig) -> list[Item]:
    """One image [C, height, width]."""
    return from_processor(torch.as_tensor(raw)[None], cfg)


def example(cfg: SiglipConfig, generator: torch.Generator) -> Tensor:
    return torch.randn(cfg.channels, cfg.side * cfg.patch, cfg.side * cfg.patch, generator=generator)


def blank(cfg: SiglipConfig) -> Item:
    """A whole image: all have one size, so that packs of images are padded by images."""
    (item,) = items(torch.zeros(cfg.channels, cfg.side * cfg.patch, cfg.side * cfg.patch), cfg)
    return item._replace(slots=torch.full_like(item.slots, -1))

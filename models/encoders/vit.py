"""A small vision transformer for images of any size (arXiv 2010.11929): one output for each patch.

Learned positions, one table for a patch's row and one for its column; LayerNorm before attention and MLP.
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
from ..layers import layer_norm, norm_specs, project, projection


EPS = 1e-6  # of the norms

TINY = {"patch_size": 2, "num_channels": 1, "hidden_size": 24, "num_hidden_layers": 2}


@dataclass(frozen=True)
class VitConfig:
    patch: int  # pixels along each side
    channels: int
    width: int
    inner: int
    layers: int
    heads: int
    grid: int  # patches along the longest side there may be
    std: float


def config(hf: Mapping) -> VitConfig:
    width, heads = fields.size(hf, "hidden_size", 128), fields.size(hf, "num_attention_heads", 4)
    if width % heads:
        fields.refuse("num_attention_heads", heads, f"a divisor of hidden_size = {width}")
    return VitConfig(
        patch=fields.size(hf, "patch_size", 16),
        channels=fields.size(hf, "num_channels", 3),
        width=width,
        inner=fields.size(hf, "intermediate_size", 4 * width),
        layers=fields.size(hf, "num_hidden_layers", 4),
        heads=heads,
        grid=fields.size(hf, "max_grid", 64),
        std=fields.number(hf, "initializer_range", 0.02),
    )


def specs(cfg: VitConfig, prefix: str) -> dict[str, ParamSpec]:
    W, I, std = cfg.width, cfg.inner, cfg.std
    out = projection(f"{prefix}.patch", W, cfg.channels * cfg.patch**2, True, std)
    out |= {f"{prefix}.{axis}.weight": ParamSpec((cfg.grid, W), normal(std), active=0.0) for axis in ("row", "column")}
    for layer in range(cfg.layers):
        at = f"{prefix}.layers.{layer}"
        out |= norm_specs(f"{at}.norm1", W) | norm_specs(f"{at}.norm2", W)
        out |= projection(f"{at}.qkv", 3 * W, W, True, std) | projection(f"{at}.proj", W, W, True, std)
        out |= projection(f"{at}.up", I, W, True, std) | projection(f"{at}.down", W, I, True, std)
    return out | norm_specs(f"{prefix}.norm", W)


def blank(cfg: VitConfig) -> Item:
    patch = torch.zeros(1, cfg.channels * cfg.patch**2)
    return Item({"patches": patch, "position": torch.zeros(1, 2, dtype=torch.long)}, torch.tensor([-1]))


def items(raw, cfg: VitConfig) -> list[Item]:
    """One image [height, width] or [height, width, channels], uint8 or floats in [0, 1] -> its one item."""
    image = torch.as_tensor(raw)
    image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    image = image[..., None] if image.ndim == 2 else image
    rows, columns = (size / cfg.patch for size in image.shape[:2])
    if image.ndim != 3 or image.shape[2] != cfg.channels or rows % 1 or columns % 1 or max(rows, columns) > cfg.grid:
        raise ValueError(
            f"an image of shape {list(image.shape)}: it must have {cfg.channels} channels, and height and width must "
            f"be multiples of {cfg.patch} up to {cfg.patch * cfg.grid}"
        )
    rows, columns = int(rows), int(columns)
    patches = (2 * image - 1).view(rows, cfg.patch, columns, cfg.patch, cfg.channels).transpose(1, 2)
    position = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2)
    return [Item({"patches": patches.reshape(rows * columns, -1), "position": position}, torch.arange(rows * columns))]


def example(cfg: VitConfig, generator: torch.Generator) -> Tensor:
    rows, columns = torch.randint(1, min(cfg.grid, 4) + 1, (2,), generator=generator).tolist()
    shape = (rows * cfg.patch, columns * cfg.patch, cfg.channels)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def encode(p: Mapping[str, Tensor], prefix: str, x: Mapping[str, Tensor], cfg: VitConfig, ops: Ops) -> Tensor:
    """x: patches [P, channels * patch^2], position [P, 2], item [P] -> [P, width]."""
    rows, columns = x["position"].unbind(-1)
    y = project(p, f"{prefix}.patch", x["patches"].to(p[f"{prefix}.patch.weight"].dtype), ops)
    y = y + F.embedding(rows, p[f"{prefix}.row.weight"]) + F.embedding(columns, p[f"{prefix}.column.weight"])
    mask = ops.local_mask(x["item"][None])

    def block(q, y, layer):
        heads = project(q, "qkv", layer_norm(q, "norm1", y, EPS), ops)[None].unflatten(-1, (3, cfg.heads, -1))
        seen = ops.local_attention(*heads.unbind(2), mask)[0].flatten(-2)
        y = y + project(q, "proj", seen, ops)
        inner = F.gelu(project(q, "up", layer_norm(q, "norm2", y, EPS), ops))
        return y + project(q, "down", inner, ops), None

    y, _ = ops.scan(block, p, f"{prefix}.layers", cfg.layers, y)
    return layer_norm(p, f"{prefix}.norm", y, EPS)

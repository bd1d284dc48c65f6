"""Qwen3-VL's vision encoder: images of any size, videos frame by frame, in patches; several layers are read out, not
only the last (deepstack, arXiv 2406.04334). Checked against transformers' `Qwen3VLVisionModel`.

Like Qwen2-VL's, with a table of positions, and more mergers. P patches of all items, M outputs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...items import Item
from ...ops import Ops
from ...specs import ParamSpec, normal, zeros
from .. import fields
from ..layers import layer_norm, norm_specs, project, projection
from . import qwen2_vision
from .qwen2_vision import example  # noqa: F401 - samples are alike

COLOURS = ((0.5,) * 3, (0.5,) * 3)  # what the published processors take off each channel of 0..1, and divide by
# How many tokens, at least and at most, an image and all frames of a video are resized to.
TOKENS_OF_IMAGE, TOKENS_OF_VIDEO = (64, 16384), (4, 24576)

TINY = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "patch_size": 4, "out_hidden_size": 20,
    "num_position_embeddings": 25, "deepstack_visual_indexes": [0], "tokens": [1, 16],
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VisionConfig(qwen2_vision.VisionConfig):
    positions: int  # rows of the table of position embeddings, a square
    deepstack: tuple[int, ...]  # the layers read out besides the last
    # What families call the mergers of those layers, and each merger's norm and two projections.
    mergers: str = "deepstack_merger_list"
    merger: tuple[str, str, str] = ("norm", "linear_fc1", "linear_fc2")


def config(hf: Mapping, **names) -> VisionConfig:
    """From a `vision_config`; `names` as the family has them. Raises ValueError, naming the key."""
    if fields.read(hf, "hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        fields.refuse("hidden_act", hf["hidden_act"], "'gelu_pytorch_tanh'")
    hidden = fields.size(hf, "hidden_size", 1152)
    same = qwen2_vision.common({"depth": 27, "patch_size": 16, **hf}, hidden)  # transformers' defaults
    deepstack = fields.read(hf, "deepstack_visual_indexes", (8, 16, 24))
    whole = isinstance(deepstack, (list, tuple)) and all(type(layer) is int for layer in deepstack)
    if not whole or not all(a < b for a, b in zip([-1, *deepstack], [*deepstack, same["layers"]])):
        fields.refuse("deepstack_visual_indexes", deepstack, f"a growing list of layers, 0 to {same['layers'] - 1}")
    return VisionConfig(
        hidden=hidden, inner=fields.size(hf, "intermediate_size", 4304), width=fields.size(hf, "out_hidden_size", 3584),
        positions=fields.size(hf, "num_position_embeddings", 2304), deepstack=tuple(deepstack), **same, **names,
    )  # fmt: skip


def specs(cfg: VisionConfig, prefix: str) -> dict[str, ParamSpec]:
    """Every parameter, by the names of the published checkpoints."""
    H, std, wide = cfg.hidden, cfg.std, cfg.hidden * cfg.group
    out = {
        f"{prefix}.patch_embed.proj.weight": ParamSpec((H, cfg.channels, cfg.frames, *[cfg.patch] * 2), normal(std)),
        f"{prefix}.patch_embed.proj.bias": ParamSpec((H,), zeros, decay=False),
        f"{prefix}.pos_embed.weight": ParamSpec((cfg.positions, H), normal(std), active=0.0),
    }
    for layer in range(cfg.layers):
        at = f"{prefix}.blocks.{layer}"
        out |= norm_specs(f"{at}.norm1", H) | norm_specs(f"{at}.norm2", H)
        out |= projection(f"{at}.attn.qkv", 3 * H, H, True, std) | projection(f"{at}.attn.proj", H, H, True, std)
        out |= projection(f"{at}.mlp.linear_fc1", cfg.inner, H, True, std)
        out |= projection(f"{at}.mlp.linear_fc2", H, cfg.inner, True, std)
    for at, size in _mergers(cfg, prefix):
        norm, fc1, fc2 = (f"{at}.{part}" for part in cfg.merger)
        out |= norm_specs(norm, size) | projection(fc1, wide, wide, True, std)
        out |= projection(fc2, cfg.width, wide, True, std)
    return out


def _mergers(cfg: VisionConfig, prefix: str) -> list[tuple[str, int]]:
    """Each merger's name and its norm's size: patches of the last layer are normed one by one, the others' merged."""
    deep = [(f"{prefix}.{cfg.mergers}.{level}", cfg.hidden * cfg.group) for level in range(len(cfg.deepstack))]
    return [(f"{prefix}.merger", cfg.hidden), *deep]


def encode(p: Mapping[str, Tensor], prefix: str, x: Mapping[str, Tensor], cfg: VisionConfig, ops: Ops) -> Tensor:
    """x: patches [P, channels * frames * patch * patch], position [P, 2], near and share [P, 4] and item [P]
    -> [M, 1 + levels, width]: of the last layer, then of each layer in `deepstack`."""

    norm = partial(layer_norm, eps=qwen2_vision.EPS)

    def mlp(q, y):
        return project(q, "mlp.linear_fc2", F.gelu(project(q, "mlp.linear_fc1", y, ops), approximate="tanh"), ops)

    y = qwen2_vision.embed(p, prefix, x, ops)
    near = F.embedding(x["near"], p[f"{prefix}.pos_embed.weight"])
    y = y + (near * x["share"][..., None]).sum(1).to(y.dtype)
    masks = [ops.local_mask(x["item"][None])] * cfg.layers
    y, read = qwen2_vision.blocks(p, prefix, y, x["position"], cfg, ops, norm, mlp, masks, cfg.deepstack)
    of_norm, fc1, fc2 = cfg.merger
    levels = []
    for (at, size), y in zip(_mergers(cfg, prefix), [y, *read], strict=True):
        y = norm(p, f"{at}.{of_norm}", y.reshape(-1, size)).reshape(-1, cfg.hidden * cfg.group)
        levels.append(project(p, f"{at}.{fc2}", F.gelu(project(p, f"{at}.{fc1}", y, ops)), ops))
    return torch.stack(levels, 1)


def blank(cfg: VisionConfig) -> Item:
    return _looked_up(qwen2_vision.blank(cfg), cfg)


def _looked_up(item: Item, cfg: VisionConfig) -> Item:
    """Qwen2-VL's item with the four rows of the table of positions that lie around each patch, and their shares:
    the table is stretched over the frame, corner to corner, bilinearly."""
    position, side = item.fields["position"], math.isqrt(cfg.positions)
    exact = position.float() * (side - 1) / position.amax(0).clamp(min=1)
    low = exact.floor()
    rows, columns = torch.stack([low, low + 1], -1).long().clamp(max=side - 1).unbind(1)
    of_rows, of_columns = torch.stack([1 - (exact - low), exact - low], -1).unbind(1)
    near = (rows[:, :, None] * side + columns[:, None]).flatten(1)
    share = (of_rows[:, :, None] * of_columns[:, None]).flatten(1)
    return item._replace(fields={**item.fields, "near": near, "share": share})


def from_processor(pixels: Tensor, grids: Tensor, cfg: VisionConfig) -> list[Item]:
    """As Qwen2-VL's: an item for each image, or two frames of a video."""
    return [_looked_up(item, cfg) for item in qwen2_vision.from_processor(pixels, grids, cfg)]


def items(raw: np.ndarray | Tensor, cfg: VisionConfig, tokens: tuple[float, float] | None = None) -> list[Item]:
    """As Qwen2-VL's; `tokens` of an image, or of all frames of a video."""
    raw = np.asarray(raw)
    least, most = tokens or cfg.tokens or (TOKENS_OF_IMAGE if raw.ndim == 3 else TOKENS_OF_VIDEO)
    frames = 1 if raw.ndim == 3 else max(1, -(-len(raw) // cfg.frames) * cfg.frames)
    found = qwen2_vision.items(raw, cfg, (least / frames, most / frames), COLOURS)
    return [_looked_up(item, cfg) for item in found]

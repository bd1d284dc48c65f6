"""The vision tower of Qwen2.5-VL (arXiv 2502.13923): most layers look only within a window of the picture.

Patches come window by window, so that a window's stand together; slots follow them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from ...items import Item
from ...ops import Ops
from ...specs import ParamSpec
from .. import fields
from ..layers import norm_specs, rms_norm, swiglu, swiglu_specs
from . import qwen2_vision
from .qwen2_vision import example  # noqa: F401 - the same pictures

TINY = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "patch_size": 4, "window_size": 16,
    "fullatt_block_indexes": [1], "out_hidden_size": 20, "tokens": [1, 16],
}  # fmt: skip
_MANY = 1 << 24  # more windows than an item has


@dataclass(frozen=True, kw_only=True)
class VisionConfig(qwen2_vision.VisionConfig):
    window: int  # a window's side, in patches
    full: tuple[bool, ...]  # per layer, whether it looks at the whole picture


def config(hf: Mapping, **names) -> VisionConfig:
    """From a config's `vision_config`; `names` of the attention's `projections`, as the family has them. Raises
    ValueError, naming key and value, for what is missing or impossible."""
    if fields.read(hf, "hidden_act", "silu") != "silu":
        fields.refuse("hidden_act", hf["hidden_act"], "'silu'")
    hidden, side = fields.size(hf, "hidden_size"), fields.size(hf, "window_size", 112)
    same = qwen2_vision.common(hf, hidden)
    window = side // same["merge"] // same["patch"] * same["merge"]
    if not window:
        fields.refuse("window_size", side, f"at least {same['merge'] * same['patch']} pixels, a group of patches")
    layers = range(same["layers"])
    full = fields.read(hf, "fullatt_block_indexes", (7, 15, 23, 31))
    if not isinstance(full, (list, tuple)) or any(type(layer) is not int for layer in full):
        fields.refuse("fullatt_block_indexes", full, "a list of layers")
    return VisionConfig(
        hidden=hidden, inner=fields.size(hf, "intermediate_size", 3420), width=fields.size(hf, "out_hidden_size", 3584),
        window=window, full=tuple(layer in full for layer in layers), **same, **names,
    )  # fmt: skip


def specs(cfg: VisionConfig, prefix: str) -> dict[str, ParamSpec]:
    def mlp(cfg: VisionConfig, name: str) -> dict[str, ParamSpec]:
        return swiglu_specs(name, cfg.hidden, cfg.inner, True, cfg.std)

    return qwen2_vision.specs(cfg, prefix, partial(norm_specs, bias=False), mlp)


def blank(cfg: VisionConfig) -> Item:
    return windowed(qwen2_vision.blank(cfg), cfg)


def encode(p: Mapping[str, Tensor], prefix: str, x: Mapping[str, Tensor], cfg: VisionConfig, ops: Ops) -> Tensor:
    """x: patches [P, channels * frames * patch * patch], position [P, 2], window and item [P] -> [P / group, out]."""
    everywhere = ops.local_mask(x["item"][None])
    within = ops.local_mask((x["item"] * _MANY + x["window"])[None])

    def norm(q, name, y):
        return rms_norm(y, q[f"{name}.weight"], qwen2_vision.EPS)

    masks = [everywhere if full else within for full in cfg.full]
    return qwen2_vision.tower(p, prefix, x, cfg, ops, norm, lambda q, y: swiglu(q, y, ops), masks)


def windowed(item: Item, cfg: VisionConfig) -> Item:
    """Qwen2-VL's item with its patches ordered by window, and numbered by it."""
    rows, columns = (item.fields["position"] // cfg.window).unbind(1)
    _, window = (rows * _MANY + columns).unique(return_inverse=True)
    window, order = window.sort(stable=True)  # groups lie within windows, and stay whole
    fields = {name: t[order] for name, t in item.fields.items()}
    return Item({**fields, "window": window}, item.slots[order[:: cfg.group] // cfg.group])


def from_processor(pixels: Tensor, grids: Tensor, cfg: VisionConfig) -> list[Item]:
    """As Qwen2-VL's, window by window."""
    return [windowed(item, cfg) for item in qwen2_vision.from_processor(pixels, grids, cfg)]


def items(raw: np.ndarray | Tensor, cfg: VisionConfig, tokens: tuple[int, int] | None = None) -> list[Item]:
    """As Qwen2-VL's, window by window."""
    return [windowed(item, cfg) for item in qwen2_vision.items(raw, cfg, tokens)]

"""Qwen3-VL's vision encoder: images of any size, videos frame by frame, in patches; several layers are read out, not
only the last (deepstack, arXiv 2406.04334). Checked against transformers' `Qwen3VLVisionModel`.

P patches of all items, H hidden, N heads, D head size, M outputs: `merge` x `merge` neighbouring patches make one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...items import Item
from ...ops import Ops
from ...specs import ParamSpec, normal, ones, zeros
from .. import fields
from ..decoder import project, projection
from ..rope import Rope, rope_tables, rotate


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    layers: int
    hidden: int
    inner: int
    heads: int
    width: int  # of the outputs
    channels: int
    patch: int  # pixels, of its two sides
    frames: int  # of a video that make one frame of patches; an image is repeated so often
    merge: int
    side: int  # of the square table of position embeddings
    positions: int  # rows of that table
    deepstack: tuple[int, ...]  # the layers read out besides the last
    theta: float
    std: float
    # What families call the mergers of those layers, and each merger's norm and two projections.
    mergers: str = "deepstack_merger_list"
    merger: tuple[str, str, str] = ("norm", "linear_fc1", "linear_fc2")

    @property
    def values(self) -> int:
        """Numbers in a patch."""
        return self.channels * self.frames * self.patch**2


def config(hf: Mapping, **names) -> VisionConfig:
    """From a `vision_config`; `names` as the family has them. Raises ValueError, naming the key."""
    hidden, heads, layers = (fields.size(hf, key) for key in ("hidden_size", "num_heads", "depth"))
    if hidden % (4 * heads):
        fields.refuse("hidden_size", hidden, f"a multiple of 4 * num_heads = {4 * heads}: rope turns pairs of two axes")
    if fields.read(hf, "hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        fields.refuse("hidden_act", hf["hidden_act"], "'gelu_pytorch_tanh'")
    deepstack = fields.read(hf, "deepstack_visual_indexes", (8, 16, 24))
    whole = isinstance(deepstack, (list, tuple)) and all(type(layer) is int for layer in deepstack)
    if not whole or not all(a < b for a, b in zip([-1, *deepstack], [*deepstack, layers])):
        fields.refuse("deepstack_visual_indexes", deepstack, f"a growing list of layers, 0 to {layers - 1}")
    positions = fields.size(hf, "num_position_embeddings", 2304)
    return VisionConfig(
        layers=layers,
        hidden=hidden,
        inner=fields.size(hf, "intermediate_size"),
        heads=heads,
        width=fields.size(hf, "out_hidden_size"),
        channels=fields.size(hf, "in_channels", 3),
        patch=fields.size(hf, "patch_size", 16),
        frames=fields.size(hf, "temporal_patch_size", 2),
        merge=fields.size(hf, "spatial_merge_size", 2),
        side=math.isqrt(positions),
        positions=positions,
        deepstack=tuple(deepstack),
        theta=fields.number(fields.read(hf, "rope_parameters", {}), "rope_theta", 10_000.0),
        std=fields.number(hf, "initializer_range", 0.02),
        **names,
    )


def _norm(name: str, size: int) -> dict[str, ParamSpec]:
    weight, bias = (ParamSpec((size,), init, decay=False) for init in (ones, zeros))
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def specs(cfg: VisionConfig, prefix: str) -> dict[str, ParamSpec]:
    H, std, patch = cfg.hidden, cfg.std, (cfg.channels, cfg.frames, cfg.patch, cfg.patch)
    out = {
        f"{prefix}.patch_embed.proj.weight": ParamSpec((H, *patch), normal(std)),
        f"{prefix}.patch_embed.proj.bias": ParamSpec((H,), zeros, decay=False),
        f"{prefix}.pos_embed.weight": ParamSpec((cfg.positions, H), normal(std), active=0.0),
    }
    for layer in range(cfg.layers):
        at = f"{prefix}.blocks.{layer}"
        out |= _norm(f"{at}.norm1", H) | _norm(f"{at}.norm2", H)
        out |= projection(f"{at}.attn.qkv", 3 * H, H, True, std) | projection(f"{at}.attn.proj", H, H, True, std)
        out |= projection(f"{at}.mlp.linear_fc1", cfg.inner, H, True, std)
        out |= projection(f"{at}.mlp.linear_fc2", H, cfg.inner, True, std)
    wide = H * cfg.merge**2
    for at, size in _mergers(cfg, prefix):
        norm, fc1, fc2 = (f"{at}.{part}" for part in cfg.merger)
        out |= _norm(norm, size) | projection(fc1, wide, wide, True, std) | projection(fc2, cfg.width, wide, True, std)
    return out


def _mergers(cfg: VisionConfig, prefix: str) -> list[tuple[str, int]]:
    """Each merger's name and its norm's size: patches of the last layer are normed one by one, the others' merged."""
    deep = [(f"{prefix}.{cfg.mergers}.{level}", cfg.hidden * cfg.merge**2) for level in range(len(cfg.deepstack))]
    return [(f"{prefix}.merger", cfg.hidden), *deep]


def _layer_norm(q: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], q[f"{name}.weight"], q[f"{name}.bias"], 1e-6)


def encode(p: Mapping[str, Tensor], prefix: str, x: Mapping[str, Tensor], cfg: VisionConfig, ops: Ops) -> Tensor:
    """-> [M, 1 + levels, width]: of the last layer, then of each layer in `deepstack`."""
    weight = p[f"{prefix}.patch_embed.proj.weight"]
    h = ops.linear(x["patches"].to(weight.dtype), weight.flatten(1), p[f"{prefix}.patch_embed.proj.bias"])
    near = F.embedding(x["near"], p[f"{prefix}.pos_embed.weight"])
    h = h + (near * x["share"][..., None]).sum(1).to(h.dtype)
    # Half of a head's pairs turn by the row, half by the column: both with the frequencies of a head half the size.
    rope = Rope("default", cfg.theta, cfg.hidden // cfg.heads // 2, 0, {})
    cos, sin = (table.flatten(1)[:, None] for table in rope_tables(rope, x["at"], torch.float32))
    mask = ops.local_mask(x["item"][None])

    def block(q, h, layer):
        qkv = project(q, "attn.qkv", _layer_norm(q, "norm1", h), ops).unflatten(-1, (3, cfg.heads, -1))
        query, key, value = (t[None] for t in qkv.unbind(1))
        query, key = (rotate(t.float(), cos, sin).to(t.dtype) for t in (query, key))
        seen = ops.local_attention(query, key, value, mask)[0].flatten(1)
        h = h + project(q, "attn.proj", seen, ops)
        inner = F.gelu(project(q, "mlp.linear_fc1", _layer_norm(q, "norm2", h), ops), approximate="tanh")
        h = h + project(q, "mlp.linear_fc2", inner, ops)
        return h, (h if layer in cfg.deepstack else None)

    h, read = ops.scan(block, p, f"{prefix}.blocks", cfg.layers, h)
    norm, fc1, fc2 = cfg.merger
    out = []
    for (at, size), y in zip(_mergers(cfg, prefix), [h, *(y for y in read if y is not None)], strict=True):
        y = _layer_norm(p, f"{at}.{norm}", y.reshape(-1, size)).reshape(-1, cfg.hidden * cfg.merge**2)
        out.append(project(p, f"{at}.{fc2}", F.gelu(project(p, f"{at}.{fc1}", y, ops)), ops))
    return torch.stack(out, 1)


def blank(cfg: VisionConfig) -> Item:
    U = cfg.merge**2
    return _item(torch.zeros(U, cfg.values), cfg.merge, cfg.merge, cfg)._replace(slots=torch.full((1,), -1))


def _item(patches: Tensor, h: int, w: int, cfg: VisionConfig, first: int = 0) -> Item:
    """A frame of h * w patches, in blocks of merge * merge; its outputs count on from `first`."""
    at = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1)
    at = at.view(h // cfg.merge, cfg.merge, w // cfg.merge, cfg.merge, 2).transpose(1, 2).reshape(-1, 2)
    # The table of positions is stretched over the frame, corner to corner, bilinearly.
    exact = at.float() * (cfg.side - 1) / torch.tensor([h - 1, w - 1]).clamp(min=1)
    low = exact.floor()
    rows, columns = torch.stack([low, low + 1], -1).long().clamp(max=cfg.side - 1).unbind(1)
    of_rows, of_columns = torch.stack([1 - (exact - low), exact - low], -1).unbind(1)
    known = {
        "patches": patches.to(torch.float32),
        "at": at,
        "near": (rows[:, :, None] * cfg.side + columns[:, None]).flatten(1),
        "share": (of_rows[:, :, None] * of_columns[:, None]).flatten(1),
    }
    return Item(known, first + torch.arange(h * w // cfg.merge**2))


def from_processor(pixel_values: Tensor, grid_thw: Tensor, cfg: VisionConfig) -> list[Item]:
    """Patches [all, values] of images or videos of `grid_thw` [n, 3] -> an item for each frame, slots counting on.

    Raises ValueError where they do not fit each other.
    """
    pixel_values, grids = torch.as_tensor(pixel_values), torch.as_tensor(grid_thw).tolist()
    patches = sum(t * h * w for t, h, w in grids)
    if tuple(pixel_values.shape) != (patches, cfg.values):
        raise ValueError(
            f"pixel values are {list(pixel_values.shape)}: of grids {grids} they must be {[patches, cfg.values]}"
        )
    out, start = [], 0
    for t, h, w in grids:
        if h % cfg.merge or w % cfg.merge:
            raise ValueError(f"a grid of {h} x {w} patches: both must be multiples of {cfg.merge}")
        for _ in range(t):
            frame = pixel_values[start : start + h * w]
            out.append(_item(frame, h, w, cfg, first=start // cfg.merge**2))
            start += h * w
    return out


def patches(raw: Tensor, cfg: VisionConfig) -> tuple[Tensor, tuple[int, int, int]]:
    """An image [C, H, W] or a video [T, C, H, W], normalised -> what transformers' processor makes of it:
    patches [t * h * w, values] and their grid (t, h, w). Raises ValueError for a size that does not fit."""
    raw = torch.as_tensor(raw)
    raw = raw[None] if raw.ndim == 3 else raw
    T, C, height, width = raw.shape
    block = cfg.patch * cfg.merge
    if C != cfg.channels or height % block or width % block:
        needed = f"{cfg.channels} channels, and sides that {block} divides"
        raise ValueError(f"an image is {[C, height, width]}: it must have {needed}")
    raw = torch.cat([raw, raw[-1:].expand(-T % cfg.frames, -1, -1, -1)])
    t, h, w, m = len(raw) // cfg.frames, height // cfg.patch, width // cfg.patch, cfg.merge
    raw = raw.reshape(t, cfg.frames, C, h // m, m, cfg.patch, w // m, m, cfg.patch)
    return raw.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, cfg.values), (t, h, w)


def items(raw: Tensor, cfg: VisionConfig) -> list[Item]:
    """An image or a video, as `patches` takes it -> an item for each frame."""
    made, grid = patches(raw, cfg)
    return from_processor(made, torch.tensor([grid]), cfg)


def example(cfg: VisionConfig, generator: torch.Generator, video: bool = False) -> Tensor:
    """A random image, or video of two frames of patches, of a random size."""
    t = cfg.frames + 1 if video else 1
    h, w = (cfg.patch * cfg.merge * int(torch.randint(1, 4, (), generator=generator)) for _ in range(2))
    raw = torch.randn(t, cfg.channels, h, w, generator=generator)
    return raw if video else raw[0]

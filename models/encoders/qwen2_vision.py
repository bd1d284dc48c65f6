"""The vision tower of Qwen2-VL (arXiv 2409.12191): an image, or two frames of a video, at its own resolution.

An item is one step in time: its patches see each other and no others. Patches come in groups of merge x merge
neighbours, of which the tower makes one token. P patches, N heads, D head size.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...items import Item
from ...ops import Ops
from ...specs import ParamSpec
from .. import fields
from ..layers import layer_norm, norm_specs, project, projection
from ..rope import rotate

EPS = 1e-6  # of the norms
# What the published processors take off each channel of 0..1, and divide by.
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# How many tokens, at least and at most, an image and a step of a video are resized to.
TOKENS_OF_IMAGE, TOKENS_OF_VIDEO = (4, 1280), (128, 768)
TINY = {
    "depth": 2, "embed_dim": 32, "mlp_ratio": 1.5, "num_heads": 2, "patch_size": 4, "hidden_size": 20,
    "tokens": [1, 16],
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    hidden: int
    inner: int
    width: int  # of the outputs
    layers: int
    heads: int
    channels: int
    patch: int  # a patch's side, in pixels
    frames: int  # of a video, in one step in time; an image is repeated so often
    merge: int  # a group's side, in patches
    theta: float
    std: float
    tokens: tuple[float, float] | None = None  # an image is resized to, at least and at most; None: as published
    projections: tuple[str, ...] = ("qkv",)  # of attention: one for all three, or three

    @property
    def group(self) -> int:
        """Patches of which one token is made."""
        return self.merge**2


def config(hf: Mapping) -> VisionConfig:
    """From a config's `vision_config`. Raises ValueError, naming key and value, for what is missing or impossible."""
    if fields.read(hf, "hidden_act", "quick_gelu") != "quick_gelu":
        fields.refuse("hidden_act", hf["hidden_act"], "'quick_gelu'")
    hidden = fields.size(hf, "embed_dim", 1280)
    return VisionConfig(
        hidden=hidden, width=fields.size(hf, "hidden_size"), inner=int(hidden * fields.number(hf, "mlp_ratio", 4)),
        **common(hf, hidden),
    )  # fmt: skip


def common(hf: Mapping, hidden: int) -> dict:
    """The fields that both versions name alike."""
    heads = fields.size(hf, "num_heads", 16)
    if hidden % (4 * heads):
        fields.refuse("num_heads", heads, f"such that the size of a head of {hidden} is a multiple of 4, for rope")
    rope = hf.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") not in ("axial", "default"):
        fields.refuse("rope_type", rope["rope_type"], "'axial' in a vision tower")
    tokens = fields.read(hf, "tokens", None)
    pair = isinstance(tokens, (list, tuple)) and [type(n) for n in tokens] == [int, int]
    if tokens is not None and not (pair and 0 < tokens[0] <= tokens[1]):
        fields.refuse("tokens", tokens, "two integers, how many an image is resized to at least and at most")
    return {
        "tokens": tokens and tuple(tokens),
        "layers": fields.size(hf, "depth", 32),
        "heads": heads,
        "channels": fields.size(hf, "in_channels", hf.get("in_chans") or 3),
        "patch": fields.size(hf, "patch_size", 14),
        "frames": fields.size(hf, "temporal_patch_size", 2),
        "merge": fields.size(hf, "spatial_merge_size", 2),
        "theta": fields.number(rope, "rope_theta", 10_000.0),
        "std": fields.number(hf, "initializer_range", 0.02),
    }


def mlp_specs(cfg: VisionConfig, name: str) -> dict[str, ParamSpec]:
    up = projection(f"{name}.fc1", cfg.inner, cfg.hidden, True, cfg.std)
    return up | projection(f"{name}.fc2", cfg.hidden, cfg.inner, True, cfg.std)


def specs(
    cfg: VisionConfig, prefix: str, norm: Callable = norm_specs, mlp: Callable = mlp_specs
) -> dict[str, ParamSpec]:
    """Every parameter, by the names of the published checkpoints. norm, mlp: the specs of those parts."""
    hidden, grouped = cfg.hidden, cfg.hidden * cfg.group
    first = f"{prefix}.patch_embed.proj"
    patches = projection(first, hidden, cfg.channels * cfg.frames * cfg.patch**2, False, cfg.std)[f"{first}.weight"]
    shape = (hidden, cfg.channels, cfg.frames, cfg.patch, cfg.patch)
    out = {f"{first}.weight": ParamSpec(shape, patches.init)}
    for layer in range(cfg.layers):
        at = f"{prefix}.blocks.{layer}"
        out |= norm(f"{at}.norm1", hidden) | norm(f"{at}.norm2", hidden)
        for name in cfg.projections:
            out |= projection(f"{at}.attn.{name}", len(name) * hidden, hidden, True, cfg.std)
        out |= projection(f"{at}.attn.proj", hidden, hidden, True, cfg.std) | mlp(cfg, f"{at}.mlp")
    out |= norm(f"{prefix}.merger.ln_q", hidden)
    out |= projection(f"{prefix}.merger.mlp.0", grouped, grouped, True, cfg.std)
    return out | projection(f"{prefix}.merger.mlp.2", cfg.width, grouped, True, cfg.std)


def blank(cfg: VisionConfig) -> Item:
    pixels = torch.zeros(cfg.group, cfg.channels * cfg.frames * cfg.patch**2)
    return Item({"patches": pixels, "position": torch.zeros(cfg.group, 2, dtype=torch.long)}, torch.tensor([-1]))


def encode(p: Mapping[str, Tensor], prefix: str, x: Mapping[str, Tensor], cfg: VisionConfig, ops: Ops) -> Tensor:
    """x: patches [P, channels * frames * patch * patch], position [P, 2] and item [P] -> [P / group, out]."""
    mask = ops.local_mask(x["item"][None])

    def mlp(q, y):
        inner = project(q, "mlp.fc1", y, ops)
        return project(q, "mlp.fc2", inner * torch.sigmoid(1.702 * inner), ops)

    return tower(p, prefix, x, cfg, ops, partial(layer_norm, eps=EPS), mlp, [mask] * cfg.layers)


def tower(
    p: Mapping[str, Tensor], prefix: str, x: Mapping[str, Tensor], cfg: VisionConfig, ops: Ops,
    norm: Callable, mlp: Callable, masks: Sequence,
) -> Tensor:  # fmt: skip
    """What the versions share. norm: (parameters, name, y) -> y; mlp: (parameters, y) -> y; masks: of each layer."""
    y, _ = blocks(p, prefix, embed(p, prefix, x, ops), x["position"], cfg, ops, norm, mlp, masks)
    y = norm(p, f"{prefix}.merger.ln_q", y).reshape(-1, cfg.group * cfg.hidden)
    return project(p, f"{prefix}.merger.mlp.2", F.gelu(project(p, f"{prefix}.merger.mlp.0", y, ops)), ops)


def embed(p: Mapping[str, Tensor], prefix: str, x: Mapping[str, Tensor], ops: Ops) -> Tensor:
    """The patches [P, hidden] that the layers take."""
    first = p[f"{prefix}.patch_embed.proj.weight"].flatten(1)  # a convolution whose stride is its kernel
    return ops.linear(x["patches"].to(first.dtype), first, p.get(f"{prefix}.patch_embed.proj.bias"))


def blocks(
    p: Mapping[str, Tensor], prefix: str, y: Tensor, position: Tensor, cfg: VisionConfig, ops: Ops,
    norm: Callable, mlp: Callable, masks: Sequence, read: Sequence[int] = (),
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The layers: y [P, hidden] -> the last one's output, and those of the layers in `read`."""
    cos, sin = rope_tables(position, cfg)

    def block(q, y, layer):
        normed = norm(q, "norm1", y)
        qkv = [t for name in cfg.projections for t in project(q, f"attn.{name}", normed, ops).chunk(len(name), -1)]
        query, key, value = (t.unflatten(-1, (cfg.heads, -1))[None] for t in qkv)
        query, key = (rotate(t.float(), cos, sin).to(t.dtype) for t in (query, key))
        seen = ops.local_attention(query, key, value, masks[layer])
        y = y + project(q, "attn.proj", seen[0].flatten(1), ops)
        y = y + mlp(q, norm(q, "norm2", y))
        return y, (y if layer in read else None)

    y, outputs = ops.scan(block, p, f"{prefix}.blocks", cfg.layers, y)
    return y, [output for output in outputs if output is not None]


def rope_tables(position: Tensor, cfg: VisionConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [P, 1, D/2]: half of a head's pairs are turned by a patch's row, half by its column."""
    half = cfg.hidden // cfg.heads // 2
    freq = cfg.theta ** -(torch.arange(0, half, 2, device=position.device, dtype=torch.float32) / half)
    angles = (position[..., None].float() * freq).flatten(1)[:, None]
    return angles.cos(), angles.sin()


def from_processor(pixels: Tensor, grids: Tensor, cfg: VisionConfig) -> list[Item]:
    """transformers' `pixel_values` [patches, ...] and `image_grid_thw` [n, 3] (or a video's) -> an item for each step
    in time, the slots of all counting 0, 1, ...

    Raises ValueError for a grid that is not of whole groups, or patches that are not those of the grids.
    """
    width = cfg.channels * cfg.frames * cfg.patch**2
    if pixels.ndim != 2 or pixels.shape[1] != width or len(pixels) != int(grids.prod(-1).sum()):
        raise ValueError(
            f"patches {list(pixels.shape)} for the grids {grids.tolist()}: there must be "
            f"{int(grids.prod(-1).sum())} of them, of {width} numbers each"
        )
    out: list[Item] = []
    start = 0
    for t, h, w in grids.tolist():
        if min(t, h, w) < 1 or h % cfg.merge or w % cfg.merge:
            raise ValueError(f"a grid of {h} x {w} patches: both must be positive multiples of {cfg.merge}")
        at = torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(h // cfg.merge, cfg.merge, -1, cfg.merge, 2)
        position = at.transpose(1, 2).reshape(-1, 2)
        for first in range(start, start + t * h * w, h * w):
            slots = torch.arange(first // cfg.group, (first + h * w) // cfg.group)
            out.append(Item({"patches": pixels[first : first + h * w].float(), "position": position}, slots))
        start += t * h * w
    return out


def items(
    raw: np.ndarray | Tensor, cfg: VisionConfig, tokens: tuple[float, float] | None = None, colours=(MEAN, DEVIATION)
) -> list[Item]:
    """A picture uint8 [H, W, 3], or a video's frames [T, H, W, 3], resized so that a step has `tokens` tokens, at
    least and at most. colours: what is taken off each, of 0..1, and divided by. Raises ValueError for what is neither.
    """
    raw = np.asarray(raw)
    if raw.dtype != np.uint8 or raw.ndim not in (3, 4) or raw.shape[-1] != 3 or not raw.size:
        raise ValueError(f"{raw.dtype} {list(raw.shape)} is no picture: it must be uint8 [H, W, 3], or [T, H, W, 3]")
    still = raw.ndim == 3
    usual = TOKENS_OF_IMAGE if still else TOKENS_OF_VIDEO
    sizes = resized(*raw.shape[-3:-1], cfg.patch * cfg.merge, tokens or cfg.tokens or usual)
    frames = np.stack([_resize(frame, sizes) for frame in (raw[None] if still else raw)])
    frames = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % cfg.frames, 0)])
    mean, deviation = map(np.float32, colours)
    scaled = (frames.astype(np.float32) / 255 - mean) / deviation
    return from_processor(*patchify(torch.from_numpy(scaled), cfg), cfg)


def patchify(frames: Tensor, cfg: VisionConfig) -> tuple[Tensor, Tensor]:
    """[T, H, W, C] -> patches [t*h*w, C * frames * patch * patch] in the processors' order, and the grid [1, 3]."""
    T, H, W, C = frames.shape
    t, h, w, m, s = T // cfg.frames, H // cfg.patch, W // cfg.patch, cfg.merge, cfg.patch
    parts = frames.reshape(t, cfg.frames, h // m, m, s, w // m, m, s, C)
    patches = parts.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, -1)
    return patches, torch.tensor([[t, h, w]])


def resized(height: int, width: int, multiple: int, tokens: tuple[float, float]) -> tuple[int, int]:
    """The nearest size of whole multiples and about the same proportions, within so many tokens (multiple ** 2 pixels
    each). Raises ValueError where one side is over 200 times the other."""
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"a picture of {height} x {width} pixels: one side may be at most 200 times the other")
    least, most = (n * multiple**2 for n in tokens)
    h, w = round(height / multiple) * multiple, round(width / multiple) * multiple
    if h * w > most:
        scale = math.sqrt(height * width / most) * multiple
        h, w = (max(1, math.floor(side / scale)) * multiple for side in (height, width))
    elif h * w < least:
        scale = math.sqrt(least / (height * width)) / multiple
        h, w = (math.ceil(side * scale) * multiple for side in (height, width))
    return h, w


def _resize(picture: np.ndarray, sizes: tuple[int, int]) -> np.ndarray:
    if picture.shape[:2] == sizes:
        return picture
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize(sizes[::-1], Image.Resampling.BICUBIC))


def example(cfg: VisionConfig, generator: torch.Generator) -> np.ndarray:
    """A small picture of noise."""
    sides = torch.randint(2, 5, (2,), generator=generator) * cfg.patch * cfg.merge
    return torch.randint(256, (*sides.tolist(), 3), generator=generator, dtype=torch.uint8).numpy()

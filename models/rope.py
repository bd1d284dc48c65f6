"""Rotary position embedding, with every scaling that transformers' rope utilities offer these families.

A variant gives the angle per position of each of the D/2 pairs of a head's elements, and a
factor on cos and sin. Formulas after transformers/modeling_rope_utils.py and the papers it
cites (NTK-aware and YaRN: arXiv 2309.00071; LongRoPE: arXiv 2402.13753); names are the config's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .fields import MISSING, flag, number, read, refuse, size


@dataclass(frozen=True)
class Rope:
    """type: a key of VARIANTS; options: what this variant reads beside theta, by the config's names.
    axes: where positions have several coordinates (time, height, width), the one that turns each of the D/2 pairs
    (multimodal rope, arXiv 2409.12191)."""

    type: str
    theta: float
    head_dim: int
    max_positions: int
    options: Mapping[str, Any]
    axes: tuple[int, ...] = ()

    @property
    def by_length(self) -> bool:
        """Whether the angles depend on the batch's largest position (past `max_positions` or the original ones)."""
        return self.type in ("dynamic", "longrope")


def _plain(theta: float | Tensor, rope: Rope, device) -> Tensor:
    D = rope.head_dim
    return 1.0 / theta ** (torch.arange(0, D, 2, device=device, dtype=torch.float32) / D)


def _default(rope: Rope, length, device):
    return _plain(rope.theta, rope, device), 1.0


def _linear(rope: Rope, length, device):
    return _plain(rope.theta, rope, device) / rope.options["factor"], 1.0


def _dynamic(rope: Rope, length, device):
    """The base grows with the sequence, once that is longer than the model was trained for."""
    factor, D = rope.options["factor"], rope.head_dim
    stretch = factor * length.clamp(min=rope.max_positions) / rope.max_positions - (factor - 1)
    return _plain(rope.theta * stretch ** (D / (D - 2)), rope, device), 1.0


def _yarn(rope: Rope, length, device):
    """Fast pairs keep their angle, slow ones are interpolated, those between are blended."""
    o, D = rope.options, rope.head_dim
    original = o["original_max_position_embeddings"]
    factor = o["factor"] or rope.max_positions / original

    def pair_that_turns(times):  # the (fractional) pair that makes `times` turns over the original length
        return D * math.log(original / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_that_turns(o["beta_fast"]), pair_that_turns(o["beta_slow"])
    if o["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, D - 1)
    pairs = torch.arange(D // 2, device=device, dtype=torch.float32)
    kept = 1 - ((pairs - first) / ((last - first) or 0.001)).clamp(0, 1)
    freq = _plain(rope.theta, rope, device)
    return freq / factor * (1 - kept) + freq * kept, o["attention_factor"] or _yarn_scale(factor, o)


def _yarn_scale(factor: float, o: Mapping) -> float:
    def mscale(weight):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if o["mscale"] and o["mscale_all_dim"]:
        return mscale(o["mscale"]) / mscale(o["mscale_all_dim"])
    return mscale(1.0)


def _longrope(rope: Rope, length, device):
    """A factor per pair: one list for short batches, one for those longer than the original length."""
    o = rope.options
    original = o["original_max_position_embeddings"]
    factor = o["factor"] or rope.max_positions / original
    scale = o["attention_factor"]
    if not scale:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (torch.tensor(o[name], device=device) for name in ("short_factor", "long_factor"))
    return _plain(rope.theta, rope, device) / torch.where(length > original, long, short), scale


def _llama3(rope: Rope, length, device):
    """Pairs of long wavelength are slowed by `factor`, those of short wavelength kept, the rest blended."""
    o = rope.options
    freq = _plain(rope.theta, rope, device)
    low, high = o["low_freq_factor"], o["high_freq_factor"]
    turns = o["original_max_position_embeddings"] * freq / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return freq / o["factor"] * (1 - kept) + freq * kept, 1.0


def _proportional(rope: Rope, length, device):
    """Only the first pairs turn, with the angles that they have in a full head."""
    freq = _plain(rope.theta, rope, device) / rope.options["factor"]
    turning = int(rope.options["partial_rotary_factor"] * rope.head_dim // 2)
    return torch.where(torch.arange(freq.shape[0], device=device) < turning, freq, 0.0), 1.0


# type -> (formula, the options it reads and their defaults; MISSING: the config must say)
VARIANTS = {
    "default": (_default, {}),
    "linear": (_linear, {"factor": MISSING}),
    "dynamic": (_dynamic, {"factor": MISSING}),
    "yarn": (
        _yarn,
        {"factor": None, "attention_factor": None, "beta_fast": 32, "beta_slow": 1}
        | {"mscale": None, "mscale_all_dim": None, "truncate": True, "original_max_position_embeddings": MISSING},
    ),
    "longrope": (
        _longrope,
        {"short_factor": MISSING, "long_factor": MISSING, "factor": None, "attention_factor": None}
        | {"original_max_position_embeddings": MISSING},
    ),
    "llama3": (
        _llama3,
        {"factor": MISSING, "low_freq_factor": MISSING, "high_freq_factor": MISSING}
        | {"original_max_position_embeddings": MISSING},
    ),
    "proportional": (_proportional, {"factor": 1.0, "partial_rotary_factor": 1.0}),
}


def rope_config(hf: Mapping, head_dim: int, max_positions: int) -> Rope:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4).

    Raises ValueError for an unknown type, or a missing or impossible option.
    """
    given = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        refuse("rope_parameters", given, "one flat set of options for all layers")
    kind = read(given, "rope_type", given.get("type") or "default")
    if kind == "mrope":  # the older name of the default with sections
        kind = "default"
    if not isinstance(kind, str) or kind not in VARIANTS:
        refuse("rope_type", kind, f"one of {', '.join(VARIANTS)}")
    outside = {"original_max_position_embeddings": max_positions, **hf}
    for key in ("original_max_position_embeddings", "partial_rotary_factor", "rope_theta"):
        given = {key: outside.get(key), **given}
    if hf.get("original_max_position_embeddings") is not None:  # at the top of the config, this one prevails
        given["original_max_position_embeddings"] = hf["original_max_position_embeddings"]

    options = {key: _option(given, key, default, head_dim) for key, default in VARIANTS[kind][1].items()}
    if "partial_rotary_factor" not in options and given["partial_rotary_factor"] not in (None, 1):
        refuse("partial_rotary_factor", given["partial_rotary_factor"], f"1 with rope_type {kind!r}")
    if kind == "dynamic" and head_dim == 2:
        refuse("head_dim", head_dim, "more than 2 with rope_type 'dynamic'")
    if kind == "llama3" and options["high_freq_factor"] <= options["low_freq_factor"]:
        refuse("high_freq_factor", options["high_freq_factor"], "greater than low_freq_factor")
    return Rope(kind, number(given, "rope_theta", 10_000.0), head_dim, max_positions, options, _axes(given, head_dim))


def _axes(given: Mapping, head_dim: int) -> tuple[int, ...]:
    """`mrope_section`: how many pairs each axis turns, one axis after the other or (`mrope_interleaved`) in turns."""
    sections = given.get("mrope_section")
    if sections is None:
        return ()
    whole = isinstance(sections, (list, tuple)) and all(type(n) is int and n >= 0 for n in sections)
    if not whole or sum(sections) != head_dim // 2:
        refuse("mrope_section", sections, f"a list of whole numbers that sum to head_dim / 2 = {head_dim // 2}")
    if not flag(given, "mrope_interleaved", False):
        return tuple(axis for axis, n in enumerate(sections) for _ in range(n))
    axes = [0] * (head_dim // 2)
    for axis, n in enumerate(sections[1:], 1):
        for pair in range(axis, min(axis + len(sections) * n, len(axes)), len(sections)):
            axes[pair] = axis
    return tuple(axes)


def _option(given: Mapping, key: str, default: Any, head_dim: int) -> Any:
    value = read(given, key, default)
    if key in ("short_factor", "long_factor"):
        numbers = isinstance(value, (list, tuple)) and all(type(v) in (int, float) and v > 0 for v in value)
        if not numbers or len(value) != head_dim // 2:
            refuse(key, value, f"a list of {head_dim // 2} positive numbers, one per pair of a head's elements")
        return tuple(map(float, value))
    if key == "original_max_position_embeddings":
        return size(given, key)
    if isinstance(default, bool):
        return flag(given, key, default)
    return None if value is None else number(given, key, default)


def rope_tables(rope: Rope, positions: Tensor, dtype: torch.dtype, last: Tensor | None = None):
    """cos and sin, both [B, S, 1, D/2], of each token's angles: positions [B, S], or [B, S, axes].

    last: the largest position of the whole batch, where `positions` is only a part of it;
        used by the variants that are `by_length`.
    """
    length = (positions.max() if last is None else last) + 1 if rope.by_length else None
    freq, scale = VARIANTS[rope.type][0](rope, length, positions.device)
    turned_by = positions[..., rope.axes] if positions.ndim == 3 else positions[..., None]
    angles = turned_by[..., None, :].float() * freq
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of a head by its angle: x [B, S, N, D]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

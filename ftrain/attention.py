"""Attention over packed documents: SDPA with a mask, or flash-attn's varlen kernel on GPUs that have it.

Each way is a pair: `mask` makes, once a forward, what `attention` then takes in every layer.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_mask(segment_ids: Tensor, window: int | None = None, causal: bool = True) -> Tensor:
    """segment_ids [B, S] -> bool [B, 1, S, S], true where query (row) may look at key (column): within one segment
    and, unless not `causal`, not ahead and at most `window` tokens back (itself counted)."""
    if not causal:
        return same_segment(segment_ids)
    S = segment_ids.shape[1]
    at = torch.arange(S, device=segment_ids.device)
    back = at[:, None] - at[None, :]
    allowed = back >= 0
    if window is not None:
        allowed = allowed & (back < window)
    return same_segment(segment_ids) & allowed


def same_segment(segment_ids: Tensor, of_keys: Tensor | None = None) -> Tensor:
    """segment_ids [B, S], of_keys [B, L] (by default the same) -> bool [B, 1, S, L], true within one segment."""
    of_keys = segment_ids if of_keys is None else of_keys
    return segment_ids[:, None, :, None] == of_keys[:, None, None, :]


def attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """q [B, S, N, D], k and v [B, S, K, D], K divides N -> [B, S, N, D]; scale 1/sqrt(D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, allowed, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


class Packed(NamedTuple):
    """Documents of a batch read as one row of B*S tokens: where each starts and the last ends
    (int32 [documents + 1]), the length that none exceeds, the window, and whether a token sees only those before."""

    bounds: Tensor
    longest: int
    window: int | None
    causal: bool


def packed_mask(segment_ids: Tensor, window: int | None = None, causal: bool = True) -> Packed:
    """segment_ids [B, S], equal ones in one run -> Packed. A row always starts a document; padding counts as one."""
    B, S = segment_ids.shape
    starts = F.pad(segment_ids.diff(dim=1) != 0, (1, 0), value=True)
    first = starts.flatten().nonzero()[:, 0]
    return Packed(torch.cat([first, first.new_tensor([B * S])]).to(torch.int32), S, window, causal)


def packed_segments(segment_ids: Tensor, of_keys: Tensor | None = None) -> Packed | Tensor:
    """`same_segment` as Packed; queries and keys of different lengths are left to SDPA."""
    return packed_mask(segment_ids, causal=False) if of_keys is None else same_segment(segment_ids, of_keys)


def packed_attention(varlen: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`attention` by a kernel with the signature of flash_attn.flash_attn_varlen_func (arXiv 2307.08691)."""

    def of_packed(q: Tensor, k: Tensor, v: Tensor, mask: Packed | Tensor) -> Tensor:
        if isinstance(mask, Tensor):
            return attention(q, k, v, mask)
        window = (-1, -1) if mask.window is None else (mask.window - 1, 0)
        out = varlen(
            *(t.flatten(0, 1) for t in (q, k, v)), mask.bounds, mask.bounds, mask.longest, mask.longest,
            causal=mask.causal, window_size=window,
        )  # fmt: skip
        return out.view(q.shape)

    return of_packed


def attention_for(device_type: str, dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    """The ops `mask`, `local_mask`, `attention` and `local_attention` for a device and a compute dtype: flash-attn
    where it is installed and can serve."""
    if device_type == "cuda" and dtype != torch.float32 and importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_varlen_func

        packed = packed_attention(flash_attn_varlen_func)
        return {
            "mask": packed_mask, "local_mask": packed_segments, "attention": packed, "local_attention": packed,
        }  # fmt: skip
    return {
        "mask": attention_mask, "local_mask": same_segment, "attention": attention, "local_attention": attention,
    }  # fmt: skip

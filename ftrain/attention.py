"""Attention over packed documents: SDPA with a mask, or flash-attn's varlen kernel on GPU."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Mask(NamedTuple):
    """Who sees whom. `allowed` is [B, 1, S, S], true where query (row) may look at key (column)."""

    allowed: Tensor


def attention_mask(segment_ids: Tensor, window: int | None = None) -> Mask:
    """Causal, within one segment, at most `window` tokens back (itself counted): segment_ids [B, S]."""
    S = segment_ids.shape[1]
    at = torch.arange(S, device=segment_ids.device)
    back = at[:, None] - at[None, :]
    allowed = back >= 0
    if window is not None:
        allowed = allowed & (back < window)
    return Mask((segment_ids[:, None, :, None] == segment_ids[:, None, None, :]) & allowed)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """q [B, S, N, D], k and v [B, S, K, D], K divides N -> [B, S, N, D]; scale 1/sqrt(D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask.allowed, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)

"""Attention that remembers: rows given piece by piece, each token's keys and values computed once."""

from dataclasses import replace
from itertools import count

import torch
from torch import Tensor

from .attention import same_segment
from .ops import Ops


def remembering(ops: Ops, layers: int) -> Ops:
    """`ops` whose attention sees, besides what a forward is given, what those before it were: the same B rows' next
    tokens each time. For one device, without gradients, with masks made once a forward.

    layers: how often a forward calls `attention`.
    Its `mask` raises ValueError for a window, and where a token also sees later ones.
    """
    past: list[tuple[Tensor, Tensor]] = []
    segments: list[Tensor] = []
    calls = count()

    def mask(segment_ids: Tensor, window: int | None = None, causal: bool = True) -> Tensor:
        if window is not None or not causal:
            raise ValueError("attention that remembers is causal and has no window")
        segments[:] = [torch.cat([*segments, segment_ids], 1)]
        at = torch.arange(segments[0].shape[1], device=segment_ids.device)
        return same_segment(segment_ids, segments[0]) & (at <= at[-segment_ids.shape[1] :, None])

    def attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        layer = next(calls) % layers
        if layer == len(past):
            past.append((k, v))
        else:
            past[layer] = tuple(torch.cat(pair, 1) for pair in zip(past[layer], (k, v), strict=True))
        return ops.local_attention(q, *past[layer], allowed)

    return replace(ops, mask=mask, attention=attention)

"""Attention over packed documents: SDPA with a mask, document by document on a CPU, flash-attn's varlen kernel on GPUs
that have it.

Each way is a pair: `mask` makes, once a forward, what `attention` then takes in every layer.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .flops import emulated

aten = torch.ops.aten


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


class Documents(NamedTuple):
    """Which tokens belong together: segment_ids [B, S], equal ones in one run; window and causal as for `Packed`."""

    segment_ids: Tensor
    window: int | None
    causal: bool


def documents(segment_ids: Tensor, window: int | None = None, causal: bool = True) -> Documents:
    return Documents(segment_ids, window, causal)


def local_documents(segment_ids: Tensor, of_keys: Tensor | None = None) -> Documents | Tensor:
    """`same_segment` as Documents; queries and keys of different lengths are left to SDPA."""
    return documents(segment_ids, causal=False) if of_keys is None else same_segment(segment_ids, of_keys)


def document_attention(q: Tensor, k: Tensor, v: Tensor, mask: Documents | Tensor) -> Tensor:
    """`attention` that computes nothing between documents, nor ahead of a query, rather than mask it."""
    if isinstance(mask, Tensor):
        return attention(q, k, v, mask)
    return _by_document(q, k, v, mask.segment_ids, mask.window or 0, mask.causal)[0]


def _runs(segment_ids: Tensor) -> list[tuple[slice, slice]]:
    """(rows, columns) of every document; neighbouring rows that are cut alike are one."""
    B, S = segment_ids.shape
    ends: list[list[int]] = [[] for _ in range(B)]
    for row, at in (segment_ids.diff(dim=1) != 0).nonzero().tolist():
        ends[row].append(at + 1)
    found, first = [], 0
    for row in range(1, B + 1):
        if row == B or ends[row] != ends[first]:
            bounds = [0, *ends[first], S]
            found += [(slice(first, row), slice(a, b)) for a, b in zip(bounds, bounds[1:])]
            first = row
    return found


def _run_ids(segment_ids: Tensor) -> list[list[int]]:
    """The segment of each run of a row, padding aside."""
    starts = F.pad(segment_ids.diff(dim=1) != 0, (1, 0), value=True) & (segment_ids >= 0)
    return [row[at].tolist() for row, at in zip(segment_ids, starts)]


CALL = 1_500_000  # multiply-adds of queries with keys that take about as long as one more call of the kernel


def _pieces(tensors: list[Tensor], segment_ids: Tensor, window: int, causal: bool):
    """Document by document, or all at once where they are so short that a mask is less work: rows, columns, their
    part of each [B, S, N, D] as [b, N, s, D], is_causal, and what is added to the scores."""
    B, S, N, D = tensors[0].shape
    runs = _runs(segment_ids)
    # Of a segment in several runs (an attention mask with holes) each would be a document of its own.
    whole = all(len(set(ids)) == len(ids) for ids in _run_ids(segment_ids))
    work = sum((r.stop - r.start) * (c.stop - c.start) ** 2 for r, c in runs) * N * D // 2 + len(runs) * CALL
    if not whole or work > B * S * S * N * D + CALL:
        runs = [(slice(0, B), slice(0, S))]
    for rows, columns in runs:
        own = segment_ids[rows, columns]
        alone = bool((own == own[:, :1]).all())
        masked = not alone or (causal and 0 < window < own.shape[1])
        added = None
        if masked:
            allowed = attention_mask(own[:1] if alone else own, window or None, causal)
            added = torch.zeros(allowed.shape, dtype=tensors[0].dtype).masked_fill(~allowed, -torch.inf)
        yield rows, columns, [t[rows, columns].transpose(1, 2) for t in tensors], causal and not masked, added


def _new_lse(q: Tensor) -> Tensor:
    B, S, N, _ = q.shape
    return q.new_empty(B, N, S, dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("ftrain::by_document", mutates_args=())
def _by_document(
    q: Tensor, k: Tensor, v: Tensor, segment_ids: Tensor, window: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """-> [B, S, N, D] and each query's logsumexp [B, N, S], by torch's flash kernel for CPUs. window: 0 for none."""
    like, (q, k, v) = q, _wide(q, k, v)
    k, v = (_repeated(t, q.shape[2] // k.shape[2]) for t in (k, v))
    out = lse = None
    for rows, columns, parts, ahead, added in _pieces([q, k, v], segment_ids, window, causal):
        o, scores = aten._scaled_dot_product_flash_attention_for_cpu(*parts, 0.0, ahead, attn_mask=added)
        if o.numel() == q.numel():  # all at once
            out, lse = o.transpose(1, 2), scores
        else:
            out, lse = (q.new_empty(q.shape), _new_lse(q)) if out is None else (out, lse)
            out[rows, columns] = o.transpose(1, 2)
            lse[rows, :, columns] = scores
    return out.to(like.dtype).contiguous(), lse.contiguous()


def _repeated(t: Tensor, n: int) -> Tensor:
    """Each key or value head n times: [B, S, K, D] -> [B, S, K * n, D]."""
    return t if n == 1 else t[:, :, :, None].expand(-1, -1, -1, n, -1).flatten(2, 3)


@_by_document.register_fake
def _(q, k, v, segment_ids, window, causal):
    return torch.empty_like(q, memory_format=torch.contiguous_format), _new_lse(q)


@torch.library.custom_op("ftrain::by_document_backward", mutates_args=())
def _by_document_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segment_ids: Tensor, window: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    like, (grad, q, k, v, out) = (q, k, v), _wide(grad, q, k, v, out)
    groups = q.shape[2] // k.shape[2]
    k, v = _repeated(k, groups), _repeated(v, groups)
    grads: list[Tensor] = []
    for rows, columns, (g, *parts, o), ahead, added in _pieces([grad, q, k, v, out], segment_ids, window, causal):
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, *parts, o, lse[rows, :, columns], 0.0, ahead, attn_mask=added
        )
        if g.numel() == grad.numel():  # all at once
            grads = [part.transpose(1, 2) for part in found]
        else:
            grads = grads or [q.new_empty(q.shape) for _ in range(3)]
            for whole, part in zip(grads, found):
                whole[rows, columns] = part.transpose(1, 2)
    if groups > 1:
        grads[1:] = [t.unflatten(2, (-1, groups)).sum(3) for t in grads[1:]]
    return tuple(g.to(t.dtype).contiguous() for g, t in zip(grads, like))


@_by_document_backward.register_fake
def _(grad, q, k, v, out, lse, segment_ids, window, causal):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.how = inputs[4:]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    q, k, v, segment_ids, out, lse = ctx.saved_tensors
    return *_by_document_backward(grad.contiguous(), q, k, v, out, lse, segment_ids, *ctx.how), None, None, None


_by_document.register_autograd(_backward, setup_context=_save)


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.float() for t in tensors) if emulated(tensors[0]) else tensors


def attention_for(device_type: str, dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    """The ops `mask`, `local_mask`, `attention` and `local_attention` for a device and a compute dtype: flash-attn
    where it is installed and can serve."""
    if device_type == "cuda" and dtype != torch.float32 and importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_varlen_func

        packed = packed_attention(flash_attn_varlen_func)
        return {
            "mask": packed_mask, "local_mask": packed_segments, "attention": packed, "local_attention": packed,
        }  # fmt: skip
    if device_type == "cpu":
        return {
            "mask": documents, "local_mask": local_documents,
            "attention": document_attention, "local_attention": document_attention,
        }  # fmt: skip
    return {
        "mask": attention_mask, "local_mask": same_segment, "attention": attention, "local_attention": attention,
    }  # fmt: skip

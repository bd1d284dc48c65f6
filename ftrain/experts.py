"""Experts on one device: sort the tokens by expert, multiply each group by its own weights, sort back.

Shapes: T tokens, k experts chosen by each, R = T*k rows to work on, E experts, H hidden,
I an expert's inner width. Nothing is dropped or padded, and nothing adds atomically:
the same input gives the same bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .flops import emulated


def sort_by_expert(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The stable permutation that brings each expert's rows together.

    index: int [...], each row's expert, read flat as [R].
    -> order [R] (the sorted rows are `rows[order]`), inverse [R] (its inverse), counts [E].
    """
    by_expert, order = index.reshape(-1).sort(stable=True)
    # Not in place: selective recomputation keeps outputs, and they may not change under it.
    inverse = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
    ends = torch.searchsorted(by_expert, torch.arange(experts, device=index.device), right=True)
    return order, inverse, ends.diff(prepend=ends.new_zeros(1))


class _Permute(torch.autograd.Function):
    """A gather whose gradient is a gather: `index_select`'s own would add atomically."""

    @staticmethod
    def forward(ctx, x, order, inverse, k):
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, order // k if k > 1 else order)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        grad = grad.index_select(0, inverse)
        return (grad.unflatten(0, (-1, ctx.k)).sum(1) if ctx.k > 1 else grad), None, None, None


def permute(x: Tensor, order: Tensor, inverse: Tensor, k: int = 1) -> Tensor:
    """Rows in the order of `order`, after repeating each row k times: x [R/k, H] -> [R, H].

    `permute(permute(x, order, inverse), inverse, order)` is x.
    """
    return _Permute.apply(x, order, inverse, k)


def _fits(dtype: torch.dtype, *widths: int) -> bool:
    """Whether torch's grouped kernel takes such rows: it wants whole 16-byte units, and no doubles."""
    return dtype != torch.float64 and all(width * dtype.itemsize % 16 == 0 for width in widths)


def _groups(offsets: Tensor) -> list[slice]:
    ends = offsets.tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends)]


@torch.library.custom_op("ftrain::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Each group of rows times its own matrix: x [R, K], w [E, N, K] -> [R, N].

    offsets: int32 [E], the row at which each group ends; the last is R. Differentiable in x and w.
    One operator to the compiler, because the fake kernel of torch's own refuses fp32.
    """
    if emulated(x):
        return grouped_mm(x.float(), w.float(), offsets).to(x.dtype)
    x = x.contiguous()
    if _fits(x.dtype, *w.shape[1:]):
        return F.grouped_mm(x, w.transpose(1, 2), offs=offsets)
    out = x.new_zeros(x.shape[0], w.shape[1])
    for rows, matrix in zip(_groups(offsets), w):
        torch.mm(x[rows], matrix.T, out=out[rows])
    return out


@grouped_mm.register_fake
def _(x, w, offsets):
    return x.new_empty(x.shape[0], w.shape[1])


@torch.library.custom_op("ftrain::grouped_outer", mutates_args=())
def grouped_outer(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """The sum of outer products within each group of rows: a [R, N], b [R, K] -> [E, N, K].

    A group without rows gives exact zeros. It is the weight's gradient in `grouped_mm`.
    """
    if emulated(a):
        return grouped_outer(a.float(), b.float(), offsets).to(a.dtype)
    a, b = a.contiguous(), b.contiguous()
    if _fits(a.dtype, a.shape[1], b.shape[1]):
        return F.grouped_mm(a.T, b, offs=offsets)
    return torch.stack([a[rows].T @ b[rows] for rows in _groups(offsets)])


@grouped_outer.register_fake
def _(a, b, offsets):
    return a.new_empty(offsets.shape[0], a.shape[1], b.shape[1])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    x, w, offsets = ctx.saved_tensors
    dx, dw, _ = ctx.needs_input_grad
    return (
        grouped_mm(grad, w.transpose(1, 2), offsets) if dx else None,
        grouped_outer(grad, x, offsets) if dw else None,
        None,
    )


grouped_mm.register_autograd(_backward, setup_context=_save)


def grouped_mlp(x: Tensor, counts: Tensor, gate: Tensor, up: Tensor, down: Tensor, grouped_mm=grouped_mm) -> Tensor:
    """Each row through its expert, down(silu(gate x) * up x).

    x [R, H], sorted by expert; counts [E], summing to R; gate and up [E, I, H], down [E, H, I] -> [R, H].
    `grouped_mm` is the product to use: another one may compute in float8.
    """
    offsets = counts.cumsum(0).to(torch.int32)
    inner = F.silu(grouped_mm(x, gate, offsets)) * grouped_mm(x, up, offsets)
    return grouped_mm(inner, down, offsets)


def combine(y: Tensor, weight: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Undo the sort and add up each token's k results: y [R, H], weight [T, k] -> [T, H]."""
    y = permute(y, inverse, order).unflatten(0, weight.shape)
    return (y * weight.unsqueeze(-1)).sum(1)


def local_experts(
    x: Tensor, weight: Tensor, index: Tensor, gate: Tensor, up: Tensor, down: Tensor, grouped_mm=grouped_mm
) -> Tensor:
    """`Ops.experts` with all experts at hand: x [T, H], weight and index [T, k] -> [T, H]."""
    order, inverse, counts = sort_by_expert(index, gate.shape[0])
    rows = permute(x, order, inverse, index.shape[1])
    return combine(grouped_mlp(rows, counts, gate, up, down, grouped_mm), weight, order, inverse)

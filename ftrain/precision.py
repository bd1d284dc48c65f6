"""Precision: what a matmul computes in. Master weights, optimizer and reductions are fp32 whatever is chosen here.

In float8 every product is preceded by a cast of both operands, scaled so that the largest
magnitude lands at the top of float8's range. The recipes are torchao's:

    fp8-tensorwise      one scale a tensor; gradients in e5m2, the rest in e4m3.
    fp8-rowwise         one power-of-two scale for each vector that is multiplied; e4m3.
    fp8-rowwise-gw-hp   rowwise, but the weight's gradient is computed in bf16.

Only `Ops.linear` and the experts' products are ever float8, so embeddings, the router, norms
and the unembedding (which the loss multiplies with) are not. A matrix whose two dimensions
are not both multiples of 16, which the kernels ask for, is multiplied in bf16.
"""

import contextlib
import dataclasses
import logging
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .collectives import Group, all_reduce
from .experts import grouped_mm, grouped_outer
from .items import on_one_device
from .model import Model, example

RECIPES = {"fp8-tensorwise": "tensorwise", "fp8-rowwise": "rowwise", "fp8-rowwise-gw-hp": "rowwise_with_gw_hp"}
PRECISIONS = ("fp32", "bf16", *RECIPES)
ALIGNMENT = 16

# The GPUs that torch has a float8 grouped kernel for: Hopper and data-centre Blackwell, not what lies between or after.
GROUPED_CAPABILITIES = ((9, 0), (10, 0))


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of weights as gathered and of activations. ValueError for an unknown precision."""
    _known(precision)
    return torch.float32 if precision == "fp32" else torch.bfloat16


def linear_for(precision: str) -> Callable[..., Tensor]:
    """`Ops.linear` in this precision: (x [..., in], w [out, in], b [out] or None) -> [..., out].

    x, w and b in the compute dtype. Forward and backward each run torch's `_scaled_mm`, on CPU
    as on GPU. Without rows, and with a w that does not fit, it is `F.linear`.
    Raises ValueError for an unknown precision.
    """
    _known(precision)
    if precision not in RECIPES:
        return F.linear
    matmul, *how = _torchao_matmul(RECIPES[precision])

    def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        if not fits(w.shape) or x.numel() == 0:
            return F.linear(x, w, b)
        y = matmul(x.reshape(-1, x.shape[-1]), w.t(), *how).reshape(*x.shape[:-1], w.shape[0])
        return y if b is None else y + b

    return linear


def grouped_mm_for(precision: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The experts' product in this precision: (x [R, K], w [E, N, K], offsets [E] int32) -> [R, N].

    offsets are the rows at which the groups end; the last is R. R may be 0, or unknown to the compiler.
    Every fp8 recipe scales rowwise here, tensorwise too: one scale for all experts' tokens would let one
    expert's outlier cost the others their resolution, and there is no grouped kernel for it.
    On GPUs that have one it is torchao's scaled grouped matmul, elsewhere `rowwise_grouped_mm`.
    Raises ValueError for an unknown precision.
    """
    _known(precision)
    if precision not in RECIPES:
        return grouped_mm
    with quiet():
        import torchao.float8  # noqa: F401  (here, quietly: `_rounded` imports from it)
    kernel = None
    if torch.cuda.is_available() and torch.cuda.get_device_capability() in GROUPED_CAPABILITIES:
        kernel = _torchao_grouped_mm()

    def grouped(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
        if not fits(w.shape):
            return grouped_mm(x, w, offsets)
        product = kernel if kernel and x.is_cuda else rowwise_grouped_mm
        if precision != "fp8-rowwise-gw-hp":
            return product(x, w, offsets)
        return _WeightGradient.apply(product(x, w.detach(), offsets), x.detach(), w, offsets)

    return grouped


def fits(shape: tuple[int, ...]) -> bool:
    """Whether a weight [..., out, in] can be multiplied in float8."""
    return len(shape) >= 2 and all(size % ALIGNMENT == 0 for size in shape[-2:])


# ---- The experts' product, emulated


class _RowwiseGroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, offsets):
        ctx.save_for_backward(x, w, offsets)
        return grouped_mm(_rounded(x), _rounded(w), offsets)

    @staticmethod
    def backward(ctx, dy):
        x, w, offsets = ctx.saved_tensors
        dx, dw, _ = ctx.needs_input_grad
        return (
            grouped_mm(_rounded(dy), _rounded(w.transpose(1, 2)), offsets) if dx else None,
            grouped_outer(_rounded_by_group(dy, offsets), _rounded_by_group(x, offsets), offsets) if dw else None,
            None,
        )


def rowwise_grouped_mm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """What a rowwise float8 `grouped_mm` computes, on any device: operands rounded to float8 and back.

    x [R, K], w [E, N, K], offsets [E] int32 -> [R, N]. Each of the three products (forward, x's gradient,
    w's gradient) rounds its two operands with a scale for each vector along the dimension it sums over.
    Power-of-two scales make the rounded values exact in bf16, so that this differs from a float8
    kernel by the order of its sums alone.
    """
    return _RowwiseGroupedMM.apply(x, w, offsets)


class _WeightGradient(torch.autograd.Function):
    """y as it is, but w's gradient is that of the unrounded product of x and w."""

    @staticmethod
    def forward(ctx, y, x, w, offsets):
        ctx.save_for_backward(x, offsets)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        x, offsets = ctx.saved_tensors
        return dy, None, grouped_outer(dy, x, offsets), None


def _rounded(x: Tensor, amax: Tensor | None = None) -> Tensor:
    """x to float8 and back, scaled for each vector along the last dimension, or as `amax` says."""
    from torchao.float8.config import e4m3_dtype
    from torchao.float8.float8_utils import amax_to_scale, to_fp8_saturated

    if amax is None:
        amax = x.abs().amax(-1, keepdim=True)
    scale = amax_to_scale(amax, e4m3_dtype, round_scales_to_power_of_2=True)
    return (to_fp8_saturated(x.float() * scale, e4m3_dtype).float() / scale).to(x.dtype)


def _rounded_by_group(x: Tensor, offsets: Tensor) -> Tensor:
    """x [R, C] to float8 and back, with a scale for each column of each group of rows."""
    return _rounded(x, group_amax(x, offsets)[_group_of_row(x, offsets)])


@torch.library.custom_op("ftrain::group_amax", mutates_args=())
def group_amax(x: Tensor, offsets: Tensor) -> Tensor:
    """The largest magnitude in each column of each group of rows: x [R, C] -> [E, C]; 0 without rows.

    A loop, hidden from the compiler, because `scatter_reduce` takes twenty times as long on CPU.
    """
    ends = offsets.tolist()
    groups = (x[start:end] for start, end in zip([0, *ends], ends))
    return torch.stack([rows.abs().amax(0) if len(rows) else x.new_zeros(x.shape[1]) for rows in groups])


@group_amax.register_fake
def _(x, offsets):
    return x.new_empty(offsets.shape[0], x.shape[1])


def _group_of_row(x: Tensor, offsets: Tensor) -> Tensor:
    return torch.searchsorted(offsets, torch.arange(x.shape[0], dtype=offsets.dtype, device=x.device), right=True)


# ---- The experts' product, by torchao


def in_aligned_groups(kernel: Callable) -> Callable:
    """A grouped product for any group sizes from a `kernel` that wants groups of a positive multiple of 16 rows.

    Each group is extended by rows of zeros, an empty one too: they change neither a scale nor a sum. The padded
    row count, R + 16 E rounded up, does not depend on the routing; rows that no group claims are not read back.
    """

    def grouped(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
        R, E = x.shape[0], offsets.shape[0]
        ends = offsets.long()
        starts = F.pad(ends, (1, -1))
        sizes = ((ends - starts + ALIGNMENT - 1) // ALIGNMENT).clamp(min=1) * ALIGNMENT
        padded_ends = sizes.cumsum(0)
        shift = padded_ends - sizes - starts
        at = torch.arange(R, device=x.device) + shift[_group_of_row(x, offsets)]
        rows = (R + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT + E * ALIGNMENT
        padded = x.new_zeros(rows, x.shape[1]).index_copy(0, at, x)
        return kernel(padded, w, padded_ends.to(offsets.dtype)).index_select(0, at)

    return grouped


def _torchao_grouped_mm() -> Callable:
    with quiet():
        from torchao.prototype.moe_training import _to_fp8_rowwise_then_scaled_grouped_mm as scaled

    def kernel(x, w, offsets):
        return scaled(x, w.transpose(1, 2), offsets, x.dtype, pad_token_groups_for_grouped_mm=False)

    return in_aligned_groups(kernel)


def _torchao_matmul(recipe: str) -> tuple:
    """torchao's differentiable matmul of unrounded arguments, and the two configs it wants after them."""
    with quiet():
        from torchao.float8.config import Float8LinearConfig
        from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
        from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    config = Float8LinearConfig.from_recipe_name(recipe)
    # The weight's gradient sums over the rows, whose number nobody promised to be a multiple of 16.
    products = LinearMMConfig(
        output=ScaledMMConfig(use_fast_accum=config.gemm_config_output.use_fast_accum),
        grad_input=ScaledMMConfig(use_fast_accum=config.gemm_config_grad_input.use_fast_accum),
        grad_weight=ScaledMMConfig(use_fast_accum=config.gemm_config_grad_weight.use_fast_accum, pad_inner_dim=True),
    )
    return matmul_with_hp_or_float8_args.apply, products, config


# ---- Weights on their way between ranks


def sent_in_float8(model: Model, precision: str) -> frozenset[str]:
    """Names of the parameters that can be gathered as float8: those that `linear` quantises and nothing else reads.

    Not the experts: their products scale them by rows in the forward and by columns in the backward.
    Raises ValueError for a precision in which linear's weights do not have one scale.
    """
    _known(precision)
    if precision != "fp8-tensorwise":
        why = ": it scales a weight by rows and by columns, and one float8 copy is not both" * (precision in RECIPES)
        raise ValueError(f"--fp8-all-gather cannot be had with --precision {precision}{why}; valid is fp8-tensorwise")
    use = _watch(model)
    return frozenset(n for n in use.linear - use.experts - use.otherwise if fits(model.specs[n].shape))


def pack(parts: Sequence[Tensor], float8: Sequence[bool], group: Group) -> Tensor:
    """A rank's parts [numel] in the compute dtype -> [bytes]: maxima, then the other parts, then those in float8.

    The maximum of each part in float8 is taken over the group, by one all-reduce: with it all scale alike.
    """
    from torchao.float8.float8_utils import to_fp8_saturated

    wide = [part for part, is_narrow in zip(parts, float8) if not is_narrow]
    narrow = [part for part, is_narrow in zip(parts, float8) if is_narrow]
    amax = all_reduce(torch.stack([part.abs().amax() for part in narrow]).float(), group, "max")
    dtype, scales = _e4m3(amax)
    narrow = [to_fp8_saturated(part.float() * scale, dtype) for part, scale in zip(narrow, scales)]
    flat = torch.cat([part.view(torch.uint8) for part in (amax, *wide, *narrow)])
    short = -flat.shape[0] % 4  # so that every row begins aligned
    return F.pad(flat, (0, short)) if short else flat


def unpack(rows: Tensor, lengths: Sequence[int], float8: Sequence[bool], dtype: torch.dtype) -> list[Tensor]:
    """[ranks, bytes] of all ranks' `pack` -> for each part [ranks, numel] in the compute dtype, bf16.

    `linear` quantises these to the same bits, with the same scale, as it would the weights that they were. For q, the
    float8 value of w: q / scale in bf16 is off by 2^-9 of itself at most, and float8's values are 2^-4 apart at least,
    so that it falls on q again. The largest becomes 448, and 448 / scale is the maximum, which had been in bf16.
    """
    wide = [n for n, is_narrow in zip(lengths, float8) if not is_narrow]
    narrow = [n for n, is_narrow in zip(lengths, float8) if is_narrow]
    sizes = [4 * len(narrow), dtype.itemsize * sum(wide), sum(narrow)]
    amax, high, low, _ = rows.split([*sizes, rows.shape[1] - sum(sizes)], 1)
    e4m3, scales = _e4m3(amax[0].view(torch.float32))  # all ranks' are the same
    found = {
        False: iter(high.view(dtype).split(wide, 1)),
        True: iter((q.float() / scale).to(dtype) for q, scale in zip(low.view(e4m3).split(narrow, 1), scales)),
    }
    return [next(found[is_narrow]) for is_narrow in float8]


def _e4m3(amax: Tensor) -> tuple[torch.dtype, tuple[Tensor, ...]]:
    """The dtype, of which GPUs have one or another, and the scales of tensors with these maxima."""
    from torchao.float8.config import e4m3_dtype
    from torchao.float8.float8_utils import amax_to_scale

    return e4m3_dtype, amax_to_scale(amax, e4m3_dtype).unbind()


# ---- What the run says of it


class Fp8Report(NamedTuple):
    """Names of parameters: multiplied in float8, multiplied in bf16 for their shape's sake, and all others."""

    quantised: tuple[str, ...]
    fallback: tuple[str, ...]
    excluded: tuple[str, ...]


def fp8_report(model: Model) -> Fp8Report:
    """Which parameters an fp8 recipe quantises."""
    use, specs = _watch(model), model.specs
    multiplied = use.linear | use.experts
    return Fp8Report(
        tuple(name for name in specs if name in multiplied and fits(specs[name].shape)),
        tuple(name for name in specs if name in multiplied and not fits(specs[name].shape)),
        tuple(name for name in specs if name not in multiplied),
    )


class _Use(NamedTuple):
    """Names of parameters, by who reads them: `ops.linear`, `ops.experts`, others. Some are in several."""

    linear: frozenset[str]
    experts: frozenset[str]
    otherwise: frozenset[str]


class _Reads(TorchDispatchMode):
    """Notes all operators' arguments."""

    def __init__(self):
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.update(map(id, tree_leaves((args, kwargs))))
        return op(*args, **(kwargs or {}))


def _watch(model: Model) -> _Use:
    """How a model uses its parameters, found by watching which ones it hands to `ops`.

    The forward is traced on shapes alone: no memory, no arithmetic.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from .ops import plain

    by_linear, by_experts, reads = set(), set(), _Reads()

    def linear(x, w, b=None):
        by_linear.add(id(w))
        return x.new_empty(*x.shape[:-1], w.shape[0])

    def experts(x, weight, index, gate, up, down):
        by_experts.update(map(id, (gate, up, down)))
        return x

    def attention(q, k, v, mask):
        return q

    ops = dataclasses.replace(
        plain(), linear=linear, experts=experts, attention=attention, local_attention=attention
    )
    batch = on_one_device(example(model), model.blanks)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        p = {name: torch.empty(spec.shape) for name, spec in model.specs.items()}
        with reads:
            out = model.forward(p, batch, ops)
    reads.seen.update(map(id, tree_leaves(out)))
    return _Use(*(frozenset(n for n, t in p.items() if id(t) in ids) for ids in (by_linear, by_experts, reads.seen)))


def by_layer(names: tuple[str, ...]) -> dict[str, int]:
    """Names with their layer's number replaced by `*` -> how many: what fits on a console."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        counts[pattern] = counts.get(pattern, 0) + 1
    return counts


def _known(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"--precision {precision}: must be one of {', '.join(PRECISIONS)}")


@contextlib.contextmanager
def quiet():
    """torchao's import warns of extensions built for other machines than this one: no user's concern."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)

"""AdamW and learning-rate schedules, as functions of tensors: they trace into the train step. What stands for another
optimizer."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .moments import BLOCK, Coded, Moment, noise, read, rounded
from .specs import Specs

SCHEDULES = ("cosine", "linear", "wsd", "constant")
# Elements whose moments are in fp32 at a time, where they are kept in less: on a CPU as many as its cache holds, on an
# accelerator as are worth the launches.
CHUNK_CPU, CHUNK = 2**17, 2**22


@dataclass(frozen=True)
class AdamW:
    """lr: peak learning rate. weight_decay: decoupled (arXiv 1711.05101). clip: largest global gradient norm."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


class Optimizer(NamedTuple):
    """What is done with clipped gradients in place of AdamW, as functions; `interop.from_optax` makes one of optax.

    kinds: specs -> kind -> name -> spec of each tensor that it keeps. What has a parameter's name has its shape and its
    placements, all else is whole on every rank.
    init: (specs, this rank's params by name, cut) -> kind -> name -> what is kept at first of these.
    update_: (lr, specs, params, grads, kept, scale, apply, cut): params and what is kept are updated in place by the
    gradients over `scale`, or left as they are unless `apply`. lr, scale and apply are 0-dim tensors.
    cut: the names of the parameters of which ranks hold parts, the same on every rank.
    """

    kinds: Callable[[Specs], Mapping[str, Specs]]
    init: Callable[[Specs, Mapping[str, Tensor], Collection[str]], Mapping[str, Mapping[str, Tensor]]]
    update_: Callable[..., None]


@dataclass(frozen=True)
class Schedule:
    """Factor of the peak learning rate, by step: a linear warm-up, then a decay to `floor` at `steps`.

    cosine and linear decay all the way; wsd (warm-up, stable, decay: arXiv 2404.06395) stays at
    the peak and decays linearly over the last `decay` fraction of the steps; constant stays.
    """

    steps: int
    kind: str = "cosine"
    warmup: int = 0
    floor: float = 0.1
    decay: float = 0.2

    def __call__(self, step: Tensor) -> Tensor:
        """step: how many updates were done before this one, a 0-dim tensor -> factor, 0-dim fp32."""
        step = step.float()
        end = max(self.steps, self.warmup + 1)
        start = self.warmup if self.kind != "wsd" else max(self.warmup, end - math.ceil(self.decay * end))
        done = ((step - start) / (end - start)).clamp(0, 1)
        if self.kind == "cosine":
            left = 0.5 * (1 + torch.cos(math.pi * done))
        elif self.kind in ("linear", "wsd"):
            left = 1 - done
        elif self.kind == "constant":
            left = torch.ones_like(done)
        else:
            raise ValueError(f"--schedule {self.kind}: valid schedules are {', '.join(SCHEDULES)}")
        warm = ((step + 1) / max(self.warmup, 1)).clamp(max=1)
        return warm * (self.floor + (1 - self.floor) * left)


@torch.library.custom_op("ftrain::sum_of_squares", mutates_args=())
def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Of all elements, fp32. One operator for all tensors: a kernel for each would be compiled for each."""
    return torch.stack(torch._foreach_norm(tensors)).square().sum()


@sum_of_squares.register_fake
def _(tensors):
    return tensors[0].new_empty(())


@torch.library.custom_op("ftrain::adamw_", mutates_args=("params", "grads", "mu", "nu"))
def _adamw_(
    params: list[Tensor], grads: list[Tensor], mu: list[Tensor], nu: list[Tensor],
    decays: list[bool], factors: list[float], step: Tensor, lr: Tensor, scale: Tensor, skip: Tensor,
    beta1: float, beta2: float, weight_decay: float, eps: float,
) -> None:  # fmt: skip
    """torch's fused kernel as one operator of the graph: one pass over memory, nothing copied."""
    # The CPU kernel reads storage from end to end, whatever the strides: an uneven shard's gradient is a narrow view.
    grads = [grad.contiguous() for grad in grads]
    # It scales gradients where they lie: two must not be one tensor, as those of the two terms of a sum can be.
    seen: set[int] = set()
    for i, grad in enumerate(grads):
        if grad.data_ptr() in seen:
            grads[i] = grad.clone()
        seen.add(grad.data_ptr())
    groups = list(zip(decays, factors))
    for group in dict.fromkeys(groups):
        tensors = [[t for t, of in zip(kind, groups) if of == group] for kind in (params, grads, mu, nu)]
        torch._fused_adamw_(
            *tensors, [], [step] * len(tensors[0]), lr=lr * group[1], beta1=beta1, beta2=beta2, eps=eps,
            weight_decay=weight_decay if group[0] else 0.0, amsgrad=False, maximize=False,
            grad_scale=scale, found_inf=skip,
        )  # fmt: skip


@_adamw_.register_fake
def _(params, grads, mu, nu, decays, factors, step, lr, scale, skip, beta1, beta2, weight_decay, eps):
    return None


@torch.library.custom_op("ftrain::adamw_rounded_", mutates_args=("params", "mu", "nu", "mu_scales", "nu_scales"))
def _adamw_rounded_(
    params: list[Tensor], grads: list[Tensor], mu: list[Tensor], nu: list[Tensor],
    mu_scales: list[Tensor], nu_scales: list[Tensor],
    decays: list[bool], factors: list[float], step: Tensor, lr: Tensor, scale: Tensor, skip: Tensor,
    beta1: float, beta2: float, weight_decay: float, eps: float,
) -> None:  # fmt: skip
    """`_adamw_` of moments in bf16 or, where there are scales, in 8 bits: in fp32 a chunk of a parameter at a time."""
    for i, (param, grad) in enumerate(zip(params, grads)):
        chunk = CHUNK_CPU if param.device.type == "cpu" else CHUNK
        for start in range(0, param.numel(), chunk):
            end = min(start + chunk, param.numel())
            kept = [_chunk(mu[i], mu_scales[i : i + 1], start, end), _chunk(nu[i], nu_scales[i : i + 1], start, end)]
            moments = [read(moment) for moment in kept]
            # The gradient's copy is scaled, and not what may be another parameter's gradient too.
            _adamw_(
                [param.view(-1)[start:end]], [grad.reshape(-1)[start:end].clone()], moments[:1], moments[1:],
                decays[i : i + 1], factors[i : i + 1], step, lr, scale, skip, beta1, beta2, weight_decay, eps,
            )  # fmt: skip
            for moment, values, seed in zip(kept, moments, (0, 1 << 31)):
                was = moment if isinstance(moment, Coded) else (moment,)
                for old, new in zip(was, rounded(values, moment.dtype, noise(start, end, step, seed))):
                    old.copy_(torch.where(skip > 0, old, new))


def _chunk(moment: Tensor, scales: list[Tensor], start: int, end: int) -> Moment:
    part = moment.view(-1)[start:end]
    return Coded(part, scales[0][start // BLOCK : -(-end // BLOCK)]) if scales else part


@_adamw_rounded_.register_fake
def _(params, grads, mu, nu, mu_scales, nu_scales, *numbers):
    return None


def clipping(norm: Tensor, clip: float) -> Tensor:
    """What gradients of this global norm are divided by: max(1, norm / clip), as torch's clip_grad_norm_ has it."""
    return ((norm + 1e-6) / clip).clamp(min=1.0)


def update_(
    adam: AdamW, lr: Tensor, specs: Specs, params: Mapping[str, Tensor], grads: Mapping[str, Tensor],
    mu: Mapping[str, Moment], nu: Mapping[str, Moment], step: Tensor, norm: Tensor, apply: Tensor,
) -> None:  # fmt: skip
    """Clip by the global norm and update params, mu and nu in place, or leave all as it is unless `apply`.

    specs: which parameters decay, and the factor of each on `lr`. Of `params`, those in `grads` are updated. All by
    name, params and grads fp32; step: updates done before this one, norm: the gradients' global norm, apply: bool;
    0-dim. The gradients' own storage is used up.
    """
    numbers = (step + 1).float(), lr, clipping(norm, adam.clip), (~apply).float(), adam.beta1, adam.beta2, adam.weight_decay, adam.eps

    def given(names: list[str], *kept: list[Tensor]) -> tuple[list, ...]:
        of_names = [specs[name] for name in names]
        return (
            [params[name] for name in names], [grads[name] for name in names], *kept,
            [spec.decay for spec in of_names], [float(spec.lr) for spec in of_names],
        )  # fmt: skip

    full = [name for name in grads if mu[name].dtype is torch.float32]
    less = [name for name in grads if mu[name].dtype is not torch.float32]
    if full:
        _adamw_(*given(full, *([of[name] for name in full] for of in (mu, nu))), *numbers)
    if less:
        (mu_kept, mu_scales), (nu_kept, nu_scales) = (_split([of[name] for name in less]) for of in (mu, nu))
        _adamw_rounded_(*given(less, mu_kept, nu_kept, mu_scales, nu_scales), *numbers)


def _split(moments: list[Moment]) -> tuple[list[Tensor], list[Tensor]]:
    """What is kept of each element, and the scales, if these are codes."""
    kept = [moment.codes if isinstance(moment, Coded) else moment for moment in moments]
    return kept, [moment.scales for moment in moments if isinstance(moment, Coded)]

"""AdamW and learning-rate schedules, as functions of tensors: they trace into the train step."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SCHEDULES = ("cosine", "linear", "wsd", "constant")


@dataclass(frozen=True)
class AdamW:
    """lr: peak learning rate. weight_decay: decoupled (arXiv 1711.05101). clip: largest global gradient norm."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


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


def update(
    adam: AdamW, lr: Tensor, decay: bool, p: Tensor, grad: Tensor, mu: Tensor, nu: Tensor, step: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One AdamW update of one tensor -> (p, mu, nu). step: updates done before this one."""
    t = (step + 1).float()
    mu = adam.beta1 * mu + (1 - adam.beta1) * grad
    nu = adam.beta2 * nu + (1 - adam.beta2) * grad * grad
    m_hat = mu / (1 - adam.beta1**t)
    n_hat = nu / (1 - adam.beta2**t)
    if decay:
        p = p * (1 - lr * adam.weight_decay)
    return p - lr * m_hat / (n_hat.sqrt() + adam.eps), mu, nu

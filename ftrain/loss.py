"""The losses: next-token cross-entropy in chunks, and the router's losses over the global batch."""

import torch
from torch import Tensor

from .ops import Router

IGNORE = -100
CHUNK = 1024  # tokens whose logits exist at once


def _chunk(hidden: Tensor, unembedding: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> (summed loss, logits, logsumexp) of one chunk, in fp32."""
    logits = (hidden @ unembedding.t()).float()
    lse = logits.logsumexp(-1)
    target = logits.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels != IGNORE, lse - target, 0.0).sum(), logits, lse


class _CrossEntropy(torch.autograd.Function):
    """Takes each chunk's gradient while its logits are there, so that nothing is computed twice.

    The gradient of a scalar loss is linear in what comes from above: one factor, applied in the backward.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, unembedding: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        learns = ctx.needs_input_grad[1]
        # In place: of a large vocabulary this is the largest tensor there is.
        d_unembedding = torch.empty(unembedding.shape, device=hidden.device).zero_() if learns else None
        d_hidden = []
        for h, y in zip(hidden.split(CHUNK), labels.split(CHUNK)):
            loss, logits, lse = _chunk(h, unembedding, y)
            total = total + loss
            hit = torch.arange(logits.shape[1], device=y.device) == y[:, None]
            d_logits = torch.exp(logits - lse[:, None]) - hit.float()
            d_logits = torch.where((y != IGNORE)[:, None], d_logits, 0.0).to(h.dtype)
            d_hidden.append(d_logits @ unembedding)
            if learns and h.dtype == d_unembedding.dtype:
                d_unembedding.addmm_(d_logits.t(), h)
            elif learns:
                d_unembedding.add_(d_logits.t() @ h)
        ctx.save_for_backward(torch.cat(d_hidden), d_unembedding)
        ctx.dtype = unembedding.dtype
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        if torch.is_grad_enabled():
            raise NotImplementedError("gradients of gradients: the loss has none, its gradient is made in the forward")
        d_hidden, d_unembedding = ctx.saved_tensors
        if d_unembedding is not None:
            d_unembedding = (d_unembedding * grad).to(ctx.dtype)
        return d_hidden * grad.to(d_hidden.dtype), d_unembedding, None


def cross_entropy(hidden: Tensor, unembedding: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens of the next-token cross-entropy, fp32, without ever holding all logits.

    hidden [B, S, H], unembedding [V, H], labels [B, S] with -100 where there is no loss.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    if torch.is_grad_enabled():
        return _CrossEntropy.apply(hidden, unembedding, labels)
    chunks = zip(hidden.split(CHUNK), labels.split(CHUNK))
    return torch.stack([_chunk(h, unembedding, y)[0] for h, y in chunks]).sum()


def load_balance(router: Router, counts: Tensor, tokens: Tensor) -> Tensor:
    """This rank's part of the load-balancing loss; the parts of all ranks sum to the global batch's loss.

    router: this rank's sums. counts [L, E]: the global batch's. tokens: its number of valid tokens.
    The Switch loss (arXiv 2101.03961, eq. 4) as transformers' Qwen3-MoE takes it: experts' shares
    averaged over all layers together, E * sum_e share_e * probability_e.
    """
    layers, E = counts.shape
    rows = layers * tokens
    return E * (counts.sum(0) / rows * (router.prob.sum(0) / rows)).sum()


def router_z(router: Router, tokens: Tensor) -> Tensor:
    """This rank's part of the router z-loss (ST-MoE, arXiv 2202.08906, eq. 5), averaged over layers and tokens."""
    return router.z.sum() / (router.z.shape[0] * tokens)

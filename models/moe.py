"""Mixture of experts: a router picks k of E experts for each token, their weighted sum is the MLP's output."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..ops import Ops, Router
from ..specs import ParamSpec, normal


def moe_specs(prefix: str, hidden: int, inner: int, experts: int, top_k: int, std: float) -> dict[str, ParamSpec]:
    """The router's matrix, and each projection of all experts stacked along dimension 0."""

    def stacked(name: str, out: int, into: int) -> ParamSpec:
        parts = tuple(f"{prefix}.experts.{expert}.{name}.weight" for expert in range(experts))
        return ParamSpec((experts, out, into), normal(std), experts=True, active=top_k / experts, parts=parts)

    return {
        f"{prefix}.gate.weight": ParamSpec((experts, hidden), normal(std)),
        f"{prefix}.experts.gate_proj.weight": stacked("gate_proj", inner, hidden),
        f"{prefix}.experts.up_proj.weight": stacked("up_proj", inner, hidden),
        f"{prefix}.experts.down_proj.weight": stacked("down_proj", hidden, inner),
    }


def route(x: Tensor, gate: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The router, in fp32: x [T, H], gate [E, H] -> weight [T, k], index [T, k], prob [T, E], logits [T, E].

    normalise: whether each token's k weights sum to 1, rather than to their share of the softmax.
    """
    logits = x.float() @ gate.float().T
    prob = logits.softmax(-1)
    weight, index = prob.topk(top_k, dim=-1)
    if normalise:
        weight = weight / weight.sum(-1, keepdim=True)
    return weight, index, prob, logits


def moe(q: Mapping[str, Tensor], x: Tensor, valid: Tensor, top_k: int, normalise: bool, ops: Ops):
    """x [B, S, H], valid [B, S] (false on padding) -> [B, S, H] and the Router sums over the valid tokens."""
    tokens = x.flatten(0, 1)
    weight, index, prob, logits = route(tokens, q["mlp.gate.weight"], top_k, normalise)
    gate, up, down = (q[f"mlp.experts.{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj"))
    y = ops.experts(tokens, weight.to(x.dtype), index, gate, up, down)

    valid = valid.flatten()[:, None].to(prob.dtype)
    chosen = torch.zeros_like(prob).scatter(1, index, 1.0)
    z = logits.logsumexp(-1, keepdim=True).square()
    router = Router(counts=(valid * chosen).sum(0).detach(), prob=(valid * prob).sum(0), z=(valid * z).sum())
    return y.view_as(x), router

"""The train step: forward, backward, clipping and AdamW, as one graph whose buffers are updated in place."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .collectives import all_reduce
from .graph import one_graph
from .loss import IGNORE, cross_entropy, load_balance, router_z
from .ops import Ops, Output
from .optim import AdamW, Schedule, update_
from .parallel import Gathered, Sharding
from .specs import Specs
from .state import State, place

Forward = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Ops], Output]


@dataclass(frozen=True)
class Recipe:
    """What is minimised, and how. router_aux, router_z: coefficients of the router's losses."""

    adam: AdamW = AdamW()
    schedule: Schedule = Schedule(steps=1000)
    router_aux: float = 0.0
    router_z: float = 0.0


def local(tensors: Mapping[str, DTensor]) -> dict[str, Tensor]:
    """This rank's pieces, aliasing the DTensors' storage: an update in place is seen by both."""
    return {name: t.to_local().detach() for name, t in tensors.items()}


def counts(batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """[labels, tokens] that are valid in this rank's microbatches, int64."""
    labels = sum((b["labels"] != IGNORE).sum() for b in batches)
    tokens = sum((b["segment_ids"] >= 0).sum() for b in batches)
    return torch.stack([labels, tokens])


def gradients(
    forward: Forward, sharding: Sharding, ops: Ops, recipe: Recipe,
    params: Mapping[str, Tensor], batch: Mapping[str, Tensor], totals: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:  # fmt: skip
    """Gradients of the global batch's loss, with respect to this rank's pieces.

    totals: of all microbatches of the step, `valid` (`counts` on this rank) and, where there
    are others than this one, `routed`, the global expert counts [L, E].
    -> (gradients, this rank's parts of the metrics, global expert counts).
    """
    leaves = {name: t.detach().requires_grad_() for name, t in params.items()}
    out = forward(Gathered(leaves, sharding.buckets), batch, ops)
    valid = all_reduce(totals["valid"], sharding.world).clamp(min=1)
    parts = {"loss": cross_entropy(out.hidden, out.unembedding, batch["labels"]) / valid[0]}
    objective = parts["loss"]
    routed = None
    if out.router is not None:
        routed = totals.get("routed")
        if routed is None:
            routed = all_reduce(out.router.counts.detach(), sharding.world)
        parts["router_aux_loss"] = load_balance(out.router, routed, valid[1])
        parts["router_z_loss"] = router_z(out.router, valid[1])
        objective = objective + recipe.router_aux * parts["router_aux_loss"]
        objective = objective + recipe.router_z * parts["router_z_loss"]
    names = list(leaves)
    grads = torch.autograd.grad(objective, [leaves[name] for name in names], allow_unused=True)
    unused = [name for name, grad in zip(names, grads) if grad is None]
    if unused:
        more = f" and {len(unused) - 3} more" * (len(unused) > 3)
        raise ValueError(f"the loss does not depend on {', '.join(unused[:3])}{more}, which the model declares")
    return dict(zip(names, grads)), {name: t.detach() for name, t in parts.items()}, routed


def make_gradients(forward: Forward, sharding: Sharding, ops: Ops, recipe: Recipe, mode: str = "off") -> Callable:
    """-> (state, batch) -> name -> DTensor: what `train_step` clips and applies, to be looked at."""

    def graph(params, batch):
        return gradients(forward, sharding, ops, recipe, params, batch, {"valid": counts([batch])})[0]

    run = one_graph(graph, mode)

    def grads(state: State, batch: Mapping[str, Tensor]) -> dict[str, DTensor]:
        found = run(local(state.params), dict(batch))
        return {n: place(found[n], p.shape, p.placements, p.device_mesh) for n, p in state.params.items()}

    return grads


def make_train_step(
    forward: Forward, specs: Specs, sharding: Sharding, ops: Ops, recipe: Recipe,
    mode: str = "inductor", accumulate: int = 1,
) -> Callable[[State, Sequence[Mapping[str, Tensor]]], tuple[State, dict[str, Tensor]]]:  # fmt: skip
    """-> train_step(state, microbatches) -> (state, metrics).

    The graph runs once for each of the `accumulate` microbatches; gradients add up in a buffer,
    and the last run applies them. A loss or gradient that is not finite changes nothing: the
    state stays as it was, and the metrics say so (`finite` is 0).
    metrics: 0-dim tensors loss, grad_norm, lr, finite and, of models with experts,
    router_aux_loss (not where several microbatches have no coefficient for it), router_z_loss and
    expert_counts [L, E].
    """
    adam, decay = recipe.adam, {name: spec.decay for name, spec in specs.items()}

    def graph(params, mu, nu, total, step, batch, totals, last):
        grads, parts, routed = gradients(forward, sharding, ops, recipe, params, batch, totals)
        if accumulate > 1:
            grads = {name: g + total[name] for name, g in grads.items()}
        squares = [grads[name].square().sum() / sharding.copies[name] for name in grads]
        summed = all_reduce(torch.stack([torch.stack(squares).sum(), *parts.values()]), sharding.world)
        norm = summed[0].sqrt()
        finite = torch.isfinite(summed).all()
        apply = finite & last
        lr = adam.lr * recipe.schedule(step)
        with torch.no_grad():
            if accumulate > 1:
                for name, g in grads.items():
                    total[name].copy_(torch.where(last, 0.0, g))
            update_(adam, lr, decay, params, grads, mu, nu, step, norm, apply)
            step.add_(apply.to(step.dtype))
        metrics = dict(zip(parts, summed[1:].unbind())) | {"grad_norm": norm, "lr": lr, "finite": finite}
        return metrics if routed is None else metrics | {"expert_counts": routed}

    run = one_graph(graph, mode)
    count_experts = make_eval_step(forward, sharding, ops, mode)
    buffers: dict[str, Tensor] = {}

    def train_step(state: State, batches: Sequence[Mapping[str, Tensor]]):
        if len(batches) != accumulate:
            raise ValueError(f"the step was made for {accumulate} microbatches, but was given {len(batches)}")
        params, mu, nu = local(state.params), local(state.mu), local(state.nu)
        if accumulate > 1 and not buffers:
            buffers.update({name: torch.zeros_like(p) for name, p in params.items()})
        totals = {"valid": counts(batches)}
        if accumulate > 1 and recipe.router_aux and any(spec.experts for spec in specs.values()):
            # The balance loss is a product of two averages over the global batch: the first has
            # to be known before any microbatch's backward. Costs one more forward.
            totals["routed"] = sum(count_experts(state, batch)["expert_counts"] for batch in batches)
        seen = []
        for i, batch in enumerate(batches):
            last = torch.tensor(i == accumulate - 1, device=state.step.device)
            seen.append(run(params, mu, nu, buffers, state.step, dict(batch), totals, last))
        metrics = dict(seen[-1])
        for name in ("loss", "router_aux_loss", "router_z_loss"):
            if name in metrics:
                metrics[name] = sum(m[name] for m in seen)
        if accumulate > 1 and "expert_counts" in metrics and "routed" not in totals:
            # Each microbatch counted its own; and a product of two averages is not the sum of its parts' products.
            metrics["expert_counts"] = sum(m["expert_counts"] for m in seen)
            del metrics["router_aux_loss"]
        return state, metrics

    return train_step


def make_eval_step(forward: Forward, sharding: Sharding, ops: Ops, mode: str = "inductor") -> Callable:
    """-> eval_step(state, batch) -> {loss_sum, tokens} over the global batch, and expert_counts [L, E]."""

    def graph(params, batch):
        with torch.no_grad():
            out = forward(Gathered(params, sharding.buckets), batch, ops)
            loss = cross_entropy(out.hidden, out.unembedding, batch["labels"])
            tokens = (batch["labels"] != IGNORE).sum()
            both = all_reduce(torch.stack([loss.double(), tokens.double()]), sharding.world)
            result = {"loss_sum": both[0], "tokens": both[1]}
            if out.router is not None:
                result["expert_counts"] = all_reduce(out.router.counts, sharding.world)
            return result

    run = one_graph(graph, mode)
    return lambda state, batch: run(local(state.params), dict(batch))

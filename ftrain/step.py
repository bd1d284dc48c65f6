"""The train step: forward, backward, clipping and update, as one graph whose buffers are updated in place."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .collectives import Group, all_reduce
from .graph import one_graph
from .layout import cut
from .loss import cross_entropy, load_balance, router_z
from .model import Model
from .ops import Ops, Output
from .optim import AdamW, Optimizer, Schedule, clipping, sum_of_squares, update_
from .parallel import Gathered, Sharding
from .specs import trainable
from .state import State, place


@dataclass(frozen=True)
class Recipe:
    """What is minimised, and how. router_aux, router_z: coefficients of the router's losses. optimizer: what takes the
    place of AdamW; of `adam`, only `lr` and `clip` then apply."""

    adam: AdamW = AdamW()
    schedule: Schedule = Schedule(steps=1000)
    router_aux: float = 0.0
    router_z: float = 0.0
    optimizer: Optimizer | None = None


def local(tensors: Mapping[str, DTensor]) -> dict[str, Tensor]:
    """This rank's pieces, aliasing the DTensors' storage: an update in place is seen by both."""
    with torch.no_grad():  # else each is a step of autograd's, thirty times as long
        return {name: t.to_local() for name, t in tensors.items()}


def counts(model: Model, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """In this rank's microbatches: the targets of each loss, and the valid tokens, int64."""
    found: dict[str, Tensor] = {}
    for batch in batches:
        of_batch = {**model.targets(batch), "tokens": (batch["segment_ids"] >= 0).sum()}
        found = {name: n + found[name] if name in found else n for name, n in of_batch.items()}
    return found


def summed(parts: Mapping[str, Tensor], world: Group) -> dict[str, Tensor]:
    """Each number's sum over all ranks, by one all-reduce."""
    return dict(zip(parts, all_reduce(torch.stack(list(parts.values())), world).unbind()))


def loss_sums(out: Output, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each loss, summed over this rank's targets."""
    sums = dict(out.losses)
    if out.unembedding is not None:
        sums["loss"] = cross_entropy(out.hidden, out.unembedding, batch["labels"])
    return sums


def squares(grads: Mapping[str, Tensor], copies: Mapping[str, int]) -> Tensor:
    """This rank's share of the squared global norm: the sum of squares, of what several ranks hold a part each."""
    held: dict[int, list[Tensor]] = {}
    for name, grad in grads.items():
        held.setdefault(copies[name], []).append(grad)
    return sum(sum_of_squares(some) / n for n, some in held.items())


def metric(name: str) -> str:
    """How a loss is called among the metrics."""
    return name if name == "loss" else f"{name}_loss"


def gradients(
    model: Model, sharding: Sharding, ops: Ops, recipe: Recipe,
    params: Mapping[str, Tensor], batch: Mapping[str, Tensor], totals: Mapping[str, Any],
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:  # fmt: skip
    """Gradients of the global batch's loss, with respect to this rank's pieces of what is trained.

    totals: where there are microbatches of the step beside this one, `valid` (`counts` on this rank) of them all
    and, of models with experts, `routed`, their global expert counts [L, E].
    -> (gradients, this rank's parts of the metrics, global expert counts).
    """
    trained = trainable(model.specs)
    leaves = {name: t.detach().requires_grad_(name in trained) for name, t in params.items()}
    own = totals["valid"] if "valid" in totals else counts(model, [batch])
    everyones = summed(own, sharding.world)  # asked for before the forward, so that nothing waits for it
    out = model.forward(Gathered(leaves, sharding.buckets), batch, ops)
    valid = {name: n.clamp(min=1) for name, n in everyones.items()}
    parts, objective = {}, 0.0
    for name, loss in loss_sums(out, batch).items():
        parts[metric(name)] = loss / valid[name]
        objective = objective + model.weights.get(name, 1.0) * parts[metric(name)]
    routed = None
    if out.router is not None:
        routed = totals.get("routed")
        if routed is None:
            routed = all_reduce(out.router.counts.detach(), sharding.world)
        parts["router_aux_loss"] = load_balance(out.router, routed, valid["tokens"])
        parts["router_z_loss"] = router_z(out.router, valid["tokens"])
        objective = objective + recipe.router_aux * parts["router_aux_loss"]
        objective = objective + recipe.router_z * parts["router_z_loss"]
    grads = torch.autograd.grad(objective, [leaves[name] for name in trained], allow_unused=True)
    unused = [name for name, grad in zip(trained, grads) if grad is None]
    if unused:
        more = f" and {len(unused) - 3} more" * (len(unused) > 3)
        raise ValueError(f"the loss does not depend on {', '.join(unused[:3])}{more}, which the model declares")
    return dict(zip(trained, grads)), {name: t.detach() for name, t in parts.items()}, routed


def make_gradients(model: Model, sharding: Sharding, ops: Ops, recipe: Recipe, mode: str = "off") -> Callable:
    """-> (state, batch) -> name -> DTensor: what `train_step` clips and applies, to be looked at."""

    def graph(params, batch):
        return gradients(model, sharding, ops, recipe, params, batch, {})[0]

    run = one_graph(graph, mode)

    def grads(state: State, batch: Mapping[str, Tensor]) -> dict[str, DTensor]:
        found = run(local(state.params), dict(batch))
        of = state.params
        return {n: place(g, of[n].shape, of[n].placements, of[n].device_mesh) for n, g in found.items()}

    return grads


def make_train_step(
    model: Model, sharding: Sharding, ops: Ops, recipe: Recipe, mode: str = "inductor", accumulate: int = 1
) -> Callable[..., tuple[State, dict[str, Tensor]]]:  # fmt: skip
    """-> train_step(state, microbatches, so_far=None) -> (state, metrics).

    The graph runs once for each of the `accumulate` microbatches; gradients add up in a buffer,
    and the last run applies them. A loss or gradient that is not finite changes nothing: the
    state stays as it was, and the metrics say so (`finite` is 0).
    so_far: `finite` of the step before. Where that is 0 nothing changes either, and `finite` is 0 again: so steps
    can be issued before it is known how those before them went.
    metrics: 0-dim tensors loss, and NAME_loss of other losses, grad_norm, lr, finite and, of models with experts,
    router_aux_loss (not where several microbatches have no coefficient for it), router_z_loss and
    expert_counts [L, E].
    `train_step.graph` is its OneGraph, `train_step.arguments(state, microbatches)` what that is given first and,
    where it is compiled, `train_step.program(state, microbatches)` what it runs, captured and compiled but not run.
    Raises ValueError for a model all of which is frozen.
    """
    adam, trained = recipe.adam, trainable(model.specs)
    if not trained:
        raise ValueError("every parameter is frozen: there is nothing to train")

    parted = cut(sharding.placements, sharding.mesh.shape)

    def graph(params, mu, nu, extra, total, step, batch, totals, last, so_far):
        grads, parts, routed = gradients(model, sharding, ops, recipe, params, batch, totals)
        if accumulate > 1:
            torch._foreach_add_([total[name] for name in grads], list(grads.values()))
            grads = {name: total[name] for name in grads}
        sums = summed({"squares": squares(grads, sharding.copies), **parts}, sharding.world)
        norm = sums.pop("squares").sqrt()
        finite = so_far & torch.isfinite(torch.stack([norm, *sums.values()])).all()
        apply = finite & last
        lr = adam.lr * recipe.schedule(step)
        with torch.no_grad():
            if recipe.optimizer is None:
                update_(adam, lr, model.specs, params, grads, mu, nu, step, norm, apply)
            else:
                scale = clipping(norm, adam.clip)
                recipe.optimizer.update_(lr, model.specs, params, grads, extra, scale, apply, parted)
            step.add_(apply.to(step.dtype))
        metrics = sums | {"grad_norm": norm, "lr": lr, "finite": finite}
        return metrics if routed is None else metrics | {"expert_counts": routed}

    run = one_graph(graph, mode)
    count_experts = make_eval_step(model, sharding, ops, mode)
    buffers: dict[str, Tensor] = {}

    @cache  # by role too: of one tensor as two arguments, the graph would take the first for both
    def constant(role: str, value: bool, device: torch.device) -> Tensor:
        return torch.tensor(value, device=device)

    def arguments(state: State, batches: Sequence[Mapping[str, Tensor]], so_far: Tensor | None = None) -> Iterator[tuple]:
        """Those of the graph, for each microbatch."""
        if len(batches) != accumulate:
            raise ValueError(f"the step was made for {accumulate} microbatches, but was given {len(batches)}")
        params, mu, nu = local(state.params), local(state.mu), local(state.nu)
        extra = {kind: local(of) for kind, of in state.extra.items()}
        if accumulate > 1 and not buffers:
            buffers.update({name: torch.zeros_like(params[name]) for name in trained})
        device = state.step.device
        so_far = constant("so_far", True, device) if so_far is None else so_far
        totals: dict[str, Any] = {"valid": counts(model, batches)} if accumulate > 1 else {}
        if accumulate > 1 and recipe.router_aux and any(spec.experts for spec in model.specs.values()):
            # The balance loss is a product of two averages over the global batch: the first has
            # to be known before any microbatch's backward. Costs one more forward.
            totals["routed"] = sum(count_experts(state, batch)["expert_counts"] for batch in batches)
        if buffers:
            torch._foreach_zero_(list(buffers.values()))
        for i, batch in enumerate(batches):
            last = constant("last", i == accumulate - 1, device)
            yield params, mu, nu, extra, buffers, state.step, dict(batch), totals, last, so_far

    def train_step(state: State, batches: Sequence[Mapping[str, Tensor]], so_far: Tensor | None = None):
        seen = [run(*args) for args in arguments(state, batches, so_far)]
        metrics = dict(seen[-1])
        for name in metrics:
            if name.endswith("loss"):
                metrics[name] = sum(m[name] for m in seen)
        if accumulate > 1 and "expert_counts" in metrics and not recipe.router_aux:
            # Each microbatch counted its own; and a product of two averages is not the sum of its parts' products.
            metrics["expert_counts"] = sum(m["expert_counts"] for m in seen)
            del metrics["router_aux_loss"]
        return state, metrics

    train_step.graph = run
    train_step.arguments = lambda state, batches: next(arguments(state, batches))
    train_step.program = lambda state, batches: run.program(*train_step.arguments(state, batches))
    return train_step


def make_eval_step(model: Model, sharding: Sharding, ops: Ops, mode: str = "inductor") -> Callable:
    """-> eval_step(state, batch) -> over the global batch, of each loss NAME its sum NAME_sum and how many targets
    it has, NAME_targets (both fp64), and expert_counts [L, E]."""

    def graph(params, batch):
        with torch.no_grad():
            out = model.forward(Gathered(params, sharding.buckets), batch, ops)
            targets = model.targets(batch)
            sums = {}
            for name, loss in loss_sums(out, batch).items():
                sums |= {f"{name}_sum": loss.double(), f"{name}_targets": targets[name].double()}
            result = summed(sums, sharding.world)
            if out.router is not None:
                result["expert_counts"] = all_reduce(out.router.counts, sharding.world)
            return result

    run = one_graph(graph, mode)
    return lambda state, batch: run(local(state.params), dict(batch))

"""Deliberate faults, each seen by the comparison that the plans' tests rest on: proof that it can fail."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ftrain import attention, job, ops, parallel, step
from ftrain.equivalence import differences, mixed_batch, random_batch, run_mesh, run_plain, shrink
from ftrain.layout import Pieces
from ftrain.mesh import Mesh
from ftrain.model import find_model
from ftrain.models.omni import PRESETS
from ftrain.plan import find_plan

OMNI_CONFIG = PRESETS["omni-tiny"] | {
    "lr": 0.5, "decoders": {"drawn": {"type": "codes", "weight": 0.5, "config": {"num_embeddings": 29, "projection_dim": 8}}}
}  # fmt: skip
MODEL = find_model(shrink(find_model("qwen3-moe-tiny").hf))
BATCHES = [random_batch(131, 4, 10, seed) for seed in range(2)]  # two: some faults show in the second step only


def where(condition, act, otherwise):
    """A collective that does `act` on the tensors that the condition holds for."""
    return lambda x, group: act(x, group) if group.size > 1 and condition(x) else otherwise(x, group)


def times_ranks(x, group):
    return x * group.size


def reduce_over_copies_dropped(patch):
    patch.setattr(parallel, "all_reduce", lambda x, group: x)


def reduce_scatter_dropped(patch):
    patch.setattr(parallel, "reduce_scatter", lambda x, group: x[group.rank])


def replicas_not_reduced(patch):
    over = parallel.group_over
    patch.setattr(
        parallel, "group_over", lambda mesh, dims: over(mesh, [d for d in dims if d != "replica" or len(dims) == 4])
    )


def gradients_reduced_in_bf16(patch):
    take_apart = parallel.Bucket.take_apart
    patch.setattr(parallel.Bucket, "take_apart", lambda self, grads: take_apart(self, [g.bfloat16() for g in grads]))


def pieces_in_the_wrong_order(patch):
    assemble = Pieces.assemble
    patch.setattr(Pieces, "assemble", lambda self, rows: assemble(self, rows.flip(0)))


def experts_one_slot_on(patch):
    slots = parallel.expert_slots

    def rolled(*args):
        found = slots(*args)
        return found and (*found[1:], found[0])

    patch.setattr(parallel, "expert_slots", rolled)


def combined_without_the_inverse(patch):
    patch.setattr(
        parallel, "combine", lambda y, weight, order, inverse: (y.unflatten(0, weight.shape) * weight[..., None]).sum(1)
    )


def loss_by_local_tokens(patch):
    # A mean of means: right only where every rank has as many labels.
    patch.setattr(step, "all_reduce", where(lambda x: x.dtype == torch.int64, times_ranks, step.all_reduce))


def balance_by_local_counts(patch):
    patch.setattr(step, "all_reduce", where(lambda x: x.ndim == 2, times_ranks, step.all_reduce))


def loss_divided_by_sp(patch):
    loss = step.cross_entropy
    patch.setattr(step, "cross_entropy", lambda *args: loss(*args) / 2)


def norm_of_one_rank(patch):
    def forget(x, group):
        return torch.cat([x[:1], everywhere(x, group)[1:]])

    everywhere = step.all_reduce
    patch.setattr(step, "all_reduce", where(lambda x: x.is_floating_point() and x.ndim == 1, forget, everywhere))


def copies_counted_in_the_norm(patch):
    shard = job.shard_model

    def without(*args):
        sharding = shard(*args)
        return replace(sharding, copies=dict.fromkeys(sharding.copies, 1))

    patch.setattr(job, "shard_model", without)


def positions_from_the_start_of_the_part(patch):
    part = job.local_batch

    def restarted(batch, rank, ranks, sp_rank, sp, accumulate):
        parts = part(batch, rank, ranks, sp_rank, sp, accumulate)
        return [{**p, "position_ids": p["position_ids"] - sp_rank * p["position_ids"].shape[1]} for p in parts]

    patch.setattr(job, "local_batch", restarted)


def segments_not_gathered(patch):
    patch.setattr(
        parallel, "all_gather",
        where(lambda x: x.dtype == torch.int64, lambda x, g: x.expand(g.size, *x.shape), parallel.all_gather),
    )  # fmt: skip


def heads_repeated_in_the_wrong_order(patch):
    patch.setattr(torch.Tensor, "repeat_interleave", lambda x, n, dim: x.repeat(1, 1, n, 1))


def heads_come_back_in_the_wrong_order(patch):
    back = parallel.tokens_for_heads
    patch.setattr(parallel, "tokens_for_heads", lambda x, sp: back(x, sp).roll(1, 2))


def labels_shifted_again(patch):
    loss = step.cross_entropy
    patch.setattr(step, "cross_entropy", lambda hidden, table, labels: loss(hidden, table, labels.roll(1, 1)))


def updated(patch, change):
    """`change` what the update is given: a dict of its arguments, by name."""
    real = step.update_
    names = ("adam", "lr", "specs", "params", "grads", "mu", "nu", "step", "norm", "apply")

    def wrong(*args):
        given = dict(zip(names, args, strict=True))
        real(**{**given, **change(given)})

    patch.setattr(step, "update_", wrong)


def decay_of_norms(patch):
    updated(patch, lambda given: {"specs": {n: replace(spec, decay=True) for n, spec in given["specs"].items()}})


def no_decay_at_all(patch):
    updated(patch, lambda given: {"specs": {n: replace(spec, decay=False) for n, spec in given["specs"].items()}})


def moments_not_kept(patch):
    updated(patch, lambda given: {"mu": {name: t.clone() for name, t in given["mu"].items()}})


def no_clipping(patch):
    updated(patch, lambda given: {"norm": given["norm"] * 0})


def bias_corrected_a_step_late(patch):
    updated(patch, lambda given: {"step": given["step"] + 1})


def accumulated_without_zeroing(patch):
    patch.setattr(step, "torch", SimpleNamespace(**{**vars(torch), "_foreach_zero_": lambda buffers: None}))


# --- Of what is encoded on one rank and placed on another


def outputs_in_the_wrong_order(patch):
    send = parallel.sending_place
    patch.setattr(parallel, "sending_place", lambda place, world, *more: send(
        place, world, *more
    ) if world.size == 1 else lambda y, batch, name: send(place, world, *more)(
        y, batch | {f"{name}.order": batch[f"{name}.order"].flip(0)}, name
    ))  # fmt: skip


def outputs_a_token_further(patch):
    real = ops.plain_place
    shifted = lambda y, batch, name: real(y, batch | {f"{name}.source": batch[f"{name}.source"].roll(1, 1)}, name)  # noqa: E731
    patch.setattr(ops, "plain_place", shifted)


def gradients_of_outputs_stay(patch):
    """What is sent back to the encoder is lost: it learns from its own tokens only."""
    real = parallel.all_to_all

    def lost(x, received, sent, group):
        return real(x.detach(), received, sent, group) + 0 * x.sum().to(x.dtype)

    patch.setattr(parallel, "all_to_all", lost)


def items_do_not_know_their_borders(patch):
    patch.setattr(attention, "same_segment", lambda s, of_keys=None: torch.ones(1, 1, s.shape[1], s.shape[1]).bool())


def every_part_learns_alike(patch):
    updated(patch, lambda given: {"specs": {n: replace(spec, lr=1.0) for n, spec in given["specs"].items()}})


def second_loss_by_local_targets(patch):
    patch.setattr(step, "summed", lambda parts, world: dict(parts) if "tokens" in parts else SUMMED(parts, world))


SUMMED = step.summed
OMNI = find_model(OMNI_CONFIG)
OF_OMNI = [mixed_batch(OMNI, 4, seed) for seed in range(2)]
OMNI_CASES = [
    (outputs_in_the_wrong_order, "fsdp_sp", Mesh(1, 2, 1)),
    (outputs_a_token_further, "fsdp", Mesh(2, 1, 1)),
    (gradients_of_outputs_stay, "fsdp_sp", Mesh(1, 2, 1)),
    (items_do_not_know_their_borders, "fsdp", Mesh(2, 1, 1)),
    (every_part_learns_alike, "ddp", Mesh()),
    (second_loss_by_local_targets, "fsdp", Mesh(2, 1, 1)),
]


@pytest.fixture(scope="module")
def expected_of_omni():
    return run_plain(OMNI, OF_OMNI)


@pytest.mark.parametrize("fault, plan, mesh", OMNI_CASES, ids=lambda v: getattr(v, "__name__", None))
def test_a_fault_of_omni_models_is_seen(fault, plan, mesh, expected_of_omni, monkeypatch):
    assert not differences(run_mesh(OMNI, find_plan(plan), mesh, OF_OMNI), expected_of_omni, OMNI)
    fault(monkeypatch)
    assert differences(run_mesh(OMNI, find_plan(plan), mesh, OF_OMNI), expected_of_omni, OMNI)


SP2, EP2, FSDP2, ONE = Mesh(1, 2, 1), Mesh(1, 1, 2), Mesh(2, 1, 1), Mesh()
CASES = [
    (reduce_over_copies_dropped, "ddp", FSDP2, {}),
    (reduce_over_copies_dropped, "fsdp", SP2, {}),
    (reduce_over_copies_dropped, "fsdp_ep", Mesh(2, 1, 2), {"replica": 2}),
    (reduce_scatter_dropped, "fsdp", FSDP2, {}),
    (reduce_scatter_dropped, "fsdp_sp", SP2, {}),
    (replicas_not_reduced, "fsdp", FSDP2, {"replica": 2}),
    (gradients_reduced_in_bf16, "fsdp", FSDP2, {}),
    (pieces_in_the_wrong_order, "fsdp", FSDP2, {}),
    (experts_one_slot_on, "fsdp_ep", EP2, {}),
    (combined_without_the_inverse, "fsdp_ep", EP2, {}),
    (loss_by_local_tokens, "fsdp", FSDP2, {}),
    (loss_by_local_tokens, "fsdp", SP2, {}),
    (balance_by_local_counts, "fsdp", FSDP2, {}),
    (loss_divided_by_sp, "fsdp_sp", SP2, {}),
    (norm_of_one_rank, "fsdp", FSDP2, {}),
    (copies_counted_in_the_norm, "ddp", FSDP2, {}),
    (positions_from_the_start_of_the_part, "fsdp_sp", SP2, {}),
    (segments_not_gathered, "fsdp_sp", SP2, {}),
    (heads_repeated_in_the_wrong_order, "fsdp_sp", Mesh(1, 4, 1), {}),
    (heads_come_back_in_the_wrong_order, "fsdp_sp", SP2, {}),
    (labels_shifted_again, "ddp", ONE, {}),
    (decay_of_norms, "ddp", ONE, {}),
    (no_decay_at_all, "ddp", ONE, {}),
    (moments_not_kept, "ddp", ONE, {}),
    (no_clipping, "ddp", ONE, {}),
    (bias_corrected_a_step_late, "ddp", ONE, {}),
    (accumulated_without_zeroing, "ddp", ONE, {"accumulate": 2}),
]


@pytest.fixture(scope="module")
def expected():
    return run_plain(MODEL, BATCHES)


def compare(expected, plan, mesh, how):
    return differences(run_mesh(MODEL, find_plan(plan), mesh, BATCHES, **how), expected, MODEL)


@pytest.mark.parametrize("fault, plan, mesh, how", CASES, ids=lambda v: getattr(v, "__name__", None))
def test_a_fault_is_seen(fault, plan, mesh, how, expected, monkeypatch):
    fault(monkeypatch)
    assert compare(expected, plan, mesh, how)


@pytest.mark.parametrize("plan, mesh, how", {repr(case[1:]): case[1:] for case in CASES}.values())
def test_without_a_fault_nothing_is_seen(plan, mesh, how, expected):
    assert not [str(d) for d in compare(expected, plan, mesh, how)]

"""One training run made twice: plainly on one device, and under a plan on a mesh of threads.

The plain run shares only the model with the train step: it reads an ordinary dict of parameters,
and loss, gradients, clipping and AdamW are torch's own.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from .data import collate
from .items import on_one_device
from .job import Job, make_job
from .mesh import Mesh
from .model import Model, families, find_model
from .ops import Output, plain
from .optim import AdamW, Schedule
from .plan import Plan
from .ranks import run_ranks
from .specs import ParamSpec, normal, trainable
from .state import State, initial, make_state, own_slices, whole
from .step import Recipe, make_gradients, make_train_step, metric

Batch = Mapping[str, Tensor]

# What makes an error show. Updates large beside a parameter's rounding; an eps of a gradient's size, since
# AdamW with a small one forgets a gradient's scale; clipping that acts, so that a wrong norm is a wrong update.
RECIPE = Recipe(AdamW(lr=0.1, eps=0.003, clip=0.5), Schedule(steps=10, warmup=2), router_aux=0.3, router_z=0.02)
# Of a tensor's largest element. Runs of the same mathematics differ by a few 1e-6.
TOLERANCE = 3e-5

SMALL_ENOUGH = 1_000_000  # parameters of a model that is trained as it is
# A small config of any family, of sizes that most meshes cut unevenly, or into empty pieces.
SMALL = {
    "vocab_size": 131, "hidden_size": 24, "intermediate_size": 30, "moe_intermediate_size": 12,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "max_window_layers": 1,
    "sliding_window": 7, "pad_token_id": None,
}  # fmt: skip


class Run(NamedTuple):
    """metrics: of the last step. gradients: of the first batch at the initial parameters.
    params, mu, nu: after the last step. Tensors are whole. traffic: of the last step, on one rank."""

    metrics: dict[str, float]
    gradients: dict[str, Tensor]
    params: dict[str, Tensor]
    mu: dict[str, Tensor]
    nu: dict[str, Tensor]
    traffic: dict[str, tuple[int, int]]


class Difference(NamedTuple):
    """The element in which two runs differ most: `error` is relative to the largest one beside it."""

    what: str
    expected: object
    found: object
    error: float

    def __str__(self) -> str:
        return f"{self.what}: expected {self.expected}, found {self.found} (relative error {self.error:.1e})"


class Misplaced(Exception):
    """A tensor of the state, or a gradient, that does not lie where the plan says."""


def shrink(hf: Mapping) -> dict:
    """A model's config, made small enough to be run in no time: two layers, odd sizes."""
    small = {**hf, **{key: value for key, value in SMALL.items() if key in hf}}
    if small.get("layer_types"):
        small["layer_types"] = small["layer_types"][: small["num_hidden_layers"]]
    return small


def random_batch(vocab: int, rows: int, length: int, seed: int, packed: bool = True) -> dict[str, Tensor]:
    """Random tokens [rows, length]: documents of random lengths, the end of some rows padding, some labels absent."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (rows, length), generator=generator)

    def chance(p: float) -> Tensor:
        return torch.rand(rows, length, generator=generator) < p

    at = torch.arange(length).expand(rows, length)
    starts = (chance(0.2) if packed else torch.zeros(rows, length, dtype=torch.bool)) | (at == 0)
    begin = torch.where(starts, at, 0).cummax(1).values
    used = torch.randint(length // 2, 2 * length, (rows, 1), generator=generator)  # past the end: no padding
    padding = at >= used
    return {
        "input_ids": draw(0, vocab).masked_fill(padding, 0),
        "labels": draw(0, vocab).masked_fill(padding | chance(0.2), -100),
        "position_ids": (at - begin).masked_fill(padding, 0),
        "segment_ids": (starts.cumsum(1) - 1).masked_fill(padding, -1),
    }


def mixed_batch(model: Model, rows: int, seed: int, kinds: Sequence[int] | None = None) -> dict:
    """A batch of `rows` random samples of the model's own kinds (or of those numbered `kinds`, in turns), some labels
    absent."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for row in range(rows):
        examples = model.examples(generator)
        drawn = int(torch.randint(len(examples), (), generator=generator))
        found.append(model.prepare(examples[kinds[row % len(kinds)] if kinds else drawn]))
    batch = collate(found)
    if "input_ids" in batch:
        absent = (torch.rand(batch["input_ids"].shape, generator=generator) < 0.2) | (batch["segment_ids"] < 0)
        labels = torch.randint(model.cfg.vocab, absent.shape, generator=generator)
        batch["labels"] = labels.masked_fill(absent, -100)
    return batch


def small_model(model: Model) -> Model:
    """What is trained in a model's place: itself where it is small; else its config with small numbers or, of a family
    that takes more than text, its first preset."""
    if model.examples is None:
        return find_model(shrink(model.hf))
    if sum(spec.numel for spec in model.specs.values()) <= SMALL_ENOUGH:
        return model
    return find_model(next(iter(families()[model.family].PRESETS.values())))


def random_batches(model: Model, n: int, rows: int = 5, length: int = 11) -> list[dict]:
    """Global batches of rows (and of text columns) that no mesh divides: some ranks hold nothing but padding."""
    if model.examples is None:
        return [random_batch(model.cfg.vocab, rows, length, seed) for seed in range(n)]
    return [mixed_batch(model, rows, seed) for seed in range(n)]


def values(name: str, spec: ParamSpec) -> Tensor:
    """Initial values at which every part of a model matters: no norm at 1, no bias at 0."""
    return initial(name, spec, 0) + initial(f"{name} noise", replace(spec, init=normal(0.2)), 0)


# --- The plain run


def plain_losses(model: Model, out: Output, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """-> (losses by their metric's name, the weighted sum of those that are not the router's).

    Cross-entropy, and the router's losses as the papers write them, from one forward over all tokens.
    """
    targets = model.targets(batch)
    losses = {name: loss / targets[name].clamp(min=1) for name, loss in out.losses.items()}
    if out.unembedding is not None:
        logits = (out.hidden @ out.unembedding.T).flatten(0, 1)
        losses["loss"] = F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum") / targets["loss"].clamp(min=1)
    objective = sum(model.weights.get(name, 1.0) * loss for name, loss in losses.items())
    losses = {metric(name): loss for name, loss in losses.items()}
    if out.router is not None:
        tokens = (batch["segment_ids"] >= 0).sum()
        share, probability = out.router.counts.mean(0) / tokens, out.router.prob.mean(0) / tokens
        losses["router_aux_loss"] = share.numel() * share.dot(probability)
        losses["router_z_loss"] = out.router.z.mean() / tokens
    return losses, objective


def run_plain(model: Model, batches: Sequence[Batch], recipe: Recipe = RECIPE) -> Run:
    """One step on each batch, on one device."""
    params = {name: values(name, spec).requires_grad_(spec.lr > 0) for name, spec in model.specs.items()}
    adam, trained = recipe.adam, {name: params[name] for name in trainable(model.specs)}
    groups = [
        {"params": [params[name]], "weight_decay": adam.weight_decay * model.specs[name].decay} for name in trained
    ]
    optimizer = torch.optim.AdamW(groups, lr=adam.lr, betas=(adam.beta1, adam.beta2), eps=adam.eps)
    gradients = {}
    for step, batch in enumerate(batches):
        batch = on_one_device(batch, model.blanks)
        out = model.forward(params, batch, plain())
        losses, objective = plain_losses(model, out, batch)
        if out.router is not None:
            objective = objective + recipe.router_aux * losses["router_aux_loss"]
            objective = objective + recipe.router_z * losses["router_z_loss"]
        optimizer.zero_grad()
        objective.backward()
        if unused := [name for name, param in trained.items() if param.grad is None]:
            raise ValueError(f"the loss does not depend on {', '.join(unused[:3])}, which the model declares")
        gradients = gradients or {name: p.grad.clone() for name, p in trained.items()}
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), adam.clip)
        for group, name in zip(optimizer.param_groups, trained, strict=True):
            group["lr"] = adam.lr * model.specs[name].lr * float(recipe.schedule(torch.tensor(step)))
        optimizer.step()
    metrics = {name: float(loss.detach()) for name, loss in losses.items()} | {"grad_norm": float(norm)}
    moments = ({n: optimizer.state[p][key] for n, p in trained.items()} for key in ("exp_avg", "exp_avg_sq"))
    return Run(metrics, gradients, {n: p.detach() for n, p in params.items()}, *moments, {})


# --- The run on a mesh


class Traffic(TorchDispatchMode):
    """Counts this rank's collectives, and their bytes: the larger of what goes in and what comes out."""

    def __init__(self):
        super().__init__()
        self.seen: dict[str, tuple[int, int]] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.namespace == "_c10d_functional" and op is not torch.ops._c10d_functional.wait_tensor.default:
            kind = re.match("all_gather|reduce_scatter|all_reduce|all_to_all", op._opname).group()
            count, size = self.seen.get(kind, (0, 0))
            self.seen[kind] = (count + 1, size + max(t.numel() * t.element_size() for t in (args[0], out)))
        return out


def run_mesh(
    model: Model, plan: Plan, mesh: Mesh, batches: Sequence[Batch], recipe: Recipe = RECIPE, *, replica: int = 1, **how
) -> list[Run]:
    """`run_rank` on every rank of the mesh, as threads -> their runs."""
    return run_ranks(
        mesh.size * replica, lambda rank: run_rank(model, plan, mesh, batches, recipe, replica=replica, **how)
    )


def run_rank(
    model: Model, plan: Plan, mesh: Mesh, batches: Sequence[Batch], recipe: Recipe = RECIPE, *,
    replica: int = 1, remat: str = "none", accumulate: int = 1, mode: str = "off", kept: str = "fp32", **how,
) -> Run:  # fmt: skip
    """One step on each batch. Needs an initialised process group; every rank must call it. how: as `make_job` takes it.

    Traffic is counted where nothing is compiled (mode "off").
    Raises ValueError where model, plan and mesh do not fit each other, and Misplaced.
    """
    job = make_job(model, plan, mesh, replica, remat=remat, **how)
    state = make_state(
        model.specs, job.placements, job.device_mesh, lambda name, spec, slices: values(name, spec)[slices], kept
    )
    of_batch = make_gradients(model, job.sharding, job.ops, recipe, mode)(
        state, job.microbatches(batches[0])[0]
    )
    step = make_train_step(model, job.sharding, job.ops, recipe, mode, accumulate)
    traffic = Traffic()
    for batch in batches:
        traffic.seen.clear()
        with traffic if mode == "off" else nullcontext():
            state, metrics = step(state, job.microbatches(batch, accumulate))
    _check_placed(job, of_batch, state)
    numbers = {name: float(value) for name, value in metrics.items() if value.ndim == 0}
    tensors = ({n: whole(t).clone() for n, t in ts.items()} for ts in (of_batch, state.params, state.mu, state.nu))
    return Run(numbers, *tensors, traffic.seen)


def _check_placed(job: Job, of_batch: Mapping[str, DTensor], state: State) -> None:
    moments = {"first moment of": state.mu, "second moment of": state.nu}
    kinds = {"gradient of": of_batch, "parameter": state.params, **moments}
    for kind, tensors in kinds.items():
        expected = job.model.specs if kind == "parameter" else trainable(job.model.specs)
        if tensors.keys() != expected.keys():
            raise Misplaced(f"{kind} {', '.join(tensors.keys() ^ expected.keys())}: there is one too many or too few")
        for name, spec in expected.items():
            t, wanted = tensors[name], job.placements[name]
            shape = tuple(s.stop - s.start for s in own_slices(spec.shape, wanted, job.device_mesh))
            if tuple(t.placements) != tuple(wanted):
                raise Misplaced(f"{kind} {name}: expected {wanted}, found {t.placements}")
            if t.to_local().shape != shape:
                raise Misplaced(f"{kind} {name}: expected a piece of {shape}, found {tuple(t.to_local().shape)}")


# --- The comparison


def differences(found: Sequence[Run], expected: Run, model: Model, tolerance: float = TOLERANCE) -> list[Difference]:
    """Where the runs of a mesh's ranks differ from the expected one, in the model's order; empty where they agree.

    Copies of a tensor on several ranks must agree bit for bit: nothing would bring them together again.
    """
    return [d for d in deviations(found, expected, model) if not d.error <= tolerance]


def deviations(found: Sequence[Run], expected: Run, model: Model) -> list[Difference]:
    """As `differences`, of whatever size: one for every metric and tensor."""
    first = found[0]
    out = []
    before = {name: values(name, spec) for name, spec in model.specs.items()}
    changed = {name: p - before[name] for name, p in expected.params.items()}
    kinds = (
        ("gradient of", first.gradients, expected.gradients, expected.gradients),
        ("updated", first.params, expected.params, changed),
        ("first moment of", first.mu, expected.mu, expected.mu),
        ("second moment of", first.nu, expected.nu, expected.nu),
    )
    for kind, ours, theirs, scale in kinds:
        # A gradient may be zero but for the rounding of larger ones (of queries, where nobody sees a second token).
        sizes = torch.stack([scale[name].abs().max() for name in expected.gradients])
        floor = 0.1 * float(sizes[sizes > 0].median()) if sizes.any() else 1.0
        for name, tensor in theirs.items():
            size = max(float(scale[name].abs().max()), floor)
            if kind == "updated":  # a small change drowns in the rounding of what it is added to: two units of that pass
                size = max(size, 2 * torch.finfo(tensor.dtype).eps * float(tensor.abs().max()) / TOLERANCE)
            out.append(_largest(f"{kind} {name}", ours[name], tensor, size))
    for name, value in expected.metrics.items():
        out.append(Difference(name, value, first.metrics[name], abs(first.metrics[name] - value) / max(abs(value), 1e-9)))
    for rank, run in enumerate(found):
        for kind in ("gradients", "params", "mu", "nu"):
            for name, tensor in getattr(run, kind).items():
                if not torch.equal(tensor, getattr(first, kind)[name]):
                    what = f"{kind} of {name}"
                    out.append(Difference(what, "the same bits on all ranks", f"others on rank {rank}", 1.0))
    return out


def _largest(what: str, found: Tensor, expected: Tensor, scale: float) -> Difference:
    if found.shape != expected.shape:
        return Difference(what, tuple(expected.shape), tuple(found.shape), 1.0)
    error = (found - expected).abs().nan_to_num(nan=torch.inf)
    at = int(error.argmax())
    numbers = (float(t.flatten()[at]) for t in (expected, found))
    return Difference(what, *numbers, float(error.flatten()[at]) / scale)

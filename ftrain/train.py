"""The training run, from a configuration to a checkpoint: what each rank does."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import checkpoint, launch, recipes, records, samples, tokenizer
from .cache import content_hash
from .config import TrainConfig, factors, resolved
from .console import Console, TensorSummary, bytes_, console, si
from .data import Batch, Data, Text, batch_at, heldout_batches, prefetch, prepare
from .disk import CHECKPOINTS, TRAIN_STATE, read_json, tidy
from .flops import flops_per_token, peak_flops, peak_memory
from .generate import generate
from .groups import regrouped
from .items import Packing
from .job import Job, make_job
from .mesh import resolve
from .model import Model, find_model, has_weights, param_counts
from .moments import size
from .optim import AdamW, Schedule
from .plan import find_plan
from .precision import by_layer, compute_dtype, fp8_report
from .pretrained import hf_config, init_from, init_from_sources
from .recipes import Run
from .specs import Specs, trainable
from .state import State, init_state
from .step import Recipe, make_eval_step, make_train_step, metric

SAMPLE_TOKENS = 48

Log = Callable[..., None]  # (step, **values), as `Records.log`
Shapes = tuple[tuple[str, tuple[int, ...]], ...]
T = TypeVar("T")


class Diverged(ValueError):
    """The loss or a gradient is no longer a finite number."""


def main(cfg: TrainConfig) -> None:
    """Train as `cfg` says. Every rank of the job calls it."""
    process = launch.init()
    con = console(process.rank)
    try:
        con.info(f"ftrain on {process.world} rank{'s' * (process.world > 1)} ({process.device})")
        cfg = resolved(cfg, process.device.type != "cpu")
        with records.hold(cfg.out, process.rank):
            _run(cfg, process, con)
    finally:
        launch.finish()


def _run(cfg: TrainConfig, process: launch.Process, con: Console) -> None:
    mesh = resolve(cfg.mesh.fsdp, cfg.mesh.sp, cfg.mesh.ep, cfg.mesh.replica, process.world)
    recipe = recipes.find(cfg.recipe) if cfg.recipe else None
    if hasattr(recipe, "model"):
        with con.phase("making the model"):
            which = _on_one_first(partial(recipe.model, cfg), process.local_rank)
    else:
        which = cfg.model
    model = find_model(which)
    model = replace(model, specs=regrouped(model.specs, cfg.freeze, factors(cfg.lr_factor)))
    job = make_job(
        model, find_plan(cfg.plan), mesh, cfg.mesh.replica,
        device_type=process.device.type, precision=cfg.precision, remat=cfg.remat,
    )  # fmt: skip
    directories = (cfg.tokenizer, cfg.init, which, model.hf.get("weights"))
    source = next((Path(d) for d in directories if isinstance(d, str) and Path(d).is_dir()), None)
    weights = cfg.init or (which if isinstance(which, str) and has_weights(which) else None)
    _check_out(cfg, process.rank)
    with con.phase("reading the data"):
        data = _same_on_all(partial(_data, cfg, model, source, recipe), process.local_rank)
    with con.phase("loading the parameters" if weights or model.sources else "initialising the parameters"):
        state, position, resumed = _start(cfg, job, weights, data.digest, con)
    if cfg.overwrite:  # only now: a mistake above costs nothing, and the weights may come from there
        dist.barrier()
        if process.rank == 0:
            records.clear(cfg.out)
    _introduce(cfg, job, state, data, con)
    opened = records.open_records(cfg, resumed, con.warn) if process.rank == 0 else None
    log = opened.log if opened else lambda step, **values: None
    try:
        _loop(cfg, process, job, state, data, position, con, log, recipe)
    finally:
        if opened:
            opened.close()


def _check_out(cfg: TrainConfig, rank: int) -> None:
    """See that the run directory is ours to write to, before any work is done."""
    checkpoints = (Path(cfg.out) / CHECKPOINTS).resolve()
    for name, directory in (("--init", cfg.init), ("--model", cfg.model)):
        if directory and checkpoints in Path(directory).resolve().parents:
            raise ValueError(
                f"{name} {directory} is a checkpoint of --out {cfg.out}, where --overwrite and --keep delete: "
                "give another --out, or go on from it with --resume"
            )
    if rank == 0:
        tidy(Path(cfg.out) / CHECKPOINTS)
    dist.barrier()
    if cfg.resume == "never" and not cfg.overwrite and checkpoint.latest(cfg.out):
        raise ValueError(f"--resume never: {cfg.out} holds checkpoints; give another --out, or --overwrite")


def _on_one_first(make: Callable[[], T], local_rank: int) -> T:
    """`make()` on one rank of each machine, which fills the cache, then on the others, which read it."""
    made = make() if local_rank == 0 else None
    # Of its own, to outwait the minutes that other collectives have: a large text takes hours.
    dist.barrier(dist.new_group(backend="gloo", timeout=timedelta(days=1)))
    return make() if made is None else made


def _same_on_all(make: Callable[[], Data], local_rank: int) -> Data:
    """As `_on_one_first`. Raises ValueError where ranks have made different data."""
    data = _on_one_first(make, local_rank)
    digest = torch.tensor([int(content_hash(data.digest)[:12], 16)])
    everyones = [torch.empty_like(digest) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, digest, group=dist.new_group(backend="gloo"))
    if any(other != digest for other in everyones):
        raise ValueError("the ranks read different text (another file, or another Python's library): give all the same")
    return data


def _data(cfg: TrainConfig, model: Model, source: Path | None, recipe: ModuleType | None) -> Data:
    """What is trained on: a recipe's data, samples of several modalities, or text."""
    if recipe:
        return recipe.data(cfg, model, source)
    if samples.are_samples(cfg.data):
        return samples.prepare(cfg.data, model, source, cfg.seq_len)
    if not getattr(model.cfg, "vocab", 0):
        raise ValueError(f"a model of family {model.family} takes no text alone: train it by a --recipe")
    text = prepare(cfg.data, source, model.cfg.vocab, cfg.seq_len)
    return Data(
        batch=partial(batch_at, text.train), heldout=partial(heldout_batches, text.heldout), digest=text.digest,
        describe=f"{len(text.train.ids):,} tokens of {cfg.data or 'the Python standard library'}, "
        f"{len(text.heldout.ids):,} held out",
        save=partial(tokenizer.save, text.tokenizer, source=source), sample=partial(_sample, text),
    )  # fmt: skip


def _start(
    cfg: TrainConfig, job: Job, weights: str | None, digest: str, con: Console
) -> tuple[State, int, int | None]:
    """-> the state, the position in the data, and the step resumed from (None: a new run)."""
    specs, placements, mesh, kept = job.model.specs, job.placements, job.device_mesh, cfg.optimizer_state
    if cfg.resume != "never" and not (cfg.resume == "auto" and cfg.overwrite):
        _check_frozen(specs, Path(cfg.resume) if cfg.resume != "auto" else next(iter(checkpoint.latest(cfg.out)), None))
    if cfg.resume not in ("auto", "never"):
        state, meta = checkpoint.restore(cfg.resume, specs, placements, mesh, kept)
        checkpoint.set_rng(meta["rng"])
        con.info(f"resuming from {cfg.resume}")
        newest = next(iter(checkpoint.latest(cfg.out)), None)
        if newest and checkpoint.step_of(newest) > int(state.step):
            con.warn(f"{newest} is later than where this run starts: --resume auto would go on from there")
    elif cfg.resume == "auto" and not cfg.overwrite and checkpoint.latest(cfg.out):
        state, meta, directory = checkpoint.resume(cfg.out, specs, placements, mesh, kept, con.warn)
        con.info(f"resuming from {directory}")
        changed = records.changes(cfg)
        if changed:
            con.info(f"other than when it was last started: {', '.join(changed)}")
    elif weights:
        return init_from(weights, job.model, placements, mesh, kept), 0, None
    elif job.model.sources:
        return init_from_sources(job.model, placements, mesh, cfg.seed, kept), 0, None
    else:
        torch.manual_seed(cfg.seed)
        return init_state(specs, placements, mesh, cfg.seed, kept), 0, None
    if (before := meta.get("optimizer_state", "fp32")) != kept:
        con.info(f"the optimizer state was kept in {before}, and is in {kept} from here on")
    if meta["seed"] != cfg.seed:
        con.warn(f"--seed {cfg.seed}, but the checkpoint's run had {meta['seed']}: the data's order changes here")
    if meta["data"] != digest:
        con.warn("the text or its tokenizer is not that of the checkpoint's run: other data from here on")
    if meta.get("seq_len", cfg.seq_len) != cfg.seq_len:
        con.warn(
            f"--seq-len {cfg.seq_len}, but the checkpoint's run had {meta['seq_len']}: the text is cut into other "
            "sequences, of which some repeat what was seen"
        )
    return state, meta["sequences"], int(state.step)


def _check_frozen(specs: Specs, directory: Path | None) -> None:
    """Raises ValueError where other parameters were trained in a checkpoint: only those have moments there."""
    if directory is None:
        return
    try:
        before = set(read_json(directory / TRAIN_STATE / "mu.safetensors.index.json")["weight_map"])
    except (OSError, ValueError, KeyError):
        return  # `restore` says what is wrong with it
    for now, words in ((before - {*trainable(specs)}, "frozen"), ({*trainable(specs)} - before, "trained")):
        if changed := sorted(now & {*specs}):
            more = f" and {len(changed) - 2} more" * (len(changed) > 2)
            raise ValueError(
                f"{', '.join(changed[:2])}{more} would be {words} from here on, but not in {directory}: go on with its "
                f"--freeze and --lr-factor, or begin a new run with its weights (--init {directory} and another --out)"
            )


def _introduce(cfg: TrainConfig, job: Job, state: State, data: Data, con: Console) -> None:
    """The header: what is trained, on what, and how it is spread."""
    total, active = param_counts(job.model.specs)
    shards = [
        TensorSummary(n, tuple(p.shape), " ".join(map(_short, p.placements)), 4 * p.to_local().numel())
        for n, p in state.params.items()
    ]
    ranks = job.batch_ranks * cfg.accumulate
    more = {
        "data": data.describe,
        "batch": f"{cfg.batch_size} sequences of {cfg.seq_len} tokens, "
        f"{-(-cfg.batch_size // ranks)} on a rank at a time",
        "compile": f"{cfg.compile}, remat {cfg.remat}",
        "run directory": cfg.out,
    }
    slowed: dict[float, int] = {}
    for spec in job.model.specs.values():
        slowed[spec.lr] = slowed.get(spec.lr, 0) + spec.numel
    if slowed.keys() != {1.0}:
        more["trained"] = ", ".join(
            f"{si(n)} {f'at {lr:g} of the learning rate' if lr else 'frozen'}" if lr != 1 else f"{si(n)} in full"
            for lr, n in sorted(slowed.items(), reverse=True)
        )
    if cfg.precision.startswith("fp8"):
        report = fp8_report(job.model)
        more["float8"] = ", ".join(by_layer(report.quantised)) or "nothing"
        more["bf16 for their shape"] = ", ".join(by_layer(report.fallback)) or "nothing"
    if cfg.optimizer_state != "fp32":
        held = sum(size(moment.to_local()) for of in (state.mu, state.nu) for moment in of.values())
        more["optimizer state"] = f"{cfg.optimizer_state}, {bytes_(held)} per rank"
    con.header(
        model=f"{cfg.recipe or cfg.model} ({job.model.family})", plan=cfg.plan,
        mesh=" ".join(f"{a}={n}" for a, n in zip(job.device_mesh.mesh_dim_names, job.device_mesh.shape)),
        precision=cfg.precision, total=total, active=active, local=sum(s.local_bytes for s in shards) // 4,
        largest=sorted(shards, key=lambda s: -torch.Size(s.shape).numel())[:5], **more,
    )  # fmt: skip
    if cfg.batch_size % ranks or cfg.seq_len % job.mesh.sp:
        con.warn(
            f"{cfg.batch_size} sequences of {cfg.seq_len} tokens do not divide evenly over {ranks} parts of the batch "
            f"and {job.mesh.sp} of the sequence: padding fills the rest, and costs time"
        )


def _short(placement) -> str:
    return f"Shard({placement.dim})" if placement.is_shard() else "Replicate"


def _loop(
    cfg: TrainConfig, process: launch.Process, job: Job, state: State, data: Data, position: int,
    con: Console, log: Log, recipe: ModuleType | None,
) -> None:  # fmt: skip
    """The steps from the state's to cfg.steps, with their measurements and checkpoints."""
    first = int(state.step)
    run = Run(cfg, job, state, data, process.device, con)
    if first >= cfg.steps:
        con.info(
            f"nothing to do: the run in {cfg.out} is at step {first} of --steps {cfg.steps}; "
            "give more --steps, or --overwrite or another --out for a new run"
        )
        return
    train_step = make_train_step(
        job.model, job.sharding, job.ops, _recipe(cfg, job.model), cfg.compile, cfg.accumulate
    )
    # Not compiled: run so seldom, a second graph would cost more time than it saves.
    eval_step = make_eval_step(job.model, job.sharding, job.ops, "off")
    peak = peak_flops(process.device, compute_dtype(cfg.precision))

    def batches() -> Iterator[tuple[list[Batch], dict[str, list[Packing]], int]]:
        for index in range(position, position + (cfg.steps - first) * cfg.batch_size, cfg.batch_size):
            batch = data.batch(index, cfg.batch_size, cfg.seed)
            yield *job.shares(batch, cfg.accumulate), int((batch["segment_ids"] >= 0).sum())

    def evaluate(step: int) -> None:
        with con.phase("measuring the held-out loss"):
            found = _heldout_losses(cfg, job, data, lambda batch: eval_step(state, _to(batch, process.device)))
        said = (f"{_words(metric)} {loss:.4f} over {count:,} {'tokens' if metric == 'loss' else 'targets'}"
                for metric, (loss, count) in found.items())  # fmt: skip
        con.info(f"step {step}: held-out {', '.join(said)}")
        if step > first or first == 0:  # a resumed run's first is in the records already
            log(step, **{f"heldout_{metric}": loss for metric, (loss, _) in found.items()})

    def score(step: int, by: str) -> None:
        if hasattr(recipe, by):
            with con.phase("scoring"):
                scores = getattr(recipe, by)(run)
            con.info(f"step {step}: {', '.join(f'{_words(name)} {value:.4g}' for name, value in scores.items())}")
            log(step, **scores)

    def save(step: int) -> None:
        with con.phase(f"saving checkpoint step-{step}"):
            _save(cfg, job, state, data, position + (step - first) * cfg.batch_size)

    evaluate(first)
    if first == 0:
        score(first, "start")
    # The step of the newest checkpoint in cfg.out; at 0 there is nothing that needs one.
    saved = first if first == 0 or cfg.resume == "auto" else None
    shapes: set[Shapes] = set()
    start, done = time.perf_counter(), 0
    for step, (parts, packings, tokens) in enumerate(prefetch(batches()), first + 1):
        began = time.perf_counter()
        seen = len(shapes)
        shapes |= {_shapes(part) for part in parts}
        compiles = len(shapes) > seen and cfg.compile != "off"
        which = f", graph {len(shapes)}" if seen else ""
        with con.phase(f"compiling the train step ({cfg.compile}{which})") if compiles else nullcontext():
            state, metrics = train_step(state, [_to(part, process.device) for part in parts])
            values = _values(metrics)
        seconds = time.perf_counter() - began
        if step == first + 1 and compiles:
            start = time.perf_counter()  # the estimate of what is left counts from here
        else:
            done += 1
        if not values.pop("finite"):
            if saved != step - 1:
                save(step - 1)
            raise _diverged(step, values, cfg.out)
        flops = _flops_per_token(cfg, job.model, values)
        measured = {
            "tokens_per_s": tokens / seconds,
            "mfu": flops * tokens / seconds / (peak * process.world) if peak and flops else None,
            "peak_memory_bytes": peak_memory(process.device),
        }
        # What encoders compute depends on the batch, and a new size of it is a new graph.
        shared = {name: _together(of_encoder) for name, of_encoder in packings.items()}
        balance = {f"{name}_{of}": getattr(p, of) for name, p in shared.items() for of in ("waste", "imbalance")}
        balance |= {"graphs": len(shapes)} if shared or len(shapes) > 1 else {}
        log(step, **values, **balance, tokens=tokens, step_time_s=seconds, **measured)
        if step % cfg.log_every == 0 or step in (first + 1, cfg.steps):
            left = (cfg.steps - step) * ((time.perf_counter() - start) / done if done else seconds)
            shown = {name: f"{value:.4f}" for name, value in values.items() if _is_loss(name)}
            shown |= {"busiest_expert": f"{values['expert_load_max']:.2f}x"} if "expert_load_max" in values else {}
            shown |= {name: f"padding {p.waste:.0%}, imbalance {p.imbalance:.2f}x" for name, p in shared.items()}
            con.step(
                step, cfg.steps, loss=values.get("loss"), grad_norm=values["grad_norm"], lr=values["lr"],
                eta_s=left, **measured, **shown,
            )  # fmt: skip
        if step == cfg.steps or (cfg.eval_every and step % cfg.eval_every == 0):
            evaluate(step)
        if step == cfg.steps or (cfg.save_every and step % cfg.save_every == 0):
            save(step)
            saved = step
    if data.sample:
        with con.phase("sampling"):
            line = data.sample(job, state)
        con.info(f"sample: {line}")
    score(cfg.steps, "finish")
    opens = "transformers" if hf_config(job.model.hf, None).get("architectures") else "ftrain.load_pretrained"
    con.info(f"the model is in {Path(cfg.out) / CHECKPOINTS / f'step-{cfg.steps}'}, as {opens} opens it")


def _shapes(part: Batch) -> Shapes:
    """What tells the graphs apart that are compiled for microbatches."""
    return tuple((name, tuple(t.shape)) for name, t in sorted(part.items()))


def _together(packings: Sequence[Packing]) -> Packing:
    """How well the items of all microbatches of a step were shared out."""
    units, most, padded, _ = (sum(of) for of in zip(*packings))
    return Packing(units, most, padded, packings[0].ranks)


def _flops_per_token(cfg: TrainConfig, model: Model, values: Mapping[str, float]) -> float | None:
    """None where it is not known: of models that take or give more than text, and of those partly frozen."""
    if model.blanks or "loss" not in values or len(trainable(model.specs)) < len(model.specs):
        return None
    return flops_per_token(model.specs, model.cfg, cfg.seq_len)


def _is_loss(name: str) -> bool:
    """Whether a metric is a loss of a model's own, beside the next token's."""
    return name.endswith("_loss") and not name.startswith("router_")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _heldout_losses(
    cfg: TrainConfig, job: Job, data: Data, eval_step: Callable[[Batch], dict[str, Tensor]]
) -> dict[str, tuple[float, int]]:
    """Of each loss, by the name of its metric: (mean, targets) over the first cfg.eval_batches held-out batches."""
    totals: dict[str, float] = {}
    for batch in data.heldout(cfg.batch_size, cfg.eval_batches):
        for part in job.microbatches(batch, cfg.accumulate):
            for name, value in eval_step(part).items():
                if name.endswith(("_sum", "_targets")):
                    totals[name] = totals.get(name, 0.0) + float(value)
    names = [name.removesuffix("_sum") for name in totals if name.endswith("_sum")]
    counts = {name: int(totals[f"{name}_targets"]) for name in names}
    return {metric(name): (totals[f"{name}_sum"] / max(n, 1), n) for name, n in counts.items()}


def _save(cfg: TrainConfig, job: Job, state: State, data: Data, sequences: int) -> None:
    """A checkpoint of the state, after so many sequences."""
    meta = {
        "sequences": sequences, "seq_len": cfg.seq_len, "seed": cfg.seed, "data": data.digest,
        "optimizer_state": cfg.optimizer_state, "model": cfg.model, "plan": cfg.plan, "mesh": dict(job.mesh._asdict()),
    }  # fmt: skip
    checkpoint.save(cfg.out, state, job.model, meta, data.save, keep=cfg.keep)


def _diverged(step: int, values: dict[str, float], out: str) -> Diverged:
    kept = f"step {step - 1} is saved in {out}" if step > 1 else "there was none before it to be saved"
    losses = ", ".join(f"the {_words(name)} is {values[name]}" for name in values if name == "loss" or _is_loss(name))
    return Diverged(
        f"{losses} and the gradient norm {values['grad_norm']} at step {step} (lr "
        f"{values['lr']:.2e}): the update was not made, and {kept}; "
        "try a smaller --lr, a longer --warmup, or other data"
    )


def _recipe(cfg: TrainConfig, model: Model) -> Recipe:
    aux = cfg.router_aux_loss
    if aux is None:
        aux = getattr(model.cfg, "balance", 0.0)
    adam = AdamW(cfg.lr, cfg.beta1, cfg.beta2, cfg.eps, cfg.weight_decay, cfg.clip)
    schedule = Schedule(cfg.steps, cfg.schedule, cfg.warmup, cfg.min_lr_ratio, cfg.decay)
    return Recipe(adam, schedule, router_aux=aux, router_z=cfg.router_z_loss)


def _to(batch: Batch, device: torch.device) -> Batch:
    # In one order, whatever the batch was made of: the compiler would take another for another graph.
    return {name: t.to(device, non_blocking=True) for name, t in sorted(batch.items())}


def _values(metrics: dict[str, Tensor]) -> dict[str, float]:
    """The step's metrics as numbers; of the experts' load, the busiest's and the idlest's share of the mean."""
    values = {name: float(t) for name, t in metrics.items() if t.ndim == 0}
    if "expert_counts" in metrics:
        load = metrics["expert_counts"] / metrics["expert_counts"].mean(-1, keepdim=True)
        values |= {"expert_load_max": float(load.max()), "expert_load_min": float(load.min())}
    return values


def _sample(text: Text, job: Job, state: State) -> str:
    """How the model goes on from the beginning of a held-out document."""
    prompt = [int(i) for i in text.heldout.ids[:16]]
    tokens = generate(job, state, prompt, SAMPLE_TOKENS, stop=text.eos)
    return f"{text.tokenizer.decode(prompt)!r} -> {text.tokenizer.decode(tokens)!r}"

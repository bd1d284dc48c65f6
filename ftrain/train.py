"""The training run, from a configuration to a checkpoint: what each rank does."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch
import torch.distributed as dist

from . import checkpoint, launch, recipes, records, samples, tokenizer
from .cache import content_hash
from .config import TrainConfig, factors, resolved
from .console import Console, TensorSummary, bytes_, console, si
from .data import Data, Text, batch_at, heldout_batches, prepare
from .disk import CHECKPOINTS, TRAIN_STATE, read_json, tidy
from .generate import generate
from .groups import regrouped
from .job import Job, make_job
from .loop import loop
from .mesh import resolve
from .model import Model, find_model, has_weights, param_counts
from .moments import size
from .optim import Optimizer
from .plan import find_plan
from .precision import by_layer, fp8_report
from .pretrained import init_from, init_from_sources
from .specs import Specs, trainable
from .state import State, init_state

SAMPLE_TOKENS = 48

T = TypeVar("T")


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
        device_type=process.device.type, precision=cfg.precision, remat=cfg.remat, fp8_all_gather=cfg.fp8_all_gather,
    )  # fmt: skip
    optimizer = None
    if cfg.optimizer != "adamw":
        from .interop.optimizer import find_optimizer

        optimizer, words = find_optimizer(cfg, model.specs)
        con.info(f"optimizer: {words}")
    directories = (cfg.tokenizer, cfg.init, which, model.hf.get("weights"))
    source = next((Path(d) for d in directories if isinstance(d, str) and Path(d).is_dir()), None)
    weights = cfg.init or (which if isinstance(which, str) and has_weights(which) else None)
    _check_out(cfg, process.rank)
    with con.phase("reading the data"):
        data = _same_on_all(partial(_data, cfg, model, source, recipe), process.local_rank)
    with con.phase("loading the parameters" if weights or model.sources else "initialising the parameters"):
        state, position, resumed = _start(cfg, job, weights, optimizer, data.digest, con)
    if cfg.overwrite:  # only now: a mistake above costs nothing, and the weights may come from there
        dist.barrier()
        if process.rank == 0:
            records.clear(cfg.out)
    _introduce(cfg, job, state, data, con)
    opened = records.open_records(cfg, resumed, con.warn) if process.rank == 0 else None
    log = opened.log if opened else lambda step, **values: None
    try:
        loop(cfg, process, job, state, data, position, con, log, recipe, optimizer)
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
    cfg: TrainConfig, job: Job, weights: str | None, optimizer: Optimizer | None, digest: str, con: Console
) -> tuple[State, int, int | None]:
    """-> the state, the position in the data, and the step resumed from (None: a new run)."""
    specs, placements, mesh = job.model.specs, job.placements, job.device_mesh
    kept = optimizer or cfg.optimizer_state
    if cfg.resume != "never" and not (cfg.resume == "auto" and cfg.overwrite):
        before = Path(cfg.resume) if cfg.resume != "auto" else next(iter(checkpoint.latest(cfg.out)), None)
        _check_optimizer(cfg, before)
        _check_frozen(specs, before)
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
    if optimizer is None and (before := meta.get("optimizer_state", "fp32")) != kept:
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


def _check_optimizer(cfg: TrainConfig, directory: Path | None) -> None:
    """Raises ValueError where another optimizer wrote a checkpoint: what it keeps may look alike and mean something else."""
    try:
        before = read_json(directory / TRAIN_STATE / "train_state.json").get("optimizer", "adamw")
    except (AttributeError, OSError, ValueError, TypeError):
        return  # there is none, or `restore` says what is wrong with it
    if before != cfg.optimizer:
        raise ValueError(
            f"--optimizer {cfg.optimizer}, but {directory} is of {before}: go on with that, or begin a new run with its "
            f"weights (--init {directory} and another --out)"
        )


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


def _sample(text: Text, job: Job, state: State) -> str:
    """How the model goes on from the beginning of a held-out document."""
    prompt = [int(i) for i in text.heldout.ids[:16]]
    tokens = generate(job, state, prompt, SAMPLE_TOKENS, stop=text.eos)
    return f"{text.tokenizer.decode(prompt)!r} -> {text.tokenizer.decode(tokens)!r}"

"""The training run, from a configuration to a checkpoint: what each rank does."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from . import checkpoint, launch, records, tokenizer
from .config import TrainConfig, resolved
from .console import Console, TensorSummary, console
from .data import Batch, Data, batch_at, heldout_batches, prefetch, prepare
from .disk import CHECKPOINTS, tidy
from .flops import flops_per_token, peak_flops, peak_memory
from .generate import generate
from .job import Job, make_job
from .mesh import resolve
from .model import Model, find_model, param_counts
from .optim import AdamW, Schedule
from .plan import find_plan
from .precision import by_layer, compute_dtype, fp8_report
from .pretrained import init_from
from .state import State, init_state
from .step import Recipe, make_eval_step, make_train_step

SAMPLE_TOKENS = 48

Log = Callable[..., None]  # (step, **values), as `Records.log`


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
    model = find_model(cfg.model)
    job = make_job(
        model, find_plan(cfg.plan), mesh, cfg.mesh.replica,
        device_type=process.device.type, precision=cfg.precision, remat=cfg.remat,
    )  # fmt: skip
    weights = cfg.init or (cfg.model if _has_weights(cfg.model) else None)
    source = next((Path(d) for d in (cfg.init, cfg.model) if d and Path(d).is_dir()), None)
    _check_out(cfg, process.rank)
    with con.phase("reading the data"):
        data = _prepare_on_one(cfg, source, model, process.local_rank)
    with con.phase("loading the parameters" if weights else "initialising the parameters"):
        state, position, resumed = _start(cfg, job, weights, data.digest, con)
    if cfg.overwrite:  # only now: a mistake above costs nothing, and the weights may come from there
        dist.barrier()
        if process.rank == 0:
            records.clear(cfg.out)
    _introduce(cfg, job, state, data, con)
    opened = records.open_records(cfg, resumed, con.warn) if process.rank == 0 else None
    log = opened.log if opened else lambda step, **values: None
    try:
        _loop(cfg, process, job, state, data, position, con, log, source)
    finally:
        if opened:
            opened.close()


def _has_weights(model: str) -> bool:
    return Path(model).is_dir() and any(Path(model).glob("*.safetensors"))


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


def _prepare_on_one(cfg: TrainConfig, source: Path | None, model: Model, local_rank: int) -> Data:
    """One rank of each machine tokenises and fills the cache, the others read it."""
    ready = partial(prepare, cfg.data, source, model.cfg.vocab, cfg.seq_len)
    data = ready() if local_rank == 0 else None
    # Of its own, to outwait the minutes that other collectives have: a large text takes hours.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    dist.barrier(group)
    data = data or ready()
    digest = torch.tensor([int(data.digest[:12], 16)])
    everyones = [torch.empty_like(digest) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, digest, group=group)
    if any(other != digest for other in everyones):
        raise ValueError("the ranks read different text (another file, or another Python's library): give all the same")
    return data


def _start(
    cfg: TrainConfig, job: Job, weights: str | None, digest: str, con: Console
) -> tuple[State, int, int | None]:
    """-> the state, the position in the data, and the step resumed from (None: a new run)."""
    specs, placements, mesh = job.model.specs, job.placements, job.device_mesh
    if cfg.resume not in ("auto", "never"):
        state, meta = checkpoint.restore(cfg.resume, specs, placements, mesh)
        checkpoint.set_rng(meta["rng"])
        con.info(f"resuming from {cfg.resume}")
        newest = next(iter(checkpoint.latest(cfg.out)), None)
        if newest and checkpoint.step_of(newest) > int(state.step):
            con.warn(f"{newest} is later than where this run starts: --resume auto would go on from there")
    elif cfg.resume == "auto" and not cfg.overwrite and checkpoint.latest(cfg.out):
        state, meta, directory = checkpoint.resume(cfg.out, specs, placements, mesh, warn=con.warn)
        con.info(f"resuming from {directory}")
        changed = records.changes(cfg)
        if changed:
            con.info(f"other than when it was last started: {', '.join(changed)}")
    elif weights:
        return init_from(weights, job.model, placements, mesh), 0, None
    else:
        torch.manual_seed(cfg.seed)
        return init_state(specs, placements, mesh, cfg.seed), 0, None
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


def _introduce(cfg: TrainConfig, job: Job, state: State, data: Data, con: Console) -> None:
    """The header: what is trained, on what, and how it is spread."""
    total, active = param_counts(job.model.specs)
    shards = [
        TensorSummary(n, tuple(p.shape), " ".join(map(_short, p.placements)), 4 * p.to_local().numel())
        for n, p in state.params.items()
    ]
    ranks = job.batch_ranks * cfg.accumulate
    more = {
        "data": f"{len(data.train.ids):,} tokens of {cfg.data or 'the Python standard library'}, "
        f"{len(data.heldout.ids):,} held out",
        "batch": f"{cfg.batch_size} sequences of {cfg.seq_len} tokens, "
        f"{-(-cfg.batch_size // ranks)} on a rank at a time",
        "compile": f"{cfg.compile}, remat {cfg.remat}",
        "run directory": cfg.out,
    }
    if cfg.precision.startswith("fp8"):
        report = fp8_report(job.model)
        more["float8"] = ", ".join(by_layer(report.quantised)) or "nothing"
        more["bf16 for their shape"] = ", ".join(by_layer(report.fallback)) or "nothing"
    con.header(
        model=f"{cfg.model} ({job.model.family})", plan=cfg.plan,
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
    con: Console, log: Log, source: Path | None,
) -> None:  # fmt: skip
    """The steps from the state's to cfg.steps, with their measurements and checkpoints."""
    first = int(state.step)
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
    tokens = cfg.batch_size * cfg.seq_len
    flops = tokens * flops_per_token(job.model.specs, job.model.cfg, cfg.seq_len)
    peak = peak_flops(process.device, compute_dtype(cfg.precision))

    def batches() -> Iterator[list[Batch]]:
        for index in range(position, position + (cfg.steps - first) * cfg.batch_size, cfg.batch_size):
            yield job.microbatches(batch_at(data.train, index, cfg.batch_size, cfg.seed), cfg.accumulate)

    def evaluate(step: int) -> None:
        with con.phase("measuring the held-out loss"):
            loss, count = _heldout_loss(cfg, job, data, lambda batch: eval_step(state, _to(batch, process.device)))
        con.info(f"step {step}: held-out loss {loss:.4f} over {count:,} tokens")
        if step > first or first == 0:  # a resumed run's first is in the records already
            log(step, heldout_loss=loss)

    def save(step: int) -> None:
        with con.phase(f"saving checkpoint step-{step}"):
            _save(cfg, job, state, data, position + (step - first) * cfg.batch_size, source)

    evaluate(first)
    # The step of the newest checkpoint in cfg.out; at 0 there is nothing that needs one.
    saved = first if first == 0 or cfg.resume == "auto" else None
    start, done = time.perf_counter(), 0
    for step, batch in enumerate(prefetch(batches()), first + 1):
        began = time.perf_counter()
        compiles = step == first + 1 and cfg.compile != "off"
        with con.phase(f"compiling the train step ({cfg.compile})") if compiles else nullcontext():
            state, metrics = train_step(state, [_to(part, process.device) for part in batch])
            values = _values(metrics)
        seconds = time.perf_counter() - began
        if compiles:
            start = time.perf_counter()  # the estimate of what is left counts from here
        else:
            done += 1
        if not values.pop("finite"):
            if saved != step - 1:
                save(step - 1)
            raise _diverged(step, values, cfg.out)
        measured = {
            "tokens_per_s": tokens / seconds,
            "mfu": flops / seconds / (peak * process.world) if peak else None,
            "peak_memory_bytes": peak_memory(process.device),
        }
        log(step, **values, tokens=tokens, step_time_s=seconds, **measured)
        if step % cfg.log_every == 0 or step in (first + 1, cfg.steps):
            left = (cfg.steps - step) * ((time.perf_counter() - start) / done if done else seconds)
            shown = {"busiest_expert": f"{values['expert_load_max']:.2f}x"} if "expert_load_max" in values else {}
            con.step(
                step, cfg.steps, loss=values["loss"], grad_norm=values["grad_norm"], lr=values["lr"],
                eta_s=left, **measured, **shown,
            )  # fmt: skip
        if step == cfg.steps or (cfg.eval_every and step % cfg.eval_every == 0):
            evaluate(step)
        if step == cfg.steps or (cfg.save_every and step % cfg.save_every == 0):
            save(step)
            saved = step
    _sample(job, state, data, con)
    con.info(f"the model is in {Path(cfg.out) / CHECKPOINTS / f'step-{cfg.steps}'}, as transformers opens it")


def _heldout_loss(
    cfg: TrainConfig, job: Job, data: Data, eval_step: Callable[[Batch], dict[str, Tensor]]
) -> tuple[float, int]:
    """(mean loss, tokens) over the first cfg.eval_batches held-out batches."""
    loss = tokens = 0.0
    for batch in heldout_batches(data.heldout, cfg.batch_size, cfg.eval_batches):
        for part in job.microbatches(batch, cfg.accumulate):
            sums = eval_step(part)
            loss, tokens = loss + float(sums["loss_sum"]), tokens + float(sums["loss_targets"])
    return loss / tokens, int(tokens)


def _save(cfg: TrainConfig, job: Job, state: State, data: Data, sequences: int, source: Path | None) -> None:
    """A checkpoint of the state, after so many sequences."""
    meta = {
        "sequences": sequences, "seq_len": cfg.seq_len, "seed": cfg.seed, "data": data.digest,
        "model": cfg.model, "plan": cfg.plan, "mesh": dict(job.mesh._asdict()),
    }  # fmt: skip
    write_tokenizer = partial(tokenizer.save, data.tokenizer, source=source)
    checkpoint.save(cfg.out, state, job.model, meta, write_tokenizer, keep=cfg.keep)


def _diverged(step: int, values: dict[str, float], out: str) -> Diverged:
    kept = f"step {step - 1} is saved in {out}" if step > 1 else "there was none before it to be saved"
    return Diverged(
        f"the loss is {values['loss']} and the gradient norm {values['grad_norm']} at step {step} (lr "
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
    return {name: t.to(device, non_blocking=True) for name, t in batch.items()}


def _values(metrics: dict[str, Tensor]) -> dict[str, float]:
    """The step's metrics as numbers; of the experts' load, the busiest's and the idlest's share of the mean."""
    values = {name: float(t) for name, t in metrics.items() if t.ndim == 0}
    if "expert_counts" in metrics:
        load = metrics["expert_counts"] / metrics["expert_counts"].mean(-1, keepdim=True)
        values |= {"expert_load_max": float(load.max()), "expert_load_min": float(load.min())}
    return values


def _sample(job: Job, state: State, data: Data, con: Console) -> None:
    """Print how the model goes on from the beginning of a held-out document."""
    prompt = [int(i) for i in data.heldout.ids[:16]]
    with con.phase("sampling"):
        tokens = generate(job, state, prompt, SAMPLE_TOKENS, stop=data.eos)
    con.info(f"sample: {data.tokenizer.decode(prompt)!r} -> {data.tokenizer.decode(tokens)!r}")

"""The steps of a run, one after the other, with their measurements, evaluations and checkpoints."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from . import checkpoint
from .config import TrainConfig
from .console import Console
from .data import Batch, Data, prefetch
from .disk import CHECKPOINTS
from .flops import flops_per_token, peak_flops, peak_memory
from .graph import layout
from .items import Packing
from .job import Job
from .launch import Process
from .model import Model
from .optim import AdamW, Optimizer, Schedule
from .precision import compute_dtype
from .pretrained import hf_config
from .recipes import Run
from .specs import trainable
from .state import State
from .step import Recipe, make_eval_step, make_train_step, metric
from .transfer import Sent, a_step_late, copy_stream, fetch, receive, send, to_device

Log = Callable[..., None]  # (step, **values), as `Records.log`


class Issued(NamedTuple):
    """A step on its way: its numbers may not be there yet. graphs: how many are compiled by then, `compiled`: one more
    for this step."""

    step: int
    fetched: Callable[[], tuple[dict[str, float], float]]  # its metrics, as `fetch` returns them
    tokens: int
    packings: dict[str, list[Packing]]
    graphs: int
    compiled: bool


class Diverged(ValueError):
    """The loss or a gradient is no longer a finite number."""


def loop(
    cfg: TrainConfig, process: Process, job: Job, state: State, data: Data, position: int,
    con: Console, log: Log, recipe: ModuleType | None, optimizer: Optimizer | None,
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
        job.model, job.sharding, job.ops, _recipe(cfg, job.model, optimizer), cfg.compile, cfg.accumulate
    )
    # Not compiled: run so seldom, a second graph would cost more time than it saves.
    eval_step = make_eval_step(job.model, job.sharding, job.ops, "off")
    peak = peak_flops(process.device, compute_dtype(cfg.precision))
    stream = copy_stream(process.device)

    def batches() -> Iterator[tuple[Sent, dict[str, list[Packing]], int]]:
        for index in range(position, position + (cfg.steps - first) * cfg.batch_size, cfg.batch_size):
            batch = data.batch(index, cfg.batch_size, cfg.seed)
            parts, packings = job.shares(batch, cfg.accumulate)
            yield send(parts, process.device, stream), packings, int((batch["segment_ids"] >= 0).sum())

    def issued() -> Iterator[Issued]:
        nonlocal state
        layouts: set[tuple] = set()  # of microbatches: all else that the step takes keeps its own
        so_far = None
        for step, (sent, packings, tokens) in enumerate(prefetch(batches()), first + 1):
            parts, seen = receive(sent), len(layouts)
            layouts |= {(*part, layout(part.values())) for part in parts}
            compiles = len(layouts) > seen and cfg.compile != "off"
            which = f", graph {len(layouts)}" if seen else ""
            with con.phase(f"compiling the train step ({cfg.compile}{which})") if compiles else nullcontext():
                state, metrics = train_step(state, parts, so_far)
            if compiles:
                con.info(f"the step is {train_step.graph.programs[-1].compiled}")
            so_far = metrics["finite"]
            yield Issued(step, fetch(_numbers(metrics)), tokens, packings, len(layouts), compiles)

    def evaluate(step: int) -> None:
        with con.phase("measuring the held-out loss"):
            found = _heldout_losses(cfg, job, data, lambda batch: eval_step(state, to_device(batch, process.device)))
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

    def due(step: int, every: int) -> bool:
        return step == cfg.steps or every > 0 and step % every == 0

    def pauses(step: int) -> bool:  # the state is looked at before the next step
        return due(step, cfg.eval_every) or due(step, cfg.save_every)

    # From the end of the step before (or of the evaluation or checkpoint after it) to this one's: what a step takes.
    began = start = time.perf_counter()
    done = 0
    for step, fetched, tokens, packings, graphs, compiled in a_step_late(issued(), lambda of: pauses(of.step)):
        values, ended = fetched()
        seconds, began = ended - began, ended
        if step == first + 1 and compiled:
            start = ended  # the estimate of what is left counts from here
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
        balance |= {"graphs": graphs} if shared or graphs > 1 else {}
        log(step, **values, **balance, tokens=tokens, step_time_s=seconds, **measured)
        if step % cfg.log_every == 0 or step in (first + 1, cfg.steps):
            left = (cfg.steps - step) * ((ended - start) / done if done else seconds)
            shown = {name: f"{value:.4f}" for name, value in values.items() if _is_loss(name)}
            shown |= {"busiest_expert": f"{values['expert_load_max']:.2f}x"} if "expert_load_max" in values else {}
            shown |= {name: f"padding {p.waste:.0%}, imbalance {p.imbalance:.2f}x" for name, p in shared.items()}
            con.step(
                step, cfg.steps, loss=values.get("loss"), grad_norm=values["grad_norm"], lr=values["lr"],
                eta_s=left, **measured, **shown,
            )  # fmt: skip
        if due(step, cfg.eval_every):
            evaluate(step)
        if due(step, cfg.save_every):
            save(step)
            saved = step
        if pauses(step):
            began = time.perf_counter()
    if data.sample:
        with con.phase("sampling"):
            line = data.sample(job, state)
        con.info(f"sample: {line}")
    score(cfg.steps, "finish")
    opens = "transformers" if hf_config(job.model.hf, None).get("architectures") else "ftrain.load_pretrained"
    con.info(f"the model is in {Path(cfg.out) / CHECKPOINTS / f'step-{cfg.steps}'}, as {opens} opens it")


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
    totals: dict[str, Tensor] = {}  # on the device: it has the next part to compute before this one's are known
    for batch in data.heldout(cfg.batch_size, cfg.eval_batches):
        for part in job.microbatches(batch, cfg.accumulate):
            for name, value in eval_step(part).items():
                if name.endswith(("_sum", "_targets")):
                    totals[name] = totals[name] + value if name in totals else value
    known = fetch(totals)()[0] if totals else {}
    counts = {name.removesuffix("_targets"): int(n) for name, n in known.items() if name.endswith("_targets")}
    return {metric(name): (known[f"{name}_sum"] / max(n, 1), n) for name, n in counts.items()}


def _save(cfg: TrainConfig, job: Job, state: State, data: Data, sequences: int) -> None:
    """A checkpoint of the state, after so many sequences."""
    meta = {
        "sequences": sequences, "seq_len": cfg.seq_len, "seed": cfg.seed, "data": data.digest,
        "optimizer": cfg.optimizer, "optimizer_state": cfg.optimizer_state, "model": cfg.model, "plan": cfg.plan, "mesh": dict(job.mesh._asdict()),
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


def _recipe(cfg: TrainConfig, model: Model, optimizer: Optimizer | None) -> Recipe:
    aux = cfg.router_aux_loss
    if aux is None:
        aux = getattr(model.cfg, "balance", 0.0)
    adam = AdamW(cfg.lr, cfg.beta1, cfg.beta2, cfg.eps, cfg.weight_decay, cfg.clip)
    schedule = Schedule(cfg.steps, cfg.schedule, cfg.warmup, cfg.min_lr_ratio, cfg.decay)
    return Recipe(adam, schedule, router_aux=aux, router_z=cfg.router_z_loss, optimizer=optimizer)


def _numbers(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The step's metrics, 0-dim; of the experts' load, the busiest's and the idlest's share of the mean."""
    numbers = {name: t for name, t in metrics.items() if t.ndim == 0}
    if "expert_counts" in metrics:
        load = metrics["expert_counts"] / metrics["expert_counts"].mean(-1, keepdim=True)
        numbers |= {"expert_load_max": load.max(), "expert_load_min": load.min()}
    return numbers

"""`python -m ftrain plan --search`: which meshes of a world fit, and which of them is the fastest."""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from typing import Any, NamedTuple

from .config import PROGRAM, MeshConfig
from .model import Model, find_model
from .parallel import group_key
from .planning import Asked, Forecast, PlanConfig, as_json, asked, forecast, gb, sizes

SHALLOW = (3, 5)  # layers of the models that stand for a deep one
SHOWN = 3
WORKERS = 8  # at most: each is a process that traces steps, in 1 to 2 GB


class Estimate(NamedTuple):
    """What a forecast would say: bytes (of what is larger for a deep model only, less than it would), and tokens/s."""

    peak: float
    speed: float


class Tried(NamedTuple):
    """A mesh with a remat policy: whether it fits, at what speed, and all that in words; `full`, as `planning.as_json`
    has it with the `command` that runs it, where it was forecast in full."""

    cfg: PlanConfig
    fits: bool
    speed: float
    words: str
    full: dict[str, Any] | None = None


def main(cfg: PlanConfig) -> int:
    """The best meshes and remat policies for --world-size, and why others are not; 1 where none fits.

    Each is estimated by the same model with few layers, and the best are then forecast in full; a CPU core takes one at
    a time. Raises ValueError as `planning.asked`.
    """
    of = asked(cfg)
    world = cfg.world_size or sizes(cfg)[0].size * cfg.mesh.replica
    meshes = list(candidates(cfg, world, has_experts(of.model)))
    if not meshes:
        raise ValueError(
            f"--batch-size {cfg.batch_size}: too few sequences for {world} ranks, at most 64 to a sequence: give more "
            "of them, or fewer ranks"
        )
    found, tried = explore(meshes, say=progress())
    if cfg.json:
        print(json.dumps([one.full for one in found]))
    else:
        print("\n".join(lines(found, tried, of)))
    return 0 if found else 1


def has_experts(model: Model) -> bool:
    return any(spec.experts for spec in model.specs.values())


def progress() -> Callable[[str], None]:
    began = time.perf_counter()
    return lambda words: print(f"{words}  ({time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)


def explore(meshes: Sequence[PlanConfig], say: Callable[[str], None]) -> tuple[list[Tried], list[Tried]]:
    """The best that fit when forecast in full, the fastest first; and all that was tried."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ProcessPoolExecutor(max(1, min(len(meshes), WORKERS, cores)), mp_context=get_context("spawn")) as pool:
        of_meshes = each(pool, try_mesh, meshes, say)
        tried = [one for of_mesh in of_meshes for one in of_mesh]
        fitting = sorted((one for one in map(best, of_meshes) if one.fits), key=lambda one: -one.speed)
        found: list[Tried] = []
        while fitting and len(found) < SHOWN:
            n = SHOWN - len(found)
            fulls = [best(one) for one in each(pool, in_full, [one.cfg for one in fitting[:n]], say)]
            tried += fulls
            found += [one for one in fulls if one.fits]
            fitting = fitting[n:]
    return sorted(found, key=lambda one: -one.speed), tried


def each(
    pool: Executor, fn: Callable[[PlanConfig], list[Tried]], cfgs: Sequence[PlanConfig], say: Callable[[str], None]
) -> list[list[Tried]]:
    """What `fn` gives for each, in their order; said as it is done. What one raises ends all."""
    futures = [pool.submit(fn, cfg) for cfg in cfgs]
    try:
        for number, future in enumerate(as_completed(futures), 1):
            say(f"{number}/{len(cfgs)}  {best(future.result()).words}")
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    return [future.result() for future in futures]


def best(of_mesh: Sequence[Tried]) -> Tried:
    """What fits, the fastest of it; else the last that was tried."""
    return max((one for one in of_mesh if one.fits), key=lambda one: one.speed, default=of_mesh[-1])


def try_mesh(cfg: PlanConfig) -> list[Tried]:
    """Estimates of a mesh with the remat policy between, and with the faster one if that fits, else the smaller."""
    of, tried = asked(cfg), []
    for remat in ("selective", None):
        one = replace(cfg, remat=remat or ("none" if tried[0].fits else "full"))
        try:
            tried.append(judged(one, estimate(one, of), of))
        except ValueError as error:
            return [*tried, Tried(one, False, 0.0, str(error))]
    return tried


def in_full(cfg: PlanConfig) -> list[Tried]:
    of = asked(cfg)
    full = forecast(cfg, of)
    seen = judged(cfg, estimated(full), of)
    return [seen._replace(full=as_json(full, of.hardware) | {"command": command(full)})]


def judged(cfg: PlanConfig, seen: Estimate, of: Asked) -> Tried:
    much = seen.peak - of.hardware.memory
    words = f"fsdp {cfg.mesh.fsdp}, sp {cfg.mesh.sp}, ep {cfg.mesh.ep}, remat {cfg.remat}: {gb(seen.peak).strip()}, "
    words += f"{gb(much).strip()} too much" if much > 0 else f"{seen.speed:,.0f} tokens/s a rank"
    return Tried(cfg, much <= 0, seen.speed, words)


def candidates(cfg: PlanConfig, world: int, experts: bool) -> Iterator[PlanConfig]:
    """Powers of two to 64, and what is left for fsdp; ep where there are experts. Where the batch is given, those that leave
    no rank without a row."""
    powers = [2**i for i in range(world.bit_length()) if world % 2**i == 0 and 2**i <= 64]
    for sp, ep in product(powers, powers if experts else [1]):
        if world % (sp * ep) == 0 and (cfg.batch_size is None or world // sp * cfg.accumulate <= cfg.batch_size):
            yield replace(cfg, mesh=MeshConfig(world // (sp * ep), sp, ep), search=False)


def estimate(cfg: PlanConfig, of: Asked) -> Estimate:
    """By the line through two shallow models: a step's memory is the largest of sums that each grow by as much with
    every layer, so that what is estimated is reached at least. By a forecast, where layers are not alike."""
    layers = getattr(of.model.cfg, "layers", 0)
    shallow = [of_depth(of.model, n) for n in SHALLOW] if layers > max(SHALLOW) else [None]
    if None in shallow:
        return estimated(forecast(cfg, of))
    low = forecast(cfg, of._replace(model=shallow[0]))
    if low.peak.bytes > of.hardware.memory:  # the deep one's is larger
        return Estimate(low.peak.bytes, low.tokens_per_s)
    high = forecast(cfg, of._replace(model=shallow[1]))

    def at(a: float, b: float) -> float:
        return b + (layers - SHALLOW[1]) * (b - a) / (SHALLOW[1] - SHALLOW[0])

    seconds = at(low.times.step, high.times.step)
    return Estimate(at(low.peak.bytes, high.peak.bytes), high.tokens_per_s * high.times.step / seconds)


def estimated(full: Forecast) -> Estimate:
    return Estimate(full.peak.bytes, full.tokens_per_s)


def of_depth(model: Model, layers: int) -> Model | None:
    """The same model with the first of its layers; None where they are not alike, or its config does not say."""
    inner = "text_config" if isinstance(model.hf.get("text_config"), Mapping) else None
    part = dict(model.hf[inner] if inner else model.hf)
    if part.get("num_hidden_layers") != model.cfg.layers or len(set(getattr(model.cfg, "windows", ()))) > 1:
        return None
    per_layer = {key: value[:layers] for key, value in part.items() if key == "layer_types" and value}
    part |= {"num_hidden_layers": layers} | per_layer
    try:
        shallow = find_model(dict(model.hf, **{inner: part}) if inner else part)
    except ValueError:  # it says something of a layer that is no more
        return None
    kinds: dict[str, set] = {}
    for name, spec in model.specs.items():
        group = group_key(name)
        if name not in shallow.specs:
            kinds.setdefault(group, set()).add((name[len(group) :], spec.shape))
    missing = list(kinds.values())
    alike = len(missing) == model.cfg.layers - layers and all(kind == missing[0] for kind in missing)
    return shallow if alike else None


# --- What is said


def lines(found: Sequence[Tried], tried: Sequence[Tried], of: Asked) -> Iterator[str]:
    for one in found:
        yield f"{one.speed:>8,.0f} tokens/s a rank  {gb(one.full['peak_bytes'])}  {one.full['command']}"
    for reason, n in Counter(one.words for one in tried if not one.fits).most_common():
        yield f"not: {reason}" + (f" ({n} times)" if n > 1 else "")
    if not found:
        yield f"nothing fits {of.hardware.name}"


def command(found: Forecast) -> str:
    """The command line that runs it."""
    cfg = found.cfg
    values: Mapping[str, Any] = {
        "plan": cfg.plan, "model": cfg.model,
        "mesh.fsdp": cfg.mesh.fsdp, "mesh.sp": cfg.mesh.sp, "mesh.ep": cfg.mesh.ep,
        "seq-len": cfg.seq_len, "batch-size": cfg.batch_size, "precision": cfg.precision, "remat": cfg.remat,
        "optimizer-state": cfg.optimizer_state, "accumulate": cfg.accumulate,
    }  # fmt: skip
    words = [PROGRAM, *(f"--{name} {value}" for name, value in values.items())]
    return " ".join(words + ["--fp8-all-gather"] * cfg.fp8_all_gather)

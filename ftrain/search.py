"""`python -m ftrain plan --search`: which meshes of a world fit, and which of them is the fastest."""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from .config import PROGRAM, MeshConfig
from .model import Model, find_model
from .parallel import group_key
from .planning import Asked, Forecast, PlanConfig, as_json, asked, forecast, gb, sizes

TRIED = ("none", "selective", "full")  # remat policies, the faster first
SHALLOW = (3, 5)  # layers of the models that stand for a deep one
SHOWN = 3


class Estimate(NamedTuple):
    """What a forecast would say: bytes (of what is larger for a deep model only, less than it would), and tokens/s."""

    peak: float
    speed: float


def main(cfg: PlanConfig) -> int:
    """The best meshes and remat policies for --world-size, and why others are not; 1 where none fits.

    Each is estimated by the same model with few layers, and the best are then forecast in full. Raises ValueError as
    `planning.asked`.
    """
    of = asked(cfg)
    experts = any(spec.experts for spec in of.model.specs.values())
    tried = list(candidates(cfg, cfg.world_size or sizes(cfg)[0].size * cfg.mesh.replica, experts))
    began, estimates, why = time.perf_counter(), [], Counter()

    def say(line: str) -> None:
        print(f"{line}  ({time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)

    for number, one in enumerate(tried, 1):
        if estimates and estimates[-1][1].mesh == one.mesh:
            continue  # it fits, and recomputing more would be slower
        try:
            seen = estimate(one, of)
        except ValueError as error:
            why[str(error)] += 1
            continue
        words = f"{describe(one)}: {gb(seen.peak)}, {seen.speed:,.0f} tokens/s a rank"
        if seen.peak <= of.hardware.memory:
            estimates.append((seen, one))
            say(f"{number}/{len(tried)}  {words}")
        else:
            say(f"{number}/{len(tried)}  {words}: does not fit")
            why[f"{describe(one)}: {gb(seen.peak - of.hardware.memory)} too much"] += 1
    found: list[Forecast] = []
    for _, one in sorted(estimates, key=lambda e: -e[0].speed):
        if len(found) == SHOWN:
            break
        full = forecast(one, of)
        say(f"in full  {describe(one)}: {gb(full.peak.bytes)}, {full.tokens_per_s:,.0f} tokens/s a rank")
        if full.fits(of.hardware):
            found.append(full)
        else:
            why[f"{describe(one)}: {gb(full.peak.bytes - of.hardware.memory)} too much"] += 1
    found.sort(key=lambda full: -full.tokens_per_s)
    if cfg.json:
        print(json.dumps([as_json(full, of.hardware) | {"command": command(full)} for full in found]))
    else:
        for full in found:
            print(f"{full.tokens_per_s:>8,.0f} tokens/s a rank  {gb(full.peak.bytes)}  {command(full)}")
        for reason, n in why.most_common():
            print(f"not: {reason}" + (f" ({n} times)" if n > 1 else ""))
        if not found:
            print(f"nothing fits {of.hardware.name}")
    return 0 if found else 1


def candidates(cfg: PlanConfig, world: int, experts: bool) -> Iterator[PlanConfig]:
    """Powers of two, and what is left for fsdp; ep where there are experts; remat from the fastest on. Where the batch
    is given, those that leave no rank without a row."""
    powers = [2**i for i in range(world.bit_length()) if world % 2**i == 0 and 2**i <= 64]
    for sp, ep, remat in product(powers, powers if experts else [1], TRIED):
        if world % (sp * ep) == 0 and (cfg.batch_size is None or world // sp * cfg.accumulate <= cfg.batch_size):
            yield replace(cfg, mesh=MeshConfig(world // (sp * ep), sp, ep), remat=remat, search=False)


def estimate(cfg: PlanConfig, of: Asked) -> Estimate:
    """By the line through two shallow models: a step's memory is the largest of sums that each grow by as much with
    every layer, so that what is estimated is reached at least. By a forecast, where layers are not alike."""
    layers = getattr(of.model.cfg, "layers", 0)
    shallow = [of_depth(of.model, n) for n in SHALLOW] if layers > max(SHALLOW) else [None]
    if None in shallow:
        return estimated(forecast(cfg, of))
    low, high = (forecast(cfg, of._replace(model=model)) for model in shallow)

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


def describe(cfg: PlanConfig) -> str:
    return f"fsdp {cfg.mesh.fsdp}, sp {cfg.mesh.sp}, ep {cfg.mesh.ep}, remat {cfg.remat}"


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

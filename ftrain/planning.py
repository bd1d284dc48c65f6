"""`python -m ftrain plan`: what each rank will hold, send and compute, and how fast, before there is any rank."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from .config import PROGRAM, MeshConfig, Precision
from .console import bytes_, si
from .flops import flops_per_token
from .forecast import Traced, Work, trace
from .memory import CATEGORIES, Peak
from .mesh import Mesh, resolve
from .model import Model, find_model
from .plan import Plan, find_plan
from .roofline import Hardware, Times, find_hardware, predict
from .timeline import Timeline

@dataclass(frozen=True)
class PlanConfig:
    """Forecast a training step: memory, communication and speed of a rank. Traces the step itself, for any number of
    ranks, on one core and without a GPU."""

    model: str = "Qwen3-30B-A3B"
    """A preset's name, or a directory with a Hugging Face config.json."""
    plan: str = "fsdp_sp_ep"
    """The sharding plan: a name in plans/, or FILE.py:FUNCTION."""
    mesh: MeshConfig = MeshConfig()
    """Sizes of the mesh. One may be -1: what --world-size leaves for it."""
    world_size: int | None = None
    """Ranks; None: what the sizes of the mesh multiply to."""
    seq_len: int = 8192
    """Tokens a sequence."""
    batch_size: int | None = None
    """Sequences per optimizer step, of the whole job; None: one for each rank that has its own."""
    accumulate: int = 1
    """Parts that a step's batch is taken in."""
    precision: Precision = "bf16"
    """Of matrix products."""
    remat: Literal["none", "selective", "full", "offload"] = "selective"
    """What backward recomputes."""
    optimizer_state: Literal["fp32", "bf16", "8bit"] = "fp32"
    """How AdamW's moments are kept."""
    fp8_all_gather: bool = False
    """Gather the dense projections' weights as float8."""
    hardware: str = "h100-80gb"
    """The machine: a name in hardware.json, or a JSON file with the fields of one."""
    expert_imbalance: float = 1.0
    """Rows that the first rank's experts get, over the mean of all ranks."""
    media: float = 0.5
    """Of models that take more than text: the part of a row that is the model's small examples of images, sounds, ..."""
    search: bool = False
    """Try the meshes of --world-size, and remat policies, and show the best that fit."""
    json: bool = False
    """Print one JSON object, and nothing else."""
    plot: Annotated[str | None, tyro.conf.arg(metavar="FILE.png")] = None
    """Where to draw memory over a step (needs matplotlib)."""


@dataclass(frozen=True)
class Forecast:
    """What a rank does in a step: bytes and seconds; `collectives` by mesh dimensions and kind: (number, bytes,
    largest)."""

    cfg: PlanConfig
    mesh: Mesh
    peak: Peak
    collectives: dict[str, dict[str, tuple[int, int, int]]]
    flops: int
    times: Times
    tokens_per_s: float
    mfu: float | None
    timeline: Timeline

    def fits(self, hardware: Hardware) -> bool:
        return self.peak.bytes <= hardware.memory


class Asked(NamedTuple):
    """What the flags name."""

    model: Model
    plan: Plan
    hardware: Hardware


def asked(cfg: PlanConfig) -> Asked:
    """Raises ValueError for flags that make no sense, before anything is traced."""
    of = Asked(find_model(cfg.model), find_plan(cfg.plan), find_hardware(cfg.hardware))
    for name in ("seq_len", "accumulate", "batch_size", "world_size"):
        value = getattr(cfg, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if not 0 <= cfg.media <= 1:
        raise ValueError(f"--media {cfg.media}: must be a part of a row, from 0 to 1")
    if not cfg.expert_imbalance > 0:
        raise ValueError(f"--expert-imbalance {cfg.expert_imbalance}: must be positive")
    return of


def main(cfg: PlanConfig) -> int:
    """Prints what the flags ask for; 0 where it fits. Raises ValueError as `asked`, and where model, plan and mesh do
    not fit each other, as `train` would."""
    of = asked(cfg)
    found = forecast(cfg, of)
    print(json.dumps(as_json(found, of.hardware)) if cfg.json else "\n".join(lines(found, of)))
    if cfg.plot:
        draw(found, of.hardware, cfg.plot)
    return 0 if found.fits(of.hardware) else 1


def forecast(cfg: PlanConfig, of: Asked) -> Forecast:
    model, plan, hardware = of
    mesh, replica = sizes(cfg)
    world = mesh.size * replica
    batch = cfg.batch_size or world // mesh.sp * cfg.accumulate
    work = Work(
        batch, cfg.seq_len, cfg.precision, cfg.remat, cfg.optimizer_state, cfg.accumulate, cfg.fp8_all_gather,
        cfg.expert_imbalance, cfg.media,
    )  # fmt: skip
    traced = trace(model, plan, mesh, work, replica)
    timeline = traced.timeline()
    times = predict(traced, timeline.pieces, hardware)
    seconds = times.step * cfg.accumulate
    tokens = batch * cfg.seq_len / world
    mfu = None  # not known of models that take or give more than text
    if model.examples is None:
        needed = flops_per_token(model.specs, model.cfg, cfg.seq_len) * tokens
        mfu = needed / seconds / hardware.flops[cfg.precision.split("-")[0]]
    return Forecast(
        replace(cfg, batch_size=batch, mesh=MeshConfig(*mesh, replica)), mesh, timeline.peak(), sent(traced),
        traced.flops() * cfg.accumulate, times, tokens / seconds, mfu, timeline,
    )  # fmt: skip


def sizes(cfg: PlanConfig) -> tuple[Mesh, int]:
    m = cfg.mesh
    known = [size for size in (m.fsdp, m.sp, m.ep) if size != -1]
    if cfg.world_size is None and len(known) < 3:
        raise ValueError("a size of the mesh is -1: say how many ranks there are with --world-size")
    world = cfg.world_size or m.fsdp * m.sp * m.ep * m.replica
    return resolve(m.fsdp, m.sp, m.ep, m.replica, world), m.replica


def sent(traced: Traced) -> dict[str, dict[str, tuple[int, int, int]]]:
    found: dict[str, dict[str, tuple[int, int, int]]] = {}
    for c in traced.program.collectives():
        axes = found.setdefault("+".join(traced.groups[c.group].axes), {})
        n, size, largest = axes.get(c.kind, (0, 0, 0))
        axes[c.kind] = n + 1, size + (c.bytes or 0), max(largest, c.bytes or 0)
    return found


# --- What is said


def bottleneck(found: Forecast) -> str:
    """What takes most of the step, in words."""
    parts = {
        "matrix products": found.times.busy.get("products", 0.0), "attention": found.times.busy.get("attention", 0.0),
        "the device's memory bandwidth": found.times.busy.get("memory", 0.0),
    } | {f"waiting for collectives over {axes}": s for axes, s in found.times.exposed.items()}  # fmt: skip
    name, seconds = max(parts.items(), key=lambda part: part[1])
    return f"{name}: {seconds / found.times.step:.0%} of the step"


def as_json(found: Forecast, hardware: Hardware) -> dict[str, Any]:
    return {
        "model": found.cfg.model, "plan": found.cfg.plan, "mesh": asdict(found.cfg.mesh),
        "world_size": found.mesh.size * found.cfg.mesh.replica, "batch_size": found.cfg.batch_size,
        "seq_len": found.cfg.seq_len, "precision": found.cfg.precision, "remat": found.cfg.remat,
        "hardware": hardware.name, "fits": found.fits(hardware), "peak_bytes": found.peak.bytes,
        "peak_at": found.peak.at, "categories": found.peak.by,
        "collectives": {
            axes: [{"op": op, "count": n, "bytes": size, "largest": largest} for op, (n, size, largest) in ops.items()]
            for axes, ops in found.collectives.items()
        },
        "flops_per_rank": found.flops, "step_time_s": found.times.step * found.cfg.accumulate,
        "exposed_s": found.times.exposed, "tokens_per_s_per_rank": found.tokens_per_s, "mfu": found.mfu,
        "bottleneck": bottleneck(found),
    }  # fmt: skip


def lines(found: Forecast, of: Asked) -> Iterator[str]:
    """The forecast, for people."""
    model, hardware = of.model, of.hardware
    cfg, peak, times = found.cfg, found.peak, found.times
    mesh = ", ".join(f"{axis} {size}" for axis, size in asdict(cfg.mesh).items() if size > 1) or "one rank"
    params = sum(spec.numel for spec in model.specs.values())
    yield (
        f"{cfg.model} ({si(params)} parameters), plan {cfg.plan} on {found.mesh.size * cfg.mesh.replica} x "
        f"{hardware.name}: {mesh}"
    )
    yield (
        f"{cfg.batch_size} sequences of {cfg.seq_len:,} tokens, {cfg.precision}, remat {cfg.remat}, "
        f"optimizer state {cfg.optimizer_state}"
        + (f", in {cfg.accumulate} microbatches" if cfg.accumulate > 1 else "")
    )
    left = hardware.memory - peak.bytes
    yield ""
    yield f"peak memory      {gb(peak.bytes)} of {gb(hardware.memory)}: " + (
        f"fits, {gb(left)} to spare" if left >= 0 else f"DOES NOT FIT, by {gb(-left)}"
    )
    yield f"reached in       {peak.at}"
    for name in CATEGORIES:
        yield f"  {name:<19}{gb(peak.by[name])}" + (
            f"   (at most {gb(peak.most[name])})" if name in peak.most and peak.most[name] > peak.by[name] else ""
        )
    yield ""
    yield from terminal_plot(found.timeline, hardware.memory)
    yield ""
    yield f"{'collectives over':<18}{'':<24}{'number':>7}{'bytes':>12}{'largest':>12}"
    for axes, ops in sorted(found.collectives.items()):
        for op, (n, size, largest) in sorted(ops.items()):
            yield f"  {axes:<16}{op:<24}{n:>7}{bytes_(size):>12}{bytes_(largest):>12}"
    yield ""
    step = times.step * cfg.accumulate
    speed = f"{found.tokens_per_s:,.0f} tokens/s a rank"
    if found.mfu is not None:
        speed += f", MFU {found.mfu:.1%} (causal at half)"
    yield f"step             {f'{step:.2f} s' if step >= 1 else f'{step * 1e3:.2f} ms'}, {speed}"
    shares = {**times.busy, **{f"waiting over {axes}": s for axes, s in times.exposed.items()}}
    yield "  " + ", ".join(f"{name} {s / times.step:.1%}" for name, s in sorted(shares.items(), key=lambda p: -p[1]))
    yield f"FLOPs a rank     {found.flops:.3e}, recomputed ones too"
    yield f"bottleneck       {bottleneck(found)}"
    if any(spec.experts for spec in model.specs.values()):
        yield f"experts          assumed {cfg.expert_imbalance:g} times as busy on this rank as on the mean one"


def gb(size: float) -> str:
    return f"{size / 1e9:7.2f} GB" if size >= 1e8 or not size else f"{size / 1e6:7.2f} MB"


BARS = " ▁▂▃▄▅▆▇█"


def terminal_plot(timeline: Timeline, limit: float, width: int = 96, height: int = 6) -> Iterator[str]:
    """Memory over the instructions of a step; the most of those that share a column."""
    most = [moment.most for moment in timeline.moments]
    columns = min(width, len(most))
    cut = [max(most[i * len(most) // columns : (i + 1) * len(most) // columns]) for i in range(columns)]
    top = max(cut)
    for row in reversed(range(height)):
        levels = (min(max(value / top * height - row, 0.0), 1.0) for value in cut)
        label = gb(top) if row == height - 1 else " " * len(gb(0))
        yield f"{label} |" + "".join(BARS[round(level * (len(BARS) - 1))] for level in levels)
    half = columns // 2
    yield " " * len(gb(0)) + " +" + "forward".ljust(half, "-") + "backward, update".rjust(columns - half, "-")


def draw(found: Forecast, hardware: Hardware, path: str) -> None:
    """Memory over a step, by category, as a PNG. Raises ValueError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    moments = found.timeline.moments
    names = [name for name in CATEGORIES[:-1] if any(m.held.get(name) for m in moments)]
    layers = [[m.held.get(name, 0) / 1e9 for m in moments] for name in names]
    figure, axes = pyplot.subplots(figsize=(10, 5))
    axes.stackplot(range(len(moments)), layers, labels=names)
    axes.plot([m.most / 1e9 for m in moments], color="black", linewidth=0.7, label="with what runs")
    axes.axhline(hardware.memory / 1e9, color="red", linestyle="--", label=hardware.name)
    axes.set(xlabel="instructions of a step", ylabel="GB", title=f"{found.cfg.model} on {hardware.name}, a rank")
    axes.legend(loc="upper left", fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"drawn: {path}", file=sys.stderr)


def parse(argv: Sequence[str]) -> PlanConfig:
    return tyro.cli(PlanConfig, prog=f"{PROGRAM} plan", args=list(argv))

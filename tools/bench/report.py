"""The results of bench.py as tables and a plot: python tools/bench/report.py RESULTS.json."""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from limits import Floor, collective_rates, floor
from rich.console import Console
from rich.markup import escape
from rich.table import Table

BASE = "ftrain"
# By which the losses of any step may differ from ftrain's, relative to them, for the same work. bf16 rounds to 3
# digits, and the programs round in different places.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}


class Spread(NamedTuple):
    median: float
    low: float
    high: float


class Line(NamedTuple):
    """One peer on one row, over its rounds. None where it cannot be said.

    rate: tokens a second. faster: ftrain's rate over this one, round by round. memory: bytes, of the rank and the round
    that held most. cold, warm: seconds of the first step, of the first round and of the later ones. loss: of the last
    step. difference: the largest relative difference of a step's loss from ftrain's. error: of a round that failed.
    """

    row: str
    peer: str
    rate: float | None = None
    faster: Spread | None = None
    memory: int | None = None
    cold: float | None = None
    warm: float | None = None
    loss: float | None = None
    difference: float | None = None
    same: bool | None = None
    error: str | None = None
    log: str | None = None


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def step_seconds(run: Mapping, warmup: int) -> float:
    """The median step after the warm-up."""
    return statistics.median(run["seconds"][warmup:])


def deviation(losses: Sequence[float], expected: Sequence[float]) -> float:
    """The largest relative difference; infinite where it is not a number."""
    found = [abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)]
    return max(d if d == d else float("inf") for d in found)


def summarise(results: Mapping) -> list[Line]:
    """One line for each peer on each row, in the order in which they ran first."""
    warmup, tokens = results["setting"]["warmup"], results["setting"]["tokens"]
    by_peer: dict[tuple[str, str], list[Mapping]] = {}
    for run in results["runs"]:
        if run["peer"] != "limits":
            by_peer.setdefault((run["row"], run["peer"]), []).append(run)
    lines = []
    for (row, peer), runs in by_peer.items():
        failed = next((run for run in runs if "error" in run), None)
        error = {"error": failed["error"], "log": failed["log"]} if failed else {}
        done = {run["round"]: run for run in runs if "error" not in run}
        if not done:
            lines.append(Line(row, peer, **error))
            continue
        base = {run["round"]: run for run in by_peer.get((row, BASE), []) if "error" not in run}
        both = sorted(done.keys() & base.keys())
        ratios = [step_seconds(done[r], warmup) / step_seconds(base[r], warmup) for r in both]
        differences = [deviation(done[r]["losses"], base[r]["losses"]) for r in both]
        later = [run["seconds"][0] for number, run in done.items() if number > 0]
        lines.append(Line(
            row, peer,
            rate=tokens / statistics.median(step_seconds(run, warmup) for run in done.values()),
            faster=spread(ratios) if both and peer != BASE else None,
            memory=max(max(run["memory"]) for run in done.values()),
            cold=done[0]["seconds"][0] if 0 in done else None,
            warm=statistics.median(later) if later else None,
            loss=list(done.values())[-1]["losses"][-1],
            difference=max(differences) if both and peer != BASE else None,
            same=max(differences) <= TOLERANCE[dtype(row)] if both else None,
            **error,
        ))  # fmt: skip
    return lines


def dtype(row: str) -> str:
    return "bf16" if "-bf16-" in row else "fp32"


def floors(results: Mapping) -> dict[str, tuple[Floor, dict[str, float]]]:
    """Of each row whose limits were measured: the floor, and the collectives' rates, of the round in the middle."""
    found: dict[str, list[tuple[Floor, dict[str, float]]]] = {}
    for run in results["runs"]:
        if run["peer"] == "limits" and "error" not in run:
            found.setdefault(run["row"], []).append((floor(run["limits"]), collective_rates(run["limits"])))
    return {row: sorted(of_row, key=lambda f: f[0].total)[len(of_row) // 2] for row, of_row in found.items()}


# --- What is shown


def shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def table(lines: Sequence[Line], found: Mapping[str, tuple[Floor, dict[str, float]]], tokens: int) -> Table:
    """The comparison. Where the losses say that the work was another, the row is marked."""
    out = Table(title="Train steps", caption=(
        "ftrain is faster: ftrain's tokens/s over the peer's, each round's own (median, least, most). GB: largest peak "
        "resident memory of a rank. First step: in the first round / in later ones. Difference: largest of a "
        "step's loss from ftrain's, relative; other work (!) above "
        f"{TOLERANCE['fp32']:g} in fp32, {TOLERANCE['bf16']:g} in bf16."
    ))  # fmt: skip
    for name in ("row", "peer"):
        out.add_column(name, overflow="fold")
    for name in ("tokens/s", "ftrain is faster", "GB", "first step, s", "loss", "difference", "MFU"):
        out.add_column(name, justify="right")
    last = None
    for line in lines:
        if line.row != last:
            out.add_section()
        name, last = line.row if line.row != last else "", line.row
        if line.rate is None:
            out.add_row(name, f"{line.peer}\n[red]failed: {escape(line.error)} ({line.log})[/]")
            continue
        ratio = f"{line.faster.median:.2f} ({line.faster.low:.2f} to {line.faster.high:.2f})" if line.faster else ""
        first = " / ".join(shown(value, ".1f") for value in (line.cold, line.warm) if value is not None)
        failed = f"\n[red]a round failed: {escape(line.error)} ({line.log})[/]" if line.error else ""
        mark = " [red]![/]" if line.same is False else ""
        mfu = found[line.row][0].mfu(tokens / line.rate) if line.row in found else None
        out.add_row(
            name, line.peer + failed, f"{line.rate:,.0f}", ratio, f"{line.memory / 1e9:.2f}", first, f"{line.loss:.6f}",
            shown(line.difference, ".1e") + mark, shown(mfu, ".1%"),
        )  # fmt: skip
    return out


def limits_table(
    lines: Sequence[Line], found: Mapping[str, tuple[Floor, dict[str, float]]], tokens: int
) -> Table:  # fmt: skip
    """ftrain's step against the floors of `limits.py`. More phases of a step belong here, as columns."""
    out = Table(title="ftrain's step against the machine", caption=(
        "GFLOP/s, GB/s: measured, all ranks together; the collectives' a rank, at the mean size of a step. Floors: ms "
        "a step (limits.py says what they count). MFU: model FLOPs over what the measured products do in a step's time."
    ))  # fmt: skip
    out.add_column("row", overflow="fold")
    rates = "GFLOP/s", "memory GB/s", "collectives GB/s"
    for name in (*rates, "compute", "memory", "communication", "step", "floor/step", "MFU"):
        out.add_column(name, justify="right")
    for line in lines:
        if line.peer != BASE or line.row not in found or line.rate is None:
            continue
        least, rates = found[line.row]
        step = tokens / line.rate
        carried = "\n".join(f"{kind} {rate / 1e9:.2g}" for kind, rate in rates.items())
        ms = (f"{seconds * 1e3:.0f}" for seconds in (least.compute, least.memory, least.communication, step))
        out.add_row(
            line.row, f"{least.matmul / 1e9:.0f}", f"{least.memory_rate / 1e9:.1f}", carried, *ms,
            f"{least.total / step:.0%}", f"{least.mfu(step):.1%}",
        )  # fmt: skip
    return out


def plot(lines: Sequence[Line], path: Path) -> None:
    """A panel for each row: by how much ftrain is faster than each peer, with the spread over the rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {}
    for line in lines:
        if line.faster:
            rows.setdefault(line.row, []).append(line)
    if not rows:
        return
    heights = [len(of_row) + 1 for of_row in rows.values()]
    figure, axes = pyplot.subplots(
        len(rows), figsize=(8, 0.35 * sum(heights) + 1), squeeze=False, sharex=True, height_ratios=heights
    )
    for axis, (row, of_row) in zip(axes[:, 0], rows.items()):
        names, middle = [line.peer for line in of_row], [line.faster.median for line in of_row]
        below = [line.faster.median - line.faster.low for line in of_row]
        above = [line.faster.high - line.faster.median for line in of_row]
        axis.barh(names, middle, xerr=[below, above], height=0.6, color=["C0" if x >= 1 else "C1" for x in middle])
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(row, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.invert_yaxis()
    axes[-1, 0].set_xlabel("ftrain's tokens/s over the peer's (median, least and most over the rounds)", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    path = Path(sys.argv[1])
    results = json.loads(path.read_text())
    lines, found, tokens = summarise(results), floors(results), results["setting"]["tokens"]
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(", ".join(f"{name} {value}" for name, value in results["setting"].items()), highlight=False)
    console.print(table(lines, found, tokens))
    for run in results["runs"]:
        if run["peer"] == "limits" and "error" in run:
            console.print(f"{run['row']}: limits failed: {escape(run['error'])} ({run['log']})")
    if found:
        console.print(limits_table(lines, found, tokens))
    summary = {
        "lines": [line._asdict() for line in lines],
        "floors": {row: of_row._asdict() | {"total": of_row.total} for row, (of_row, _) in found.items()},
    }
    path.with_name(path.stem + "-summary.json").write_text(json.dumps(summary, indent=1))
    plot(lines, path.with_suffix(".png"))
    console.print(f"{path}, -summary.json and .png beside it", highlight=False)


if __name__ == "__main__":
    main()

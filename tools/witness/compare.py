"""How far the runs of a folder are apart: compare.py FOLDER [--times N].

Runs of the same model, batch, clipping and losses are compared: each ftrain run with each witness, and
the witnesses with each other. The measure is round-off: how far transformers goes at most from
itself when the last bit of every weight is changed (the runs that are "nudged").
Exits with 1 where ftrain is further than N times that from a witness, or any further at the start.
"""

import argparse
import json
import math
from itertools import combinations, product
from pathlib import Path

SAME = ("model", "streams", "clip", "router_aux")
START = 5  # steps in which round-off has not yet grown
AT_START = (5e-6, 2e-5)  # what loss and norm may differ by then


def title(run: dict) -> str:
    mesh = ", ".join(f"{axis} {size}" for axis, size in run["mesh"].items() if size > 1)
    return f"{run['who']} ({mesh or 'one rank'})"


def norms(run: dict) -> list[float]:
    """The norms before clipping, as exactly as the run knows them."""
    return run.get("grad_norm_fp64", run["grad_norm"])


def apart(a: dict, b: dict, steps: int | None = None) -> tuple[float, float]:
    """(largest difference of the loss, largest relative difference of the gradients' norm) over the first steps."""
    losses = [abs(x - y) for x, y in zip(a["loss"], b["loss"], strict=True)][:steps]
    ratios = [abs(x / y - 1) for x, y in zip(norms(a), norms(b), strict=True)][:steps]
    # max() would pass over a NaN.
    return tuple(max(found) if all(map(math.isfinite, found)) else math.inf for found in (losses, ratios))


def alike(a: dict, b: dict) -> bool:
    return all(a[key] == b[key] for key in SAME)


def row(a: dict, b: dict, roundoff: tuple[float, float], verdict: str) -> str:
    balance = f" with balance, {4 * a['streams']} rows" if a["router_aux"] else f", {4 * a['streams']} rows"
    figures = " | ".join(f"{x:.1e}" for x in (*apart(a, b, START), *apart(a, b), *roundoff))
    return f"| {a['model']}{balance} | {title(a)} | {title(b)} | {figures} | {verdict} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=float, default=3.0, help="so many times round-off is still close")
    args = parser.parse_args()

    runs = [json.loads(path.read_text()) for path in sorted(args.folder.glob("*.json"))]
    ours = [run for run in runs if run["who"].startswith("ftrain")]
    nudged = [run for run in runs if run["who"].startswith("nudged")]
    witnesses = [run for run in runs if run not in ours and run not in nudged]
    exact = [run for run in witnesses if run["who"] == "transformers" and set(run["mesh"].values()) == {1}]

    def roundoff(of: dict) -> tuple[float, float]:
        found = [apart(a, b) for a, b in product(nudged, exact) if alike(a, of) and alike(b, of)]
        return tuple(max(column) for column in zip(*found)) or (0.0, 0.0)

    judged = [(a, b) for a, b in product(ours, witnesses) if alike(a, b)]
    if not judged:
        parser.error(f"{args.folder} holds no run of ftrain with a witness to compare it with")
    print(f"| model | run | compared with | loss, {START} steps | norm, {START} steps | loss, all | norm, all "
          "| round-off, loss | round-off, norm | |")  # fmt: skip
    print("|---" * 10 + "|")
    far = 0
    for a, b in judged:
        limits = (*AT_START, *(max(least, args.times * m) for least, m in zip(AT_START, roundoff(a))))
        close = all(x <= limit for x, limit in zip((*apart(a, b, START), *apart(a, b)), limits, strict=True))
        far += not close
        print(row(a, b, roundoff(a), "close" if close else "**too far**"))
    for a, b in combinations(witnesses, 2):
        if alike(a, b):
            print(row(a, b, roundoff(a), ""))
    return int(far > 0)


if __name__ == "__main__":
    raise SystemExit(main())

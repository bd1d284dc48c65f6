"""How far the runs of a folder are apart: compare.py FOLDER [--loss X] [--norm Y].

Runs of the same model, batch, clipping and losses are compared, each ftrain run with each
witness, and, as the measure of round-off, the witnesses with each other. Exits with 1 where
ftrain is further from a witness than the given limits.
"""

import argparse
import json
from itertools import combinations, product
from pathlib import Path

SAME = ("model", "streams", "clip", "router_aux")


def title(run: dict) -> str:
    mesh = " ".join(f"{axis}{size}" for axis, size in run["mesh"].items() if size > 1)
    return f"{run['who']} {mesh or 'one rank'}"


def norms(run: dict) -> list[float]:
    """The norms before clipping, as exactly as the run knows them."""
    return run.get("grad_norm_fp64", run["grad_norm"])


def apart(a: dict, b: dict) -> tuple[float, float]:
    """(largest difference of the loss, largest relative difference of the gradients' norm) of two runs."""
    loss = max(abs(x - y) for x, y in zip(a["loss"], b["loss"], strict=True))
    norm = max(abs(x - y) / y for x, y in zip(norms(a), norms(b), strict=True))
    return loss, norm


def pairs(runs: list[dict]) -> list[tuple[dict, dict]]:
    ours = [run for run in runs if run["who"].startswith("ftrain")]
    witnesses = [run for run in runs if run not in ours]
    found = [*product(ours, witnesses), *combinations(witnesses, 2)]
    return [(a, b) for a, b in found if all(a[key] == b[key] for key in SAME)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--loss", type=float, default=1e-5, help="largest difference of the loss")
    parser.add_argument("--norm", type=float, default=2e-4, help="largest relative difference of the gradients' norm")
    args = parser.parse_args()

    runs = [json.loads(path.read_text()) for path in sorted(args.folder.glob("*.json"))]
    found, far = pairs(runs), 0
    if not any(a["who"].startswith("ftrain") for a, _ in found):
        parser.error(f"{args.folder} holds no run of ftrain with a witness to compare it with")
    print("| model | rows | run | compared with | loss, largest difference | grad norm, largest relative difference |")
    print("|---|---|---|---|---|---|")
    for a, b in found:
        loss, norm = apart(a, b)
        # Written so that a NaN is far, too.
        bad = a["who"].startswith("ftrain") and not (loss <= args.loss and norm <= args.norm)
        far += bad
        extra = "" if not a["router_aux"] else " + balance"
        print(
            f"| {a['model']}{extra} | {4 * a['streams']} | {title(a)} | {title(b)} | {loss:.1e} | {norm:.1e} |"
            + " **too far**" * bad
        )
    return int(far > 0)


if __name__ == "__main__":
    raise SystemExit(main())

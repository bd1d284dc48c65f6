"""ftrain's step against what the machine can do: python tools/bench/limits.py --work FOLDER [--rows ...].

The floors are of one step, in seconds:
    compute         model FLOPs (causal attention at half, recomputation not counted) at the rate that matrix
                    products of the model's own shapes have, all ranks at once
    memory          AdamW reads weight, gradient and both moments and writes all but the gradient, fp32, of a rank's own
                    share; a rank reads whole weights (of experts, its own) forward and backward, and writes their
                    gradients. Activations are not counted: a floor, not an estimate
    communication   each collective of a step at its kind's mean size, one after the other
On a CPU the same cores do all three, so that their sum is the floor.
"""

import subprocess
import sys
from collections.abc import Mapping
from typing import NamedTuple

OPTIMIZER_BYTES = 7 * 4  # of an element: p, g, m, v read; p, m, v written


class Floor(NamedTuple):
    """matmul: FLOP/s, memory_rate: bytes/s, both of all ranks together; flops: of a step; the rest: its seconds."""

    flops: float
    matmul: float
    memory_rate: float
    compute: float
    memory: float
    communication: float

    @property
    def total(self) -> float:
        return self.compute + self.memory + self.communication

    def mfu(self, step: float) -> float:
        """Model FLOPs over what the measured products would have done in `step` seconds."""
        return self.flops / step / self.matmul


def floor(limits: Mapping) -> Floor:
    """From what `peers/limits_run.py` measured on a rank."""
    ranks, itemsize = limits["ranks"], limits["itemsize"]
    flops, took = (sum(m["count"] * m[key] for m in limits["matmuls"]) for key in ("flops", "seconds"))
    matmul = ranks * flops / took
    moved = OPTIMIZER_BYTES * limits["parameters"] / ranks + (2 * itemsize + 4) * limits["read"]
    return Floor(
        flops=limits["flops"],
        matmul=matmul,
        memory_rate=ranks * limits["memory"],
        compute=limits["flops"] / matmul,
        memory=moved / limits["memory"],
        communication=sum(kind["count"] * kind["seconds"] for kind in limits["collectives"].values()),
    )


def collective_rates(limits: Mapping) -> dict[str, float]:
    """Of each kind: bytes a second, of the larger of what goes in and what comes out, at its mean size in a step."""
    return {name: kind["bytes"] / kind["count"] / kind["seconds"] for name, kind in limits["collectives"].items()}


if __name__ == "__main__":
    from pathlib import Path

    bench = Path(__file__).resolve().parent / "bench.py"
    sys.exit(subprocess.run([sys.executable, bench, *sys.argv[1:], "--peers", "ftrain"]).returncode)

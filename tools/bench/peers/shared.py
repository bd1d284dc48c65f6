"""What every runner shares: the work it is told, the clock, and how its result is written. numpy and Python only, since
each program that is compared has an environment of its own.

A runner is started as `python NAME_run.py WORK.json`, or by torchrun, and leaves `rank-N.json` of each rank.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Work:
    """One run. The global batch is cut into fsdp * ep parts by rows, and each row into sp by columns."""

    model: str  # a Hugging Face directory
    batches: str  # .npy, int64 [steps, B, S]
    out: str  # a folder
    dtype: str  # fp32, or bf16: bf16 compute with fp32 weights, moments and reductions
    steps: int
    threads: int  # of a rank
    fsdp: int
    sp: int
    ep: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    clip: float
    compile: bool
    remat: str  # what ftrain recomputes; the other programs have no such choice, or are told to recompute nothing

    @property
    def ranks(self) -> int:
        return self.fsdp * self.sp * self.ep

    @property
    def config(self) -> dict:
        return json.loads((Path(self.model) / "config.json").read_text())

    def ids(self) -> np.ndarray:
        """The token ids of every step's global batch, [steps, B, S]."""
        return np.load(self.batches)[: self.steps]


@dataclass
class Seen:
    """Of each step: seconds from its batch to its loss, as a number; the mean loss over the global batch; the norm
    of the gradients before clipping."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    began: float = 0.0

    def start(self) -> None:
        self.began = time.perf_counter()

    def step(self, loss: float, norm: float) -> None:
        """A step is over, and the next one begins."""
        now = time.perf_counter()
        self.seconds.append(now - self.began)
        self.losses.append(float(loss))
        self.norms.append(float(norm))
        self.began = time.perf_counter()


def read() -> Work:
    """The work that the command line names."""
    return Work(**json.loads(Path(sys.argv[1]).read_text()))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def train(work: Work, step: Callable[[np.ndarray], tuple[float, float]]) -> Seen:
    """The loop, for what has none of its own. step: a global batch [B, S] -> (loss, gradient norm), as numbers."""
    seen = Seen()
    seen.start()
    for ids in work.ids():
        seen.step(*step(ids))
    return seen


def own_rows(ids: np.ndarray, part: int, parts: int) -> np.ndarray:
    """The rows [B / parts, S] of a global batch that the `part`-th of `parts` data-parallel ranks trains on."""
    rows = len(ids) // parts
    return ids[part * rows : (part + 1) * rows]


def next_tokens(ids: np.ndarray) -> np.ndarray:
    """Labels that are shifted already: the token after each one, and -100 for a row's last."""
    return np.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=-100)


def peak_rss() -> int:
    """The most bytes of memory that this process has had resident, the libraries' own pages included."""
    try:  # getrusage would count what the launcher held before this program replaced it
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write(work: Work, seen: Seen, **more) -> None:
    """This rank's result. more: whatever else a runner has found, as JSON."""
    result = {"seconds": seen.seconds, "losses": seen.losses, "norms": seen.norms, "memory": peak_rss(), **more}
    (Path(work.out) / f"rank-{rank()}.json").write_text(json.dumps(result))

"""Time the train step compiled and uncompiled, side by side: python tools/step_time.py [--model M] [--rounds N].

The two take turns, since a shared machine's speed drifts; medians and their ratio are printed.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from setting import started  # before torch

import tyro

from ftrain.launch import finish
from ftrain.mesh import Mesh
from ftrain.state import init_state
from ftrain.step import Recipe, make_train_step


@dataclass(frozen=True)
class Config:
    model: str = "qwen3-moe-tiny"
    precision: str = "fp32"
    remat: str = "none"
    batch_size: int = 8
    seq_len: int = 256
    rounds: int = 15
    """Steps of each kind that are timed, after one that is not."""


def main(cfg: Config) -> None:
    _, model, job, _, parts = started(
        cfg.model, cfg.batch_size, cfg.seq_len, mesh=Mesh(), precision=cfg.precision, remat=cfg.remat
    )
    steps = {mode: make_train_step(model, job.sharding, job.ops, Recipe(), mode) for mode in ("inductor", "off")}

    def stepper(step: Callable) -> Callable[[], float]:
        state = init_state(model.specs, job.placements, job.device_mesh, 0)

        def run() -> float:
            began = time.perf_counter()
            float(step(state, parts)[1]["loss"])
            return time.perf_counter() - began

        return run

    steppers = {mode: stepper(step) for mode, step in steps.items()}
    for mode, run in steppers.items():
        print(f"{mode}: first step {run():.1f} s", flush=True)
    times = {mode: [] for mode in steppers}
    for _ in range(cfg.rounds):
        for mode, run in steppers.items():
            times[mode].append(run())
    for mode, seen in times.items():
        print(f"{mode}: median {statistics.median(seen):.3f} s, {min(seen):.3f} to {max(seen):.3f} s over {len(seen)}")
    ratios = [off / on for on, off in zip(times["inductor"], times["off"], strict=True)]
    print(f"uncompiled / compiled: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
    for program in steps["inductor"].graph.programs:
        print(f"compiled: {program.compiled}")
    finish()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

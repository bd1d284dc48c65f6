"""Where a compiled step's time goes: python tools/phases.py [--model M] [--seq-len S]; under torchrun, of each rank.

Each piece of the step is timed as it runs; the medians over the rounds are added up by what the pieces are. On a GPU
the host waits for the device after each, so that nothing overlaps there: shares, not a step's time.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as a run has it; must be set before torch starts its threads

import statistics
import time
from dataclasses import dataclass

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch.utils._pytree import tree_leaves

from ftrain.equivalence import random_batch
from ftrain.flops import flops_per_token, graph_flops, peak_flops
from ftrain.job import make_job
from ftrain.launch import finish, init
from ftrain.mesh import Mesh
from ftrain.model import find_model
from ftrain.plan import find_plan
from ftrain.state import init_state
from ftrain.step import Recipe, make_train_step


@dataclass(frozen=True)
class Config:
    model: str = "qwen3-moe-tiny"
    plan: str = "fsdp_sp_ep"
    mesh: tuple[int, int, int] = (1, 1, 1)
    """fsdp, sp, ep: their product is the number of ranks."""
    precision: str = "fp32"
    remat: str = "selective"
    batch_size: int = 8
    seq_len: int = 256
    rounds: int = 15


PHASES = {
    "_forward": "layers, forward", "_backward": "layers, backward", "all_gather": "starting to gather",
    "reduce_scatter": "starting to reduce", "all_reduce": "starting to reduce", "wait": "waiting for other ranks",
    "adamw": "update", "sum_of_squares": "gradient norm", "addmm_": "gradient of the unembedding",
    "add_": "gradient of the unembedding",
}  # fmt: skip


def phase(name: str) -> str:
    return next((phase for part, phase in PHASES.items() if part in name), "embedding, loss, and what is between")


def main(cfg: Config) -> None:
    process = init()
    model = find_model(cfg.model)
    job = make_job(
        model, find_plan(cfg.plan), Mesh(*cfg.mesh),
        device_type=process.device.type, precision=cfg.precision, remat=cfg.remat,
    )  # fmt: skip
    state = init_state(model.specs, job.placements, job.device_mesh, 0)
    step = make_train_step(model, job.sharding, job.ops, Recipe())
    batch = random_batch(model.cfg.vocab, cfg.batch_size, cfg.seq_len, seed=0)
    batch["segment_ids"] = torch.zeros_like(batch["segment_ids"])  # one document a row
    batch["position_ids"] = torch.arange(cfg.seq_len).expand(cfg.batch_size, -1).contiguous()
    parts = [{name: t.to(process.device) for name, t in part.items()} for part in job.microbatches(batch)]
    step(state, parts)
    program = step.program(state, parts)
    whole, seen = [], [[] for _ in program.instructions]
    for _ in range(cfg.rounds):
        began = time.perf_counter()
        step(state, parts)
        sync()
        whole.append(time.perf_counter() - began)
        slots = program.filled(tree_leaves(step.arguments(state, parts)))
        with torch.no_grad():
            began = time.perf_counter()
            for i, _ in enumerate(program.run(slots)):
                sync()
                seen[i].append(time.perf_counter() - began)
                began = time.perf_counter()
    shares: dict[str, float] = {}
    for instruction, times in zip(program.instructions, seen, strict=True):
        name = phase(instruction.name)
        shares[name] = shares.get(name, 0.0) + statistics.median(times)
    if process.rank == 0:
        report(cfg, model, process, program, statistics.median(whole), shares)
    finish()


def sync() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def report(cfg: Config, model, process, program, whole: float, shares: dict[str, float]) -> None:
    table = Table("phase", "ms", "share", title=f"{cfg.model}, a step of {1000 * whole:.0f} ms on {process.world} ranks")
    total = sum(shares.values())
    for name, seconds in sorted(shares.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{1000 * seconds:.1f}", f"{seconds / total:.1%}")
    Console().print(table)
    tokens = cfg.batch_size * cfg.seq_len
    flops = flops_per_token(model.specs, model.cfg, cfg.seq_len) * tokens / process.world
    print(f"the model's FLOPs for this rank: {flops / 1e9:.2f} G (by formula)")
    try:
        print(f"the graph's: {graph_flops(program.line()) / 1e9:.2f} G (from its nodes; recomputed products too)")
    except ValueError as error:
        print(f"the graph's are not known: {error}")
    peak = peak_flops(process.device, torch.float32 if cfg.precision == "fp32" else torch.bfloat16)
    if peak:
        print(f"MFU {flops / whole / peak:.1%} of {peak / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

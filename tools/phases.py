"""Where a compiled step's time goes: python tools/phases.py [--model M] [--seq-len S]; under torchrun, of each rank.

Each piece of the step is timed as it runs; the medians over the rounds are added up by what the pieces are. On a GPU
the host waits for the device after each, so that nothing overlaps there: shares, not a step's time.
"""

import statistics
import time
from dataclasses import dataclass

from setting import started  # before torch

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import fx
from torch.utils._pytree import tree_leaves

from ftrain.flops import flops_per_token, graph_flops, peak_flops
from ftrain.launch import finish
from ftrain.mesh import Mesh
from ftrain.offload import arrived, to_device, to_host
from ftrain.program import cut
from ftrain.schedule import base, is_region
from ftrain.step import Recipe, make_train_step


@dataclass(frozen=True)
class Config:
    model: str = "qwen3-moe-tiny"
    plan: str = "fsdp_sp_ep"
    mesh: Mesh = Mesh(-1, 1, 1)
    """Sizes of the mesh; -1: what the ranks give."""
    precision: str = "fp32"
    remat: str = "selective"
    batch_size: int = 8
    seq_len: int = 256
    rounds: int = 15


aten, c10d, own = torch.ops.aten, torch.ops._c10d_functional, torch.ops.ftrain
UNEMBEDDING, UPDATE = "gradient of the unembedding", "update"
PHASES = {
    c10d.all_gather_into_tensor.default: "starting to gather", c10d.all_to_all_single.default: "starting to exchange",
    c10d.reduce_scatter_tensor.default: "starting to reduce", c10d.all_reduce.default: "starting to reduce",
    c10d.wait_tensor.default: "waiting for other ranks",
    to_host: "starting to copy to the host and back", to_device: "starting to copy to the host and back",
    arrived: "waiting for the host's copies",
    aten.zero_.default: UNEMBEDDING, aten.addmm_.default: UNEMBEDDING, own.sum_of_squares.default: "gradient norm",
    own.adamw_.default: UPDATE, own.adamw_rounded_.default: UPDATE,
}  # fmt: skip


def phase(head: fx.Node) -> str:
    """What a piece of the step is for, by its first operator, which is all of it where no compiler takes it."""
    if is_region(head):
        return "layers, " + head.target.__name__.rsplit("_", 1)[1]
    if head.target is aten.add_.Tensor:  # the count of steps is an input; in bf16 this gradient is added up too
        return UPDATE if base(head.args[0]).op == "placeholder" else UNEMBEDDING
    return PHASES.get(head.target, "embedding, loss, and what is between")


def main(cfg: Config) -> None:
    process, model, job, state, parts = started(
        cfg.model, cfg.batch_size, cfg.seq_len, plan=cfg.plan, mesh=cfg.mesh, precision=cfg.precision, remat=cfg.remat
    )
    step = make_train_step(model, job.sharding, job.ops, Recipe())
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
    for piece, times in zip(cut(program.nodes), seen, strict=True):
        name = phase(piece[0])
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

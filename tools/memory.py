"""The train step's peak memory, measured, and what it is made of: python tools/memory.py [--model M] [--remat R].

With --lengths 1024 2048 4096: under every remat policy the peak at each of these lengths, the most activations that
were ever left by layers for later, and what the piece had that ran at the peak. Under torchrun the mesh is over its
ranks, and rank 0 reports its own.
"""

from dataclasses import dataclass, field, replace

from setting import started  # before torch

import tyro

from ftrain.launch import Process, finish, init
from ftrain.memory import CATEGORIES, Peak, measure
from ftrain.mesh import Mesh
from ftrain.remat import POLICIES
from ftrain.step import Recipe, make_train_step

MIB = 2**20


@dataclass(frozen=True)
class Config:
    model: str = "qwen3-moe-tiny"
    plan: str = "fsdp_sp_ep"
    mesh: Mesh = Mesh(-1, 1, 1)
    """Sizes of the mesh; -1: what the ranks give."""
    precision: str = "fp32"
    remat: str = "full"
    optimizer_state: str = "fp32"
    compile: str = "inductor"
    batch_size: int = 8
    seq_len: int = 256
    """Tokens of a row. No row has padding, and each is one document."""
    lengths: list[int] = field(default_factory=list)


def main(cfg: Config) -> None:
    process = init()
    if cfg.lengths:
        by_length(cfg, process)
    else:
        table(cfg, peak(cfg, process), process)
    finish()


def peak(cfg: Config, process: Process) -> Peak:
    _, model, job, state, parts = started(
        cfg.model, cfg.batch_size, cfg.seq_len, plan=cfg.plan, mesh=cfg.mesh, optimizer_state=cfg.optimizer_state,
        process=process, precision=cfg.precision, remat=cfg.remat,
    )  # fmt: skip
    return measure(make_train_step(model, job.sharding, job.ops, Recipe(), cfg.compile), state, parts)


def table(cfg: Config, found: Peak, process: Process) -> None:
    if process.rank == 0:
        print(f"| {cfg.model}, {cfg.batch_size} x {cfg.seq_len} tokens, {cfg.precision}, remat {cfg.remat} | MiB |")
        print("|---|---|")
        for name in CATEGORIES:
            print(f"| {name} | {found.by[name] / MIB:.1f} |")
        print(f"| peak, in {found.at} | {found.bytes / MIB:.1f} |")


def by_length(cfg: Config, process: Process) -> None:
    def say(*cells) -> None:
        if process.rank == 0:
            print("|", " | ".join(map(str, cells)), "|", flush=True)

    say("tokens a row", *(f"{policy}: peak, activations, temporary (MiB)" for policy in POLICIES))
    say(*["---"] * (1 + len(POLICIES)))
    left: dict[str, list[int]] = {policy: [] for policy in POLICIES}
    for length in cfg.lengths:
        cells = []
        for policy in POLICIES:
            found = peak(replace(cfg, remat=policy, seq_len=length), process)
            left[policy].append(found.most["activations"])
            cells.append(", ".join(f"{n / MIB:.1f}" for n in (found.bytes, left[policy][-1], found.by["temporary"])))
        say(length, *cells)
    tokens = cfg.batch_size * (cfg.lengths[-1] - cfg.lengths[0]) / process.world
    if tokens:
        say("activations, bytes a token", *(f"{(of[-1] - of[0]) / tokens:,.0f}" for of in left.values()))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

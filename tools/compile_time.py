"""How long a train step takes to be captured and compiled, by depth: python tools/compile_time.py [--layers 8 32].

Each depth in a process of its own, first with an empty cache on disk (cold), then again (warm). Running the step is not
in it. On a shared machine compare ratios of one call, and of more than one `--rounds`.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Config:
    layers: tuple[int, ...] = (8, 32)
    hidden: int = 256
    seq_len: int = 256
    batch_size: int = 8
    remat: str = "selective"
    rounds: int = 1
    """How often each is timed; the medians are shown."""


def model(layers: int, hidden: int) -> dict:
    return {
        "model_type": "qwen3", "vocab_size": 4096, "hidden_size": hidden, "num_hidden_layers": layers,
        "intermediate_size": 3 * hidden, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": hidden // 8,
        "max_position_embeddings": 8192, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "initializer_range": 0.02,
    }  # fmt: skip


def child(cfg: Config, layers: int) -> None:
    """Compiles once, and prints what that took as JSON."""
    from setting import started  # before torch

    from ftrain.launch import finish
    from ftrain.step import Recipe, make_train_step

    _, found, job, state, parts = started(model(layers, cfg.hidden), cfg.batch_size, cfg.seq_len, remat=cfg.remat)
    step = make_train_step(found, job.sharding, job.ops, Recipe())
    began = time.perf_counter()
    compiled = step.program(state, parts).compiled
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, **{n: getattr(compiled, n) for n in ("pieces", "kernels", "cached", "calls")}}))
    finish()


def timed(cfg: Config, layers: int) -> tuple[dict, dict]:
    """-> (cold, warm)"""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "COMPILE_TIME": json.dumps([layers, vars(cfg)])}
        runs = [
            subprocess.run([sys.executable, __file__], env=environment, stdout=subprocess.PIPE, text=True, check=True)
            for _ in range(2)
        ]
    cold, warm = (json.loads(run.stdout.splitlines()[-1]) for run in runs)
    return cold, warm


def main(cfg: Config) -> None:
    table = Table(title=f"capture and compilation, hidden {cfg.hidden}, {cfg.batch_size} x {cfg.seq_len}, {cfg.remat}")
    for column in ("layers", "cold s", "warm s", "warm/cold", "pieces", "kernels", "from the cache", "calls a step"):
        table.add_column(column, justify="right")
    colds = {}
    for layers in cfg.layers:
        runs = [timed(cfg, layers) for _ in range(cfg.rounds)]
        cold, warm = (statistics.median(run[i]["seconds"] for run in runs) for i in range(2))
        colds[layers] = cold
        first, again = runs[0]
        counts = (first["pieces"], first["kernels"], f"{again['cached']} of {again['pieces']}", first["calls"])
        table.add_row(str(layers), f"{cold:.1f}", f"{warm:.1f}", f"{warm / cold:.2f}", *map(str, counts))
    console = Console()
    console.print(table)
    least = min(colds)
    console.print(", ".join(f"{n} layers / {least}: {cold / colds[least]:.2f}" for n, cold in colds.items() if n != least))


if __name__ == "__main__":
    if "COMPILE_TIME" in os.environ:
        layers, cfg = json.loads(os.environ["COMPILE_TIME"])
        child(Config(**cfg), layers)
    else:
        main(tyro.cli(Config, description=__doc__))

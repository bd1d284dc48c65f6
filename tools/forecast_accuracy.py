"""A forecast beside the run that it is of: python tools/forecast_accuracy.py prints the table of docs/forecast.md.

Each case is run on its ranks (processes here, one thread each): the memory of a compiled step is measured, its
collectives and FLOPs are counted while it runs. The forecast of the same step is made in another process, without
ranks.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from setting import started  # before torch

import torch
import tyro
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ftrain.flops import flop_formula
from ftrain.forecast import Work, trace
from ftrain.launch import finish
from ftrain.memory import measure
from ftrain.mesh import Mesh
from ftrain.model import Model, find_model
from ftrain.plan import find_plan
from ftrain.step import Recipe, make_train_step

HERE = Path(__file__)


class Case(NamedTuple):
    """One run: mode is the compiler's backend."""

    model: str
    plan: str
    mesh: tuple[int, int, int]
    rows: int
    length: int
    remat: str
    mode: str = "aot_eager"
    optimizer_state: str = "fp32"
    layers: int = 4

    def __str__(self) -> str:
        mesh = "x".join(map(str, self.mesh))
        work = f"{self.layers} layers, {self.rows} x {self.length}, {self.remat}, {self.mode}"
        return f"{self.model}, {self.plan} {mesh}, {work}"


DENSE = "qwen3-dense"
MOE = "qwen3-moe-tiny"
CASES = [
    Case(MOE, "fsdp_sp_ep", (1, 1, 1), 4, 256, "selective"),
    Case(MOE, "fsdp_sp_ep", (1, 1, 1), 8, 512, "full", "inductor"),
    Case(MOE, "fsdp_sp_ep", (2, 1, 1), 8, 256, "full"),
    Case(MOE, "fsdp_sp_ep", (1, 1, 2), 8, 512, "selective"),
    Case(MOE, "fsdp_sp_ep", (1, 2, 1), 4, 1024, "none"),
    Case(MOE, "fsdp_sp_ep", (1, 2, 2), 8, 512, "full"),
    Case(MOE, "fsdp_sp_ep", (2, 1, 2), 8, 256, "selective", optimizer_state="bf16"),
    Case(DENSE, "fsdp_sp_ep", (1, 1, 1), 2, 2048, "full", "inductor"),
    Case(DENSE, "fsdp", (2, 1, 1), 8, 512, "none"),
    Case(DENSE, "fsdp_sp", (1, 2, 1), 2, 2048, "full"),
    Case(DENSE, "fsdp_sp", (2, 2, 1), 4, 1024, "selective"),
    Case(DENSE, "ddp", (2, 1, 1), 4, 512, "selective", "inductor"),
    Case(DENSE, "fsdp_sp", (1, 2, 1), 2, 2048, "full", "inductor"),
    Case(DENSE, "fsdp", (4, 1, 1), 8, 512, "full", optimizer_state="8bit", layers=8),
]  # fmt: skip


def config(case: Case) -> dict:
    hf = dict(find_model(MOE).hf, num_hidden_layers=case.layers)
    if case.model == DENSE:
        dropped = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
        hf = {key: value for key, value in hf.items() if key not in dropped}
        hf |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
        hf |= {"hidden_size": 256, "intermediate_size": 768}
    return hf


def balanced(model: Model) -> Model:
    """The model with experts that take turns, whatever the router says: how busy they are is assumed, not foreseen."""
    forward, n = model.forward, next((spec.shape[0] for spec in model.specs.values() if spec.experts), 1)

    def with_turns(p, batch, ops):
        def experts(x, weight, index, *weights):
            turns = torch.arange(index.numel(), device=index.device) % n
            return ops.experts(x, weight, turns.view(index.shape), *weights)

        return forward(p, batch, dataclasses.replace(ops, experts=experts))

    return dataclasses.replace(model, forward=with_turns)


class Counting(TorchDispatchMode):
    """Counts the collectives of what runs, and the FLOPs of its products and attention."""

    def __init__(self):
        super().__init__()
        self.sent: Counter = Counter()
        self.flops = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.namespace == "_c10d_functional" and "wait" not in op._opname:
            size = max(t.numel() * t.element_size() for t in tree_leaves([args[0], out]) if isinstance(t, Tensor))
            self.sent[f"{op._opname} count"] += 1
            self.sent[f"{op._opname} bytes"] += size
        count = flop_formula(op)
        if count:
            self.flops += count(*args, out_val=out)
        return out


def run(case: Case) -> dict | None:
    """On every rank: what rank 0 saw."""
    process, model, job, state, parts = started(
        config(case), case.rows, case.length, plan=case.plan, mesh=Mesh(*case.mesh), remat=case.remat,
        optimizer_state=case.optimizer_state,
    )  # fmt: skip
    model = balanced(model)
    step = make_train_step(model, job.sharding, job.ops, Recipe(), case.mode)
    # gloo's threads let go of what they sent when they come to it: on a busy machine that is late, in some steps.
    peak = min((measure(step, state, parts) for _ in range(5)), key=lambda peak: peak.bytes)
    counted = make_train_step(model, job.sharding, job.ops, Recipe(), "aot_eager")
    counted(state, parts)
    with Counting() as counting:
        counted(state, parts)
    finish()
    return {"peak": peak.bytes, "by": peak.by, "sent": dict(counting.sent), "flops": counting.flops}


def foreseen(case: Case) -> dict:
    work = Work(case.rows, case.length, "fp32", case.remat, case.optimizer_state)
    mode = "aot_eager" if case.mode == "aot_eager" else "decomposed"
    traced = trace(balanced(find_model(config(case))), find_plan(case.plan), Mesh(*case.mesh), work, mode=mode)
    peak = traced.timeline(on_a_cpu=True, fuse=case.mode == "inductor").peak()
    sent: Counter = Counter()
    for c in traced.program.collectives():
        sent[f"{c.kind} count"] += 1
        sent[f"{c.kind} bytes"] += c.bytes
    return {"peak": peak.bytes, "by": peak.by, "sent": dict(sent), "flops": traced.flops()}


def main(case: int | None = None, out: Path | None = None, foresee: bool = False) -> None:
    """case, out, foresee: for the processes that this one starts."""
    if case is not None:
        found = foreseen(CASES[case]) if foresee else run(CASES[case])
        if int(os.environ.get("RANK", "0")) == 0:
            out.write_text(json.dumps(found))
        return
    print("| run | measured MiB | forecast | ratio | collectives | FLOPs |")
    print("|---|---|---|---|---|---|")
    for number, one in enumerate(CASES):
        ranks = one.mesh[0] * one.mesh[1] * one.mesh[2]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] * (ranks > 1)
        result = []
        for more, foresee_it in ((torchrun, False), ([], True)):
            path = Path(os.environ.get("TMPDIR", "/tmp")) / f"forecast-{os.getpid()}-{number}-{foresee_it}.json"
            command = [sys.executable, *more, str(HERE), "--case", str(number), "--out", str(path)]
            command += ["--foresee"] * foresee_it
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
            result.append(json.loads(path.read_text()))
            path.unlink()
        real, seen = result
        same = "equal" if real["sent"] == seen["sent"] else f"DIFFER {real['sent']} {seen['sent']}"
        flops = "equal" if real["flops"] == seen["flops"] else f"DIFFER {real['flops']} {seen['flops']}"
        print(
            f"| {one} | {real['peak'] / 2**20:.1f} | {seen['peak'] / 2**20:.1f} | {seen['peak'] / real['peak']:.3f} "
            f"| {same} | {flops} |", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)

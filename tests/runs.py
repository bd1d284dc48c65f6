"""Whole runs, from the command line on: a tiny model, a little text, and what a run leaves behind."""

import json
import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from ftrain import records

MODEL = {
    "model_type": "qwen3_moe", "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 16,
    "intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True,
    "router_aux_loss_coef": 0.01, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
    "rope_theta": 1e4, "tie_word_embeddings": False, "initializer_range": 0.02,
}  # fmt: skip


def write_model(folder: Path, **changes) -> Path:
    """A directory with a config.json, without weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MODEL | changes))
    return folder


def write_text(path: Path, topics: int = 40) -> Path:
    """JSONL: some of the help that comes with every Python, a document a line."""
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())][:topics]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def command(**flags) -> list[str]:
    """seq_len=64, mesh_ep=2 -> the command with --seq-len 64 --mesh.ep 2."""
    argv = [sys.executable, "-m", "ftrain"]
    for name, value in flags.items():
        flag = "--" + name.replace("mesh_", "mesh.").replace("_", "-")
        argv += [flag] if value is True else [flag, str(value)]
    return argv


def environment(cache: Path) -> dict[str, str]:
    """One thread a rank, on CPU, whatever started us; text is tokenised once for all runs with this cache."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "FTRAIN_TRACEBACK")
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") and k not in ours}
    return env | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(cache)}


def start(env: dict[str, str], **flags) -> subprocess.Popen:
    """A run whose output waits to be read: a page of it, and it stands still."""
    return subprocess.Popen(
        command(**flags), env=env, bufsize=0, pipesize=4096, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def steps(out: Path) -> list[dict]:
    """What metrics.jsonl says of each step."""
    return [entry for entry in records.read(out / "metrics.jsonl") if "loss" in entry]


def series(out: Path) -> torch.Tensor:
    """[steps, 2]: loss and gradient norm."""
    entries = steps(out)
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    return torch.tensor([[entry["loss"], entry["grad_norm"]] for entry in entries], dtype=torch.float64)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint: the parameters, and the moments as `mu NAME` and `nu NAME`."""
    found = {}
    for kind, pattern in (("", "model-*"), ("mu ", "train_state/mu-*"), ("nu ", "train_state/nu-*")):
        for path in directory.glob(f"{pattern}.safetensors"):
            found |= {kind + name: tensor for name, tensor in load_file(path).items()}
    return found

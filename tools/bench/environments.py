"""The peers' environments: each a venv that pip fills, made once. Python only."""

import importlib.util
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
TORCH = ("torch==2.13.0", "numpy")

# What VeOmni and torchtitan ask for includes CUDA kernels: on CPU they take these, and their own wheels alone.
PACKAGES: dict[str, list[tuple[str, ...]]] = {
    "ftrain": [("-e", str(REPO), "matplotlib")],
    "hf": [(*TORCH, "transformers==5.23.0", "accelerate==1.15.0")],
    "veomni": [
        (*TORCH, "transformers==5.9.0", "datasets>=2.20,<=2.21", "torchdata>=0.8,<1", "blobfile>=3", "packaging<26",
         "tiktoken", "psutil", "wandb", "einops>=0.8.1", "matplotlib>=3.7", "setuptools", "rich"),
        ("--no-deps", "veomni==0.1.12"),
    ],
    "titan": [
        (*TORCH, "torchdata>=0.8", "datasets>=3.6,<4.8", "tokenizers", "safetensors", "tyro", "tensorboard", "wandb",
         "einops", "pillow", "spmd_types==0.2.3", "torch_checkpointing"),
        ("--no-deps", "torchtitan==0.3.0", "triton"),  # triton is imported, and never used
    ],
    "jax": [("jax==0.10.2", "jaxlib==0.10.2", "optax", "numpy", "safetensors")],
}  # fmt: skip


def environment(name: str, work: Path, given: Path | None) -> Path:
    """The Python of an environment: this one for ftrain's where it has what is needed, else GIVEN/env-NAME where there
    is such, else WORK/env-NAME, which is made at the first call (some minutes, up to 2 GB).

    Raises subprocess.CalledProcessError where pip fails.
    """
    if name == "ftrain" and all(importlib.util.find_spec(module) for module in ("ftrain", "rich", "matplotlib")):
        return Path(sys.executable)
    if given and (given / f"env-{name}" / "bin" / "python").exists():
        return (given / f"env-{name}" / "bin" / "python").absolute()
    folder = work / f"env-{name}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"making {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        for packages in PACKAGES[name]:
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        (folder / "complete").touch()
    return python

"""Recipes: whole runs by name, `python -m ftrain --recipe NAME`. One file here is one recipe; nothing lists them.

The first line of the file's docstring is what it does. The file has

    DEFAULTS = {"steps": 300, "lr": 3e-3, "seq_len": 64, "mesh.sp": 1, ...}
        The flags' values (fields of `TrainConfig`) where the user gives none. A literal: it is read without running
        the file, so that `--help` stays quick.

    def model(cfg: TrainConfig) -> dict
        The model's config, with its `model_type` (a composition's too). Left out where `--model` says it, which
        DEFAULTS may set. It may convert or unpack weights into the cache (`ftrain.cache.cached`).

    def data(cfg: TrainConfig, model: Model, source: Path | None) -> Data
        See `ftrain.data.Data`; `ftrain.in_memory.data_of` makes one of samples in memory. source: the directory that
        `--model` or `--init` names, if any.

    def start(run: Run) -> dict[str, float]     may be left out
    def finish(run: Run) -> dict[str, float]    may be left out
        Scores before the first step (of a new run) and after the last. They are printed and go into metrics.jsonl.
        What else there is to show, it prints with `run.con.info` (only the first rank speaks) and writes, on the rank
        with `run.first`, into `run.out`.

`model` and `data` are called by one rank of each machine, then by the others: what the first left in the cache is
there.
They say what is missing in a sentence, by FileNotFoundError or ValueError: what to install, above all.
`start` and `finish` are called by every rank, since every rank holds a part of the model:
`ftrain.generate.complete(run.job, run.state, batch, n, stop)` goes on from the rows of a global batch on the mesh, and
`run.forward(batch)` is the model's `Output` on this rank's part of one.
"""

import ast
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..config import TrainConfig
    from ..console import Console
    from ..data import Data
    from ..job import Job
    from ..ops import Output
    from ..state import State


@dataclass(frozen=True)
class Run:
    """What a recipe's `start` and `finish` are given, on every rank. Never save or step `state` there."""

    cfg: "TrainConfig"
    job: "Job"
    state: "State"
    data: "Data"
    device: "torch.device"
    con: "Console"

    @property
    def out(self) -> Path:
        """The run directory."""
        return Path(self.cfg.out)

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files."""
        return self.job.sharding.world.rank == 0

    def forward(self, batch: Mapping) -> "Output":
        """The model on this rank's part of a global batch, without gradients. Every rank must call it."""
        from ..generate import forward

        return forward(self.job, self.state, batch)


def names() -> list[str]:
    """The recipes there are."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def file(name: str) -> Path:
    """Where a recipe is: one of `names()`, or the path of a file of the user's own.

    Raises ValueError for an unknown name, FileNotFoundError for a file that is not there.
    """
    from ..config import did_you_mean

    if name.endswith(".py"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"--recipe {name}: there is no such file")
        return Path(name)
    if name not in names():
        raise ValueError(f"--recipe {name}: the recipes are {', '.join(names())}{did_you_mean(name, names())}")
    return Path(__path__[0]) / f"{name.replace('-', '_')}.py"


def defaults(name: str) -> dict[str, Any]:
    """A recipe's DEFAULTS, read without running its file. Raises ValueError where they are not a literal."""
    path = file(name)
    for statement in ast.parse(path.read_text("utf-8"), str(path)).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "DEFAULTS" for target in targets):
            try:
                return dict(ast.literal_eval(statement.value))
            except (TypeError, ValueError):
                raise ValueError(f"{path}: DEFAULTS must be a literal, {{name: value, ...}}") from None
    return {}


def find(name: str) -> ModuleType:
    """A recipe's module. Raises ValueError for one that has no `data`."""
    from ..files import import_file

    path = file(name)
    own = path.parent != Path(__path__[0])
    module = import_file(str(path), f"--recipe {name}") if own else importlib.import_module(f"{__name__}.{path.stem}")
    if not hasattr(module, "data"):
        raise ValueError(f"{path} lacks data: a recipe has DEFAULTS and data, and may have model, start and finish")
    return module

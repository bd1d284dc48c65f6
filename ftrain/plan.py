"""Plans: looked up by name or by file, asked for every parameter, and held to their word."""

import importlib
import pkgutil
import traceback
from collections.abc import Callable
from pathlib import Path

from torch.distributed.tensor import Replicate
from torch.distributed.tensor.placement_types import Placement

from . import plans
from .config import did_you_mean
from .files import import_function
from .layout import Placements, check_placements
from .mesh import Mesh
from .specs import Specs

# (name, shape, mesh) -> one placement for each of (fsdp, sp, ep)
Plan = Callable[[str, tuple[int, ...], Mesh], list[Placement]]


def plan_names() -> list[str]:
    """The plans of the zoo: each module of plans/ holds a function of its own name."""
    return sorted(module.name for module in pkgutil.iter_modules(plans.__path__))


def find_plan(which: str) -> Plan:
    """A plan by its name in plans/, or `file.py:function`. Raises ValueError naming what is valid."""
    if ":" in which or which.endswith(".py"):
        path, _, function = which.rpartition(":") if ":" in which else (which, "", Path(which).stem)
        return import_function(path, function, f"--plan {which}")
    names = plan_names()
    if which not in names:
        near = did_you_mean(which, names)
        raise ValueError(f"--plan {which}: no such plan{near} (plans: {', '.join(names)}, or FILE.py:FUNCTION)")
    return getattr(importlib.import_module(f".plans.{which}", __package__), which)


def ask(plan: Plan, specs: Specs, mesh: Mesh) -> Placements:
    """The plan's placements of every parameter over (fsdp, sp, ep). Raises ValueError naming the parameter."""
    answers = {}
    for name, spec in specs.items():
        try:
            answer = plan(name, spec.shape, mesh)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            raise ValueError(
                f"the plan fails for {name} {spec.shape}: {type(error).__name__}: {error} ({where})"
            ) from error
        answers[name] = check_placements(name, spec.shape, answer, len(mesh))
    return answers


def over_replicas(placements: Placements, replica: int) -> Placements:
    """The placements on the device mesh, which has a `replica` dimension in front when there are replicas."""
    front = (Replicate(),) if replica > 1 else ()
    return {name: (*front, *p) for name, p in placements.items()}

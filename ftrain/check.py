"""Holding a plan to its invariants, on CPU and without a launcher: arithmetic first, runs on threads after.

The first invariants ask the plan about the model as it is; those that train use a small config
of its family, of odd sizes.
"""

import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement

from .checkpoint import restore, save
from .console import bytes_
from .equivalence import (
    TOLERANCE, Difference, Misplaced, Run, deviations, random_batches, run_mesh, run_plain, small_model, values,
)  # fmt: skip
from .job import make_job
from .layout import Placements, check_placements, shard_slices
from .mesh import AXES, Mesh
from .model import Model, find_model
from .parallel import expert_slots, group_key, kv_repeats
from .plan import Plan, ask, find_plan
from .ranks import run_ranks
from .remat import POLICIES
from .specs import ParamSpec
from .state import make_state, whole

UNKNOWN = "no.such.parameter.weight"
LARGEST = 64  # ranks of the meshes looked at by arithmetic
STATE = ("params", "mu", "nu")
KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")

# (mesh, replicas, microbatches) that are trained on, smallest first; odd sizes and every pair of axes.
MESHES = (
    (Mesh(), 1, 1), (Mesh(2, 1, 1), 1, 1), (Mesh(1, 2, 1), 1, 1), (Mesh(1, 1, 2), 1, 1), (Mesh(), 2, 2),
    (Mesh(3, 1, 1), 1, 1), (Mesh(2, 2, 1), 1, 1), (Mesh(2, 1, 2), 1, 1), (Mesh(1, 2, 2), 1, 2),
    (Mesh(1, 4, 1), 1, 1), (Mesh(1, 1, 4), 1, 1), (Mesh(5, 1, 1), 1, 1), (Mesh(2, 2, 2), 1, 1), (Mesh(2, 1, 2), 2, 1),
)  # fmt: skip
# Saved on one, restored on the next, and so around.
ROUND = (Mesh(2, 1, 1), Mesh(1, 2, 2), Mesh(3, 1, 1), Mesh(), Mesh(2, 1, 2))


class Broken(Exception):
    """A counterexample, in a sentence."""


def check(plan: str, model: str) -> bool:
    """Whether the plan keeps every invariant, with a line printed for each; stops where going on would mean nothing.

    Raises ValueError or FileNotFoundError where there is no such plan or model.
    """
    rules, whole_model = find_plan(plan), find_model(model)
    small = small_model(whole_model)
    print(f"plan {plan}, model {model}: {len(whole_model.specs)} parameters; trained as a small {small.family}")
    invariants: list[tuple[str, Callable[[], str], bool]] = [
        ("total", lambda: total(rules, whole_model), True),
        ("well-formed", lambda: well_formed(rules, whole_model), True),
        ("pure", lambda: pure(rules, whole_model), True),
    ]
    trained = Trained(rules, small)
    invariants += [
        ("degenerate", trained.degenerate, True),
        ("captured", trained.captured, False),
        ("state follows parameters", trained.placed, True),
        ("equivalence", trained.equivalent, False),
        ("collectives", trained.collectives, False),
        ("round trip", lambda: round_trip(rules, small), False),
    ]
    holds = True
    for number, (name, invariant, essential) in enumerate(invariants, 1):
        try:
            print(f"{number}  {name:<26}holds  {invariant()}", flush=True)
        except Broken as counterexample:
            holds = False
            print(f"{number}  {name:<26}FAILS  {counterexample}", flush=True)
            if counterexample.__cause__ and os.environ.get("FTRAIN_TRACEBACK") == "1":
                traceback.print_exception(counterexample.__cause__, file=sys.stderr)
            if essential:
                left = ", ".join(name for name, _, _ in invariants[number:])
                print(f"not looked at, since they rest on it: {left}")
                break
    print(f"the plan {plan} {'keeps every invariant' if holds else 'does not hold'}")
    return holds


def show(mesh: Mesh, replicas: int = 1, accumulate: int = 1) -> str:
    """A mesh in words, without what is 1."""
    sizes = {**dict(zip(AXES, mesh)), "replica": replicas, "accumulate": accumulate}
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one rank"


# --- By arithmetic alone


def meshes(largest: int = LARGEST) -> list[Mesh]:
    """All meshes of some sizes, odd ones too, smallest first."""
    found = (Mesh(*sizes) for sizes in product((1, 2, 3, 4, 5, 8, 16, 32, 64), repeat=3))
    return sorted((mesh for mesh in found if mesh.size <= largest), key=lambda mesh: (mesh.size, -mesh.fsdp))


def asked(plan: Plan, model: Model, mesh: Mesh) -> Placements:
    try:
        return ask(plan, model.specs, mesh)
    except ValueError as error:
        raise Broken(f"{show(mesh)}: {error}") from None


def total(plan: Plan, model: Model) -> str:
    """Every parameter gets placements; another name gets some by a rule for all, or an error."""
    for mesh in meshes():
        asked(plan, model, mesh)
    try:
        answer = plan(UNKNOWN, (8, 8), Mesh(2, 2, 2))
    except Exception:  # `ask` adds the name
        unknown = "an unknown name is refused"
    else:
        try:
            check_placements(UNKNOWN, (8, 8), answer, len(AXES))
        except ValueError as error:
            raise Broken(f"an unknown name must be refused, or follow a rule: {error}") from None
        unknown = "an unknown name follows a rule"
    return f"{len(model.specs)} parameters on {len(meshes())} meshes; {unknown}"


def well_formed(plan: Plan, model: Model) -> str:
    """The pieces of each tensor tile it exactly, and its experts can be served wherever their number allows."""
    cases = unserved = 0
    for mesh in meshes():
        placements = asked(plan, model, mesh)
        first: dict[tuple, str] = {}
        for name, spec in model.specs.items():
            first.setdefault((spec.shape, placements[name]), name)
        for (shape, of_tensor), name in first.items():
            _tiles(name, shape, of_tensor, mesh)
            cases += 1
        unserved += not _experts_fit(model, placements, mesh)
    note = f"; on {unserved} of them the experts are too few or do not divide" if unserved else ""
    return f"{cases} tensors on {len(meshes())} meshes up to {LARGEST} ranks{note}"


def _tiles(name: str, shape: tuple[int, ...], placements: tuple[Placement, ...], mesh: Mesh) -> None:
    """Raises Broken unless ranks at different places of a cut hold different elements, all of them together."""
    cut = [axis for axis, p in enumerate(placements) if isinstance(p, Shard)]
    pieces: dict[tuple[int, ...], tuple[slice, ...]] = {}
    for at in product(*map(range, mesh)):
        piece = shard_slices(shape, placements, mesh, at)
        if pieces.setdefault(tuple(at[axis] for axis in cut), piece) != piece:
            raise Broken(f"{show(mesh)}: {name}: expected equal copies where it is replicated, rank {at} holds {piece}")
    # Tensors are cut in parallel to their sides: a dimension is tiled by intervals of its own.
    for dim, size in enumerate(shape):
        axes = [i for i, axis in enumerate(cut) if placements[axis].dim == dim]
        intervals = {tuple(at[i] for i in axes): piece[dim] for at, piece in pieces.items()}
        reached = 0
        for interval in sorted(intervals.values(), key=lambda s: (s.start, s.stop)):
            if interval.start == interval.stop:
                continue
            if interval.start != reached:
                raise Broken(
                    f"{show(mesh)}: {name} {shape}: expected a piece of dimension {dim} to start at {reached}, "
                    f"found one at {interval.start}"
                )
            reached = interval.stop
        if reached != size:
            raise Broken(f"{show(mesh)}: {name} {shape}: the pieces of dimension {dim} reach {reached} of {size}")


def _experts_fit(model: Model, placements: Placements, mesh: Mesh) -> bool:
    """False where only the number of experts is at fault. Raises Broken where it is the plan."""
    sizes = dict(zip(AXES, mesh))
    experts: dict[tuple, tuple[str, ParamSpec]] = {}  # of each kind the first: layers are alike
    for name, spec in model.specs.items():
        if spec.experts:
            experts.setdefault((spec.shape, placements[name]), (name, spec))
    kinds = dict(experts.values())
    try:
        expert_slots(kinds, placements, AXES, sizes)
        return True
    except ValueError:
        pass
    one_each = {name: replace(spec, shape=(mesh.size, *spec.shape[1:])) for name, spec in kinds.items()}
    try:
        expert_slots(one_each, placements, AXES, sizes)
        return False
    except ValueError as error:
        raise Broken(f"{show(mesh)}: {error}") from None


def pure(plan: Plan, model: Model) -> str:
    """Asked again, in another order, and about other layers, the plan answers the same."""
    for mesh in meshes():
        first = asked(plan, model, mesh)
        backwards = Model(**{**vars(model), "specs": dict(reversed(model.specs.items()))})
        for again in (asked(plan, backwards, mesh), asked(plan, model, mesh)):
            for name, placements in first.items():
                if again[name] != placements:
                    raise Broken(f"{show(mesh)}: {name}: expected {placements} again, found {again[name]}")
        alike: dict[tuple[str, tuple[int, ...]], str] = {}
        for name, spec in model.specs.items():
            other = alike.setdefault((_any_layer(name), spec.shape), name)
            if first[name] != first[other]:
                raise Broken(f"{show(mesh)}: {name}: expected {first[other]}, as of {other}, found {first[name]}")
    return f"{len(model.specs)} parameters on {len(meshes())} meshes, asked three times"


def _any_layer(name: str) -> str:
    key = group_key(name)
    return re.sub(r"\d+$", "*", key) + name[len(key) :] if key != name else name


# --- By training


class Case(NamedTuple):
    """A mesh that was trained on: the runs of its ranks, or what was raised."""

    mesh: Mesh
    replicas: int
    accumulate: int
    runs: list[Run] | None
    error: Exception | None

    def __str__(self) -> str:
        return show(self.mesh, self.replicas, self.accumulate)


class Trained:
    """The small model trained under the plan on one mesh after the other, and on one device; each run made once."""

    def __init__(self, plan: Plan, model: Model):
        self.plan, self.model = plan, model
        self.batches = random_batches(model, 2)
        self.cases: list[Case] = []

    def first_cases(self, n: int) -> Iterator[Case]:
        """The first n cases, run where they have not been."""
        for mesh, replicas, accumulate in MESHES[len(self.cases) : n]:
            runs, error = None, None
            try:
                runs = run_mesh(self.model, self.plan, mesh, self.batches, replica=replicas, accumulate=accumulate)
            except Exception as caught:  # whatever a plan brings about is a counterexample
                error = caught
            self.cases.append(Case(mesh, replicas, accumulate, runs, error))
        return iter(self.cases[:n])

    def served(self, n: int = len(MESHES)) -> list[Case]:
        """The cases that ran. Raises Broken for one that did not though the model fits the mesh."""
        found = []
        for case in self.first_cases(n):
            if case.runs is not None:
                found.append(case)
            elif isinstance(case.error, Misplaced):
                raise Broken(f"{case}: {case.error}")
            elif self._fits(case.mesh):
                raise Broken(f"{case}: {type(case.error).__name__}: {case.error}") from case.error
        return found

    def _fits(self, mesh: Mesh) -> bool:
        try:
            kv_repeats(self.model.cfg.heads, self.model.cfg.kv_heads, mesh.sp)
        except ValueError:
            return False
        return _experts_fit(self.model, asked(self.plan, self.model, mesh), mesh)

    @cached_property
    def reference(self) -> Run:
        return run_plain(self.model, self.batches)

    def compare(self, case: Case) -> list[Difference]:
        found = deviations(case.runs, self.reference, self.model)
        wrong = [d for d in found if not d.error <= TOLERANCE]
        if wrong:
            raise Broken(f"{case}: {wrong[0]}; of {len(found)} values compared, {len(wrong)} differ")
        return found

    def degenerate(self) -> str:
        """On one rank, the plan changes nothing and nothing is sent."""
        for case in self.served(1):
            try:
                self.compare(case)
            except Broken as error:
                raise Broken(f"{error}; on one rank no plan matters: look for the fault in the model") from None
            if case.runs[0].traffic:
                raise Broken(f"{case}: expected no collectives, found {case.runs[0].traffic}")
        return "one rank is one device, without collectives"

    def captured(self) -> str:
        """As a step is trained with: captured as a graph, and recomputing in its backward what each policy says."""
        policies = [policy for policy in POLICIES if policy != "offload"]  # recomputes as selective does
        found = []
        for policy in policies:
            how = f"one rank, captured, --remat {policy}"
            try:
                runs = run_mesh(self.model, self.plan, Mesh(), self.batches, mode="aot_eager", remat=policy)
            except Exception as error:
                raise Broken(f"{how}: {type(error).__name__}: {error}") from error
            try:
                found += self.compare(Case(Mesh(), 1, 1, runs, None))
            except Broken as error:
                raise Broken(f"{how}: {error}; look for the fault in the model") from None
        worst = max(d.error for d in found)
        return f"{len(found)} values under --remat {', '.join(policies)}, the largest relative error {worst:.0e}"

    def placed(self) -> str:
        """Gradients and moments lie where their parameters do, pieces of the same shapes."""
        cases = self.served()
        ranks = sum(len(case.runs) for case in cases)
        return f"{4 * len(self.model.specs)} tensors on {ranks} ranks of {len(cases)} meshes"

    def equivalent(self) -> str:
        """Loss, every gradient and every updated parameter are those of one device."""
        found = [self.compare(case) for case in self.served()]
        worst = max(d.error for of_case in found for d in of_case)
        unfit = len(MESHES) - len(found)
        note = f"; {unfit} more do not fit this plan and model" if unfit else ""
        return f"{len(found[0])} values on {len(found)} meshes, the largest relative error {worst:.0e}{note}"

    def collectives(self) -> str:
        """Gathering and reducing only what is cut, exchanges only where sequences are cut or experts stay."""
        lines = []
        for case in self.served():
            placements = asked(self.plan, self.model, case.mesh)
            traffic = case.runs[0].traffic
            cut = {_cut(p, case.mesh) for p in placements.values()}
            exchange = case.mesh.sp > 1 or case.mesh.ep > 1 and any(s.experts for s in self.model.specs.values())
            exchange |= case.mesh.size * case.replicas > 1 and bool(self.model.blanks)  # what was encoded elsewhere
            if not any(cut) and "reduce_scatter" in traffic:
                raise Broken(f"{case}: nothing is sharded, found {traffic['reduce_scatter'][0]} reduce-scatters")
            if not any(cut) and case.mesh.sp == 1 and "all_gather" in traffic:
                raise Broken(f"{case}: nothing is sharded, found {traffic['all_gather'][0]} all-gathers")
            if not exchange and "all_to_all" in traffic:
                raise Broken(f"{case}: expected no all-to-all, found {traffic['all_to_all'][0]}")
            cells = (f"{n} ({bytes_(size)})" if n else "-" for n, size in (traffic.get(kind, (0, 0)) for kind in KINDS))
            lines.append([str(case), *cells])
        titles = ["   a step of the small model", *(kind.replace("_", "-") for kind in KINDS)]
        lines = [titles, *([f"   {line[0]}", *line[1:]] for line in lines)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        table = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
        return "\n".join(["none where nothing is sharded; of one rank, count and bytes:", *table])


def _cut(placements: tuple[Placement, ...], mesh: Mesh) -> tuple[str, ...]:
    return tuple(axis for axis, p, n in zip(AXES, placements, mesh) if isinstance(p, Shard) and n > 1)


# --- By checkpoints


def round_trip(plan: Plan, model: Model) -> str:
    """A state saved on one mesh is restored on another bit by bit."""
    meshes = [mesh for mesh in ROUND if _experts_fit(model, asked(plan, model, mesh), mesh)]
    with tempfile.TemporaryDirectory() as out:
        for here, there in zip(meshes, [*meshes[1:], meshes[0]]):
            way = f"from {show(here)} to {show(there)}"
            try:
                directory = run_ranks(here.size, lambda rank: _write(plan, model, here, f"{out}/{way}"))[0]
                found = run_ranks(there.size, lambda rank: _read(plan, model, there, directory))
            except Exception as error:
                raise Broken(f"{way}: {type(error).__name__}: {error}") from None
            for kind, name in found[0]:
                if not all(torch.equal(of_rank[kind, name], _kept(kind, name, model)) for of_rank in found):
                    raise Broken(f"{way}: {kind} of {name} comes back changed")
    return f"{len(found[0])} tensors, from each of {len(meshes)} meshes to the next, bit by bit"


def _kept(kind: str, name: str, model: Model) -> Tensor:
    return values(f"{kind} {name}", model.specs[name])


def _write(plan: Plan, model: Model, mesh: Mesh, out: str) -> Path:
    job = make_job(model, plan, mesh)
    states = {
        kind: make_state(model.specs, job.placements, job.device_mesh, lambda n, _, at, k=kind: _kept(k, n, model)[at])
        for kind in STATE
    }
    return save(out, states["params"]._replace(mu=states["mu"].params, nu=states["nu"].params), model, {})


def _read(plan: Plan, model: Model, mesh: Mesh, directory: Path) -> dict[tuple[str, str], Tensor]:
    job = make_job(model, plan, mesh)
    state, _ = restore(directory, model.specs, job.placements, job.device_mesh)
    return {(kind, name): whole(t) for kind in STATE for name, t in getattr(state, kind).items()}

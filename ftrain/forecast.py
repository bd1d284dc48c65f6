"""A train step, traced for ranks that are not there: without weights, devices or a launcher.

What is traced is the step itself (step.py), as the first rank of a process group that is only said to exist, on tensors
that have shapes and no data. What depends on data is assumed: all batch ranks have the same, no padding, each row one
document, experts as busy as `imbalance` says. Attention is assumed to keep no scores, as flash-attn does.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import Replicate

from .data import collate, in_one_row
from .flops import graph_flops
from .items import in_rows_of
from .job import Job, make_job
from .kernels import DEAR
from .layout import coordinate
from .memory import ROLES
from .mesh import Mesh
from .model import Model
from .ops import fill_batch
from .parallel import kv_repeats
from .plan import Plan
from .program import DECOMPOSED, Program
from .state import make_state
from .step import Recipe, make_train_step
from .timeline import Timeline


@dataclass(frozen=True)
class Work:
    """What a step does, and how: as the flags of a run say."""

    batch_size: int
    seq_len: int
    precision: str = "bf16"
    remat: str = "selective"
    optimizer_state: str = "fp32"
    accumulate: int = 1
    fp8_all_gather: bool = False
    imbalance: float = 1.0
    """Rows that this rank's experts get, over the mean."""
    media: float = 0.5
    """Of a row's tokens, those of examples with images, sounds, ...: for models that take more than text."""


class Traced:
    """A step as one rank runs it. roles: of each input of the program. groups: of each process group, its axes and the
    ranks in it. within: for encoders' packs of so many units, which part of all pairs of units lies within an item."""

    def __init__(
        self, program: Program, job: Job, roles: Sequence[str], groups: Mapping[str, "Span"],
        within: Mapping[int, float],
    ):  # fmt: skip
        self.program, self.job, self.roles, self.groups, self.within = program, job, roles, groups, within

    def timeline(self, on_a_cpu: bool = False, fuse: bool = True) -> Timeline:
        """Its memory, on an accelerator or on a CPU; operator by operator unless `fuse`."""
        workspace, dear = (on_cpu, DEAR) if on_a_cpu else (on_accelerator, ())
        return Timeline(self.program, self.roles, fuse, workspace, dear, host=on_a_cpu)

    def flops(self) -> int:
        """Of the step on this rank, recomputed products too."""
        return graph_flops(self.program.line())


@dataclass(frozen=True)
class Span:
    """A process group: the mesh dimensions that it goes over, and its ranks."""

    axes: tuple[str, ...]
    ranks: tuple[int, ...]


@contextmanager
def pretended(world: int) -> Iterator[None]:
    """A process group of `world` ranks, of which this process is the first. Raises RuntimeError where there is one."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a forecast has a process group of its own, but there is one already")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def trace(
    model: Model, plan: Plan, mesh: Mesh, work: Work, replica: int = 1, mode: str = DECOMPOSED
) -> Traced:  # fmt: skip
    """The step of the first rank. mode: as for `Program`; `aot_eager` where the forecast is of an eager run.

    Raises ValueError where model, plan and mesh do not fit each other, before anything is traced.
    """
    kv_repeats(model.cfg.heads, model.cfg.kv_heads, mesh.sp)
    world = mesh.size * replica
    with pretended(mesh.sp):
        parts = a_share(model, mesh.sp, world, work)
    with pretended(world):
        job = make_job(
            model, plan, mesh, replica, precision=work.precision, remat=work.remat,
            fp8_all_gather=work.fp8_all_gather, exchanged=lambda sizes, rows: assumed(sizes, rows, work.imbalance),
        )  # fmt: skip
        groups = spans(job)
        with FakeTensorMode(allow_non_fake_inputs=True):
            state = make_state(
                model.specs, job.placements, job.device_mesh,
                lambda name, spec, at: torch.empty([s.stop - s.start for s in at]), work.optimizer_state,
            )  # fmt: skip
            step = make_train_step(model, job.sharding, job.ops, Recipe(), "aot_eager", work.accumulate)
            arguments = step.arguments(state, parts)
        graph, names = step.graph.traced(*arguments)
        within = {len(item): _within(item) for part in parts for item in (part[f"{n}.item"] for n in model.blanks)}
        return Traced(Program(graph, mode), job, [ROLES.get(name, "batch") for name in names], groups, within)


def a_share(model: Model, sp: int, world: int, work: Work) -> list[dict[str, Tensor]]:
    """The first rank's microbatches of a global batch whose batch ranks all have the same: as if these were the job,
    whose items go nowhere else. Needs a process group of `sp` ranks."""
    rows = -(-work.batch_size // (world // sp * work.accumulate)) * work.accumulate
    job = make_job(model, lambda name, shape, mesh: [Replicate()] * len(mesh), Mesh(1, sp, 1))
    parts = job.microbatches(a_batch(model, rows, work), work.accumulate)
    for name, blank in model.blanks.items():
        for part in parts if world > 1 else ():
            outputs = len(part[f"{name}.item"]) // blank.units * len(blank.slots)
            part.setdefault(f"{name}.order", torch.arange(outputs))
            part[f"{name}.splits"] = torch.zeros(2, world, dtype=torch.int64)
    return parts


def a_batch(model: Model, rows: int, work: Work) -> dict:
    """So many rows of text, and of models that take more, with `work.media` of each row as the model's examples.

    Raises ValueError where a row is too short for one.
    """
    S = work.seq_len
    if model.examples is None:
        ids = torch.zeros(rows, S, dtype=torch.int64)
        return fill_batch({"input_ids": ids, "labels": ids.clone()})
    example = model.prepare(model.examples(torch.Generator().manual_seed(0))[-1 if work.media else 0])
    length, whole_row = example["segment_ids"].shape[1], any(name.startswith("row_") for name in example)
    times = 1 if whole_row else max(round(work.media * S / length), 1)
    row = collate([in_one_row([example] * times)], S)  # what fills it up is padding, which costs what text does
    if "input_ids" in row:
        row["labels"] = torch.zeros_like(row["input_ids"])
    items = {
        name: [in_rows_of(item, S, S, down) for down in range(rows) for item in of_row]
        for name, of_row in row.pop("items", {}).items()
    }
    return {name: t.expand(rows, *t.shape[1:]) for name, t in row.items()} | {"items": items}


def _within(item: Tensor) -> float:
    """Of all pairs of units, the part that is of one item. item: each unit's, equal ones in one run."""
    runs = item.unique_consecutive(return_counts=True)[1].double()
    return float((runs**2).sum() / runs.sum() ** 2)


def assumed(sizes: Tensor, rows: int, imbalance: float) -> list[list[int]]:
    """What the routing would say, in place of `parallel.on_host`: as many rows to each rank, and `imbalance` times as
    many from each."""
    ranks = sizes.shape[1]
    sent = [rows // ranks + (rank < rows % ranks) for rank in range(ranks)]
    return [sent, [round(n * imbalance) for n in sent]]


def spans(job: Job) -> dict[str, Span]:
    """The process groups that the step may use, by name."""
    mesh = job.device_mesh
    found = {}
    for group in dist.distributed_c10d._world.pg_names:
        name = group.group_name
        ranks = tuple(dist.get_process_group_ranks(group))
        places = [coordinate(rank, mesh.shape) for rank in ranks]
        axes = tuple(axis for i, axis in enumerate(mesh.mesh_dim_names) if len({place[i] for place in places}) > 1)
        found[name] = Span(axes, ranks)
    return found


def on_accelerator(node: fx.Node) -> int:
    """Bytes that attention's backward takes beside its results: flash-attn 2 sums the gradient of queries in fp32, and
    keeps that of keys and values for each query head until those of a group are added up."""
    if "by_document_backward" not in str(node.target):
        return 0
    q, k = (node.args[i].meta["val"] for i in (1, 2))
    return 4 * q.numel() + 2 * q.numel() * q.element_size() * (q.shape[2] != k.shape[2])


def on_cpu(node: fx.Node) -> int:
    """Bytes that attention.py's operators take beside their results: keys and values for each query head, and their
    gradients."""
    if "by_document" not in str(node.target):
        return 0
    backward = "backward" in str(node.target)
    q, k = (node.args[i + backward].meta["val"] for i in (0, 1))
    copies = 2 * (q.shape[2] != k.shape[2])
    return (copies + copies * backward) * q.numel() * q.element_size()

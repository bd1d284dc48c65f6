"""A model, a plan and a mesh, brought together for this rank: what training, checking and export start from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .attention import attention_for
from .data import local_batch
from .layout import Placements
from .mesh import Mesh, device_mesh
from .model import Model
from .ops import Ops, plain
from .parallel import Sharding, parallel_ops, shard_model
from .plan import Plan, ask, over_replicas
from .precision import compute_dtype, grouped_mm_for, linear_for


@dataclass(frozen=True)
class Job:
    """mesh: sizes. batch_rank, batch_ranks: which part of the batch's rows is this rank's, of how many."""

    model: Model
    mesh: Mesh
    sharding: Sharding
    ops: Ops
    batch_rank: int
    batch_ranks: int

    @property
    def placements(self) -> Placements:
        return self.sharding.placements

    @property
    def device_mesh(self) -> DeviceMesh:
        return self.sharding.mesh

    def microbatches(self, batch: Mapping[str, Tensor], accumulate: int = 1) -> list[dict[str, Tensor]]:
        """The global batch -> this rank's rows and columns of it, in `accumulate` microbatches."""
        sp = self.sharding.sp
        parts = local_batch(batch, self.batch_rank, self.batch_ranks, sp.rank, sp.size, accumulate)
        # Some rotary embeddings depend on it, and no part knows it.
        last = batch["position_ids"].max()
        return [{**part, "max_position": last} for part in parts]


def make_job(
    model: Model, plan: Plan, mesh: Mesh, replica: int = 1, *,
    device_type: str = "cpu", precision: str = "fp32", remat: str = "none",
) -> Job:  # fmt: skip
    """Needs an initialised process group of mesh.size * replica ranks; every rank must call it.

    Raises ValueError where model, plan and mesh do not fit each other.
    """
    placements = over_replicas(ask(plan, model.specs, mesh), replica)
    devices = device_mesh(mesh, replica, device_type)
    sharding = shard_model(model.specs, placements, devices, compute_dtype(precision))
    mask, attention = attention_for(device_type, compute_dtype(precision))
    ops = replace(plain(), linear=linear_for(precision), mask=mask, attention=attention)
    ops = parallel_ops(ops, sharding, remat, grouped_mm_for(precision))
    rank, ranks = 0, 1
    for axis, size, at in zip(devices.mesh_dim_names, devices.shape, devices.get_coordinate()):
        if axis != "sp":
            rank, ranks = rank * size + at, ranks * size
    return Job(model, mesh, sharding, ops, rank, ranks)

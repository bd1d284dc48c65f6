"""A model, a plan and a mesh, brought together for this rank: what training, checking and export start from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .attention import attention_for
from .data import local_batch
from .items import Item, Packing, pack
from .layout import Placements
from .mesh import Mesh, device_mesh
from .model import Model
from .ops import Ops, plain
from .parallel import Exchanged, Sharding, on_host, parallel_ops, shard_model
from .plan import Plan, ask, over_replicas
from .precision import compute_dtype, grouped_mm_for, linear_for, sent_in_float8


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

    def microbatches(self, batch: Mapping, accumulate: int = 1) -> list[dict[str, Tensor]]:
        """The global batch -> this rank's rows and columns of it, and its share of the items, in `accumulate`
        microbatches."""
        return self.shares(batch, accumulate)[0]

    def shares(self, batch: Mapping, accumulate: int = 1) -> tuple[list[dict[str, Tensor]], dict[str, list[Packing]]]:
        """As `microbatches`, and for each encoder how well its items were shared out, in each of them."""
        sp, world = self.sharding.sp, self.sharding.world
        tensors = {name: t for name, t in batch.items() if name != "items"}
        parts = local_batch(tensors, self.batch_rank, self.batch_ranks, sp.rank, sp.size, accumulate)
        # Some rotary embeddings depend on it, and no part knows it.
        last = tensors["position_ids"].max()
        parts = [{**part, "max_position": last} for part in parts]
        S, (b, s) = tensors["segment_ids"].shape[1], parts[0]["segment_ids"].shape
        sizes, axes = self.device_mesh.shape, self.device_mesh.mesh_dim_names
        rank_of = np.moveaxis(np.arange(world.size).reshape(sizes), axes.index("sp"), -1).reshape(-1, sp.size)

        def home(slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            row, column = np.divmod(np.maximum(slots, 0), S)
            row = row % (b * self.batch_ranks)  # within the microbatch
            return rank_of[row // b, column // s], row % b * s + column % s

        packings: dict[str, list[Packing]] = {}
        for name, blank in self.model.blanks.items():
            of_part: list[list[Item]] = [[] for _ in parts]
            for item in batch.get("items", {}).get(name, ()):
                used = item.slots[item.slots >= 0]
                if len(used):  # else no token wants it
                    of_part[int(used[0]) // (S * b * self.batch_ranks)].append(item)
            for part, items in zip(parts, of_part, strict=True):
                fields, packing = pack(name, items, blank, (b, s), home, world.rank, world.size)
                part |= fields
                packings.setdefault(name, []).append(packing)
        return parts, packings


def make_job(
    model: Model, plan: Plan, mesh: Mesh, replica: int = 1, *,
    device_type: str = "cpu", precision: str = "fp32", remat: str = "none", fp8_all_gather: bool = False,
    exchanged: Exchanged = on_host,
) -> Job:  # fmt: skip
    """Needs an initialised process group of mesh.size * replica ranks; every rank must call it.

    fp8_all_gather: the weights that `linear` quantises are gathered as float8. exchanged: as for `parallel_ops`.
    Raises ValueError where model, plan and mesh do not fit each other, or fp8_all_gather and the precision.
    """
    float8 = sent_in_float8(model, precision) if fp8_all_gather else ()
    placements = over_replicas(ask(plan, model.specs, mesh), replica)
    devices = device_mesh(mesh, replica, device_type)
    sharding = shard_model(model.specs, placements, devices, compute_dtype(precision), float8)
    ops = replace(plain(), linear=linear_for(precision), **attention_for(device_type, compute_dtype(precision)))
    ops = parallel_ops(ops, sharding, remat, grouped_mm_for(precision), exchanged)
    rank, ranks = 0, 1
    for axis, size, at in zip(devices.mesh_dim_names, devices.shape, devices.get_coordinate()):
        if axis != "sp":
            rank, ranks = rank * size + at, ranks * size
    return Job(model, mesh, sharding, ops, rank, ranks)

"""The train state: DTensors with the plan's placements, from initialisation to checkpoint."""

import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement, Shard

from .collectives import Group, all_gather, all_to_all, group_over
from .layout import Pieces, Placements, coordinate, cut, shard_slices
from .moments import Coded, blocks, dtypes, read
from .optim import Optimizer
from .specs import ParamSpec, Specs, trainable


class State(NamedTuple):
    """params, mu, nu: name -> fp32 DTensor (AdamW's moments carry the parameter's placements; what is frozen has none).
    Moments may be kept in less than fp32: `ftrain.moments`. step: updates done, a 0-dim int64 tensor. extra: what another
    optimizer keeps, kind -> name -> DTensor; mu and nu are empty then."""

    params: dict[str, DTensor]
    mu: dict[str, DTensor | Coded]
    nu: dict[str, DTensor | Coded]
    step: Tensor
    extra: dict[str, dict[str, DTensor]] = {}


def kept_by_optimizer(state: State) -> dict[str, dict[str, DTensor | Coded]]:
    """Kind -> name -> tensor."""
    return {"mu": state.mu, "nu": state.nu} if state.mu else dict(state.extra)


def place(piece: Tensor, shape: tuple[int, ...], placements: tuple[Placement, ...], mesh: DeviceMesh) -> DTensor:
    """This rank's piece of a tensor of `shape` -> the DTensor, without communication."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    return DTensor.from_local(
        piece, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides[: len(shape)])
    )


def own_slices(shape: tuple[int, ...], placements: tuple[Placement, ...], mesh: DeviceMesh) -> tuple[slice, ...]:
    """What this rank holds of a tensor of `shape`."""
    return shard_slices(shape, placements, mesh.shape, mesh.get_coordinate())


def _pieces(t: DTensor | Coded) -> tuple[list[int], Pieces, Group]:
    """The mesh dimensions that cut a tensor, its pieces, and the group of ranks that hold them."""
    mesh = t.device_mesh
    dims = [i for i, placement in enumerate(t.placements) if placement.is_shard() and mesh.shape[i] > 1]
    pieces = Pieces(t.shape, [t.placements[i].dim for i in dims], [mesh.shape[i] for i in dims])
    return dims, pieces, group_over(mesh, [mesh.mesh_dim_names[i] for i in dims])


def whole(t: DTensor | Coded) -> Tensor:
    """The full tensor in fp32, on every rank, by one all-gather. Every rank must call it."""
    _, pieces, group = _pieces(t)
    return pieces.assemble(all_gather(pieces.pad(read(t.to_local())), group))


def gather_to(t: DTensor | Coded, rank: int) -> Tensor | None:
    """The full tensor in fp32 on one rank (row-major over the mesh), None on the others. Every rank must call it.

    Each piece goes to that rank alone: an all-gather would send the model to every rank.
    """
    mesh = t.device_mesh
    there = coordinate(rank, mesh.shape)
    dims, pieces, group = _pieces(t)
    if any(mesh.get_coordinate()[i] != at for i, at in enumerate(there) if i not in dims):
        return None  # among these ranks are copies of the pieces, but not the one to receive them
    receiver = 0
    for i in dims:
        receiver = receiver * mesh.shape[i] + there[i]
    here = group.rank == receiver
    sent = [pieces.numel * (r == receiver) for r in range(group.size)]
    rows = all_to_all(pieces.pad(read(t.to_local().detach())), [pieces.numel * here] * group.size, sent, group)
    return pieces.assemble(rows.view(group.size, -1)) if here else None


def initial(name: str, spec: ParamSpec, seed: int) -> Tensor:
    """A parameter's initial value: of the seed and its name alone, so that it is the same on every mesh."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return spec.init(spec.shape, torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1))


def make_state(
    specs: Specs,
    placements: Placements,
    mesh: DeviceMesh,
    values: Callable[[str, ParamSpec, tuple[slice, ...]], Tensor],
    kept: str | Optimizer = "fp32",
) -> State:
    """A state at step 0. `values(name, spec, slices)` gives this rank's piece of each parameter.

    kept: how the moments are, one of `moments.KEPT` (ValueError for another); or the optimizer that keeps others.
    """
    device = torch.device(mesh.device_type)
    params = {}
    for name, spec in specs.items():
        slices = own_slices(spec.shape, placements[name], mesh)
        # clone: a contiguous piece of its own, not a view that keeps the whole tensor alive
        piece = values(name, spec, slices).to(device, torch.float32).clone(memory_format=torch.contiguous_format)
        params[name] = place(piece, spec.shape, placements[name], mesh)

    def zeros(which: int) -> dict[str, DTensor | Coded]:
        return {name: _zeros(params[name], dtypes(kept, spec.numel)[which]) for name, spec in trainable(specs).items()}

    step = torch.zeros((), dtype=torch.int64, device=device)
    if isinstance(kept, str):
        return State(params, zeros(0), zeros(1), step)
    local = {name: param.to_local() for name, param in params.items()}
    first, of = kept.init(specs, local, cut(placements, mesh.shape)), kept.kinds(specs)
    whole_everywhere = (Replicate(),) * mesh.ndim
    extra = {
        kind: {n: place(t, of[kind][n].shape, placements.get(n, whole_everywhere), mesh) for n, t in tensors.items()}
        for kind, tensors in first.items()
    }
    return State(params, {}, {}, step, extra)


def _zeros(param: DTensor, dtype: torch.dtype) -> DTensor | Coded:
    """A moment of a parameter, as it lies. Every rank has as many scales as the largest piece has blocks, so that
    they are evenly cut over the same mesh dimensions."""
    mesh, placements = param.device_mesh, param.placements
    kept = place(torch.zeros_like(param.to_local(), dtype=dtype), tuple(param.shape), placements, mesh)
    if dtype.is_floating_point:
        return kept
    first = shard_slices(param.shape, placements, mesh.shape, [0] * mesh.ndim)
    n = blocks(math.prod(s.stop - s.start for s in first))
    ranks = math.prod(size for size, p in zip(mesh.shape, placements) if p.is_shard())
    same = tuple(Shard(0) if p.is_shard() else p for p in placements)
    return Coded(kept, place(torch.zeros(n, device=param.to_local().device), (n * ranks,), same, mesh))


def init_state(specs: Specs, placements: Placements, mesh: DeviceMesh, seed: int, kept: str | Optimizer = "fp32") -> State:
    """Random initial parameters, the same on every mesh. Holds one whole parameter at a time. kept: as `make_state`."""
    return make_state(specs, placements, mesh, lambda name, spec, slices: initial(name, spec, seed)[slices], kept)

"""The collectives, as functions that trace into one graph. A group of one rank costs nothing."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

c10d = torch.ops._c10d_functional


class Group(NamedTuple):
    """A process group, by the name that the functional collectives know it by."""

    name: str
    size: int
    rank: int


def group_over(mesh: DeviceMesh, dims: Sequence[str]) -> Group:
    """The group of the ranks that differ from this one in `dims` only, ranked row-major over them.

    Every rank must ask for the same groups in the same order: new ones are created.
    """
    used = tuple(dim for dim, n in zip(mesh.mesh_dim_names, mesh.shape) if dim in dims and n > 1)
    if not used:
        return Group("", 1, 0)
    sub = mesh[used[0]] if len(used) == 1 else mesh[used]._flatten("_".join(used))
    return Group(sub.get_group().group_name, sub.size(), sub.get_local_rank())


def all_gather(x: Tensor, group: Group) -> Tensor:
    """[...] on each rank -> [ranks, ...]."""
    if group.size == 1:
        return x[None]
    flat = c10d.all_gather_into_tensor(x.reshape(-1), group.size, group.name)
    return c10d.wait_tensor(flat).view(group.size, *x.shape)


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """[ranks, ...] on each rank -> [...]: the sum over ranks of what they hold for this one."""
    if group.size == 1:
        return x[0]
    flat = c10d.reduce_scatter_tensor(x.reshape(-1), "sum", group.size, group.name)
    return c10d.wait_tensor(flat).view(x.shape[1:])


def all_reduce(x: Tensor, group: Group, op: str = "sum") -> Tensor:
    """The sum (or "max") over ranks, on every rank."""
    return x if group.size == 1 else c10d.wait_tensor(c10d.all_reduce(x.contiguous(), op, group.name))


class AllToAll(torch.autograd.Function):
    """Rows [sum(sent), ...] -> [sum(received), ...]: sent[r] rows go to rank r, received[r] come from it."""

    @staticmethod
    def forward(ctx, x: Tensor, received: list[int], sent: list[int], group: Group) -> Tensor:
        ctx.reverse = (sent, received, group)
        return _all_to_all(x, received, sent, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _all_to_all(grad, *ctx.reverse), None, None, None


def _all_to_all(x: Tensor, received: list[int], sent: list[int], group: Group) -> Tensor:
    return c10d.wait_tensor(c10d.all_to_all_single(x.contiguous(), received, sent, group.name))


def all_to_all(x: Tensor, received: list[int], sent: list[int], group: Group) -> Tensor:
    """Differentiable; see AllToAll."""
    return x if group.size == 1 else AllToAll.apply(x, received, sent, group)


def all_to_all_equal(x: Tensor, group: Group) -> Tensor:
    """[ranks, ...] -> [ranks, ...]: row r goes to rank r, row r of the result comes from it. Differentiable."""
    return all_to_all(x, [1] * group.size, [1] * group.size, group)

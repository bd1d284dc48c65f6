"""Experts stay on their `ep` rank, their matrices cut over `fsdp` and `sp`; all else is cut over all three."""

from torch.distributed.tensor import Shard


def fsdp_sp_ep(name, shape, mesh):
    if ".experts." in name:
        return [Shard(1), Shard(1), Shard(0)]
    return [Shard(0), Shard(0), Shard(0)]

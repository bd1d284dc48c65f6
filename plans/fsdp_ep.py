"""Experts stay on their `ep` rank, their matrices cut over `fsdp`; all else is cut over both."""

from torch.distributed.tensor import Replicate, Shard


def fsdp_ep(name, shape, mesh):
    if ".experts." in name:
        return [Shard(1), Replicate(), Shard(0)]
    return [Shard(0), Replicate(), Shard(0)]

"""Fully sharded over the ranks that share a sequence, too: parameters are cut over `fsdp` and `sp`."""

from torch.distributed.tensor import Replicate, Shard


def fsdp_sp(name, shape, mesh):
    return [Shard(0), Shard(0), Replicate()]

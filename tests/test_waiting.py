"""A rank that waits for another's long work outlives the time that collectives have."""

import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from ftrain import train


def waiting_rank(rank, folder):
    """The first rank tokenises for longer than any other collective may take."""
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=2))

    def prepare(*args):
        time.sleep(0 if rank else 4)
        return "data"

    train.prepare = prepare
    cfg, model = SimpleNamespace(data=None, seq_len=8), SimpleNamespace(cfg=SimpleNamespace(vocab=9))
    assert train._prepare_on_one(cfg, None, model, rank) == "data"
    dist.destroy_process_group()


@pytest.mark.slow
def test_tokenising_may_take_long(tmp_path):
    torch.multiprocessing.spawn(waiting_rank, (str(tmp_path),), nprocs=2)

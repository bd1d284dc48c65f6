"""Ranks that prepare the data together: who waits outlives the time that collectives have, and all have the same."""

import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from ftrain import train


def prepare_on(rank, folder, digests, seconds):
    """The first rank tokenises for longer than any other collective may take."""
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=10))

    def make():
        time.sleep(0 if rank else seconds)
        return SimpleNamespace(digest=digests[rank])

    try:
        data = train._same_on_all(make, rank)
        assert digests[0] == digests[1] == data.digest
    except ValueError as error:
        assert digests[0] != digests[1] and "the ranks read different text" in str(error)
    dist.destroy_process_group()


@pytest.mark.slow
def test_tokenising_may_take_long(tmp_path):
    torch.multiprocessing.spawn(prepare_on, (str(tmp_path), ("ab" * 16, "ab" * 16), 13), nprocs=2)


@pytest.mark.slow
def test_ranks_with_different_text_are_told(tmp_path):
    torch.multiprocessing.spawn(prepare_on, (str(tmp_path), ("ab" * 16, "cd" * 16), 0), nprocs=2)

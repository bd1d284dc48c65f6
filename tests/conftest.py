"""Fixtures of several files."""

import os

import pytest
import torch
import torch.distributed as dist

from ftrain import graph
from ftrain.program import Program

if "PYTEST_XDIST_WORKER" in os.environ:  # beside others: together they have one thread a core
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


@pytest.fixture
def one_thread():
    """Small tensors on many ranks: more threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def captures(monkeypatch):
    """The programs that are made from here on, of whatever function: one for each time that one is captured."""
    made = []
    monkeypatch.setattr(graph, "Program", lambda *args: made.append(Program(*args)) or made[-1])
    return made


@pytest.fixture
def one_rank():
    """A process group of this process alone: what compiles needs a real one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()

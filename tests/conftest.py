"""Fixtures of several files."""

import pytest
import torch
import torch.distributed as dist

from ftrain import graph
from ftrain.program import Program


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

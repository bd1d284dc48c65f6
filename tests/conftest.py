"""Fixtures of several files."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """Small tensors on many ranks: more threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

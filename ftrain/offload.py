"""What a layer leaves for its backward, kept on the host meanwhile.

It goes there while the layers after it compute, and begins to come back one region before it is wanted (schedule.py).
On a CPU both are copies: there is nothing to gain, but the same graph to test.
"""

from functools import cache

import torch
from torch import Tensor

from .transfer import copy_stream

_stream = cache(copy_stream)  # one for each device: what is copied out and what is copied back keep their order on it


def to_host(t: Tensor) -> Tensor:
    """Begin to copy a tensor to pinned memory."""
    stream = _stream(t.device)
    if stream is None:
        return t.clone()
    host = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, pin_memory=True)
    stream.wait_stream(torch.accelerator.current_stream(t.device))
    with stream:
        host.copy_(t, non_blocking=True)
    t.record_stream(stream)  # its memory is not another's before it is copied
    return host


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Begin to copy it back; `arrived` is for what computes with it."""
    stream = _stream(device)
    if stream is None:
        return host.clone()
    with stream:
        return torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=device).copy_(
            host, non_blocking=True
        )


def arrived(t: Tensor) -> Tensor:
    """The same tensor, for what is computed from here on: the device waits for it, not the host."""
    stream = _stream(t.device)
    if stream is not None:
        current = torch.accelerator.current_stream(t.device)
        current.wait_stream(stream)
        t.record_stream(current)
    return t

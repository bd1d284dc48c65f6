"""What passes between the host and its device, so that neither waits for the other.

Batches go there from pinned memory, on a stream of their own, while the device computes. Numbers come back in one
copy, which the host begins at once and waits for when it wants them, a step later. Where the device is the CPU,
nothing has to pass.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

ON_HOST = ".splits"  # how many rows ranks send each other: the host has to know, and need not ask the device

T = TypeVar("T")


class Sent(NamedTuple):
    """Microbatches on their way to the device. arrived: None where nothing is to be waited for."""

    batches: list[dict[str, Tensor]]
    arrived: torch.Event | None


def copy_stream(device: torch.device) -> torch.Stream | None:
    """A new stream to copy on; None where the device is no accelerator."""
    accelerator = torch.accelerator.current_accelerator()
    return torch.Stream(device) if accelerator and accelerator.type == device.type else None


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch there, but for the sizes that the host needs."""
    # In one order, whatever the batch was made of: the compiler would take another for another graph.
    return {
        name: t if name.endswith(ON_HOST) else t.to(device, non_blocking=True) for name, t in sorted(batch.items())
    }


def send(batches: Sequence[Mapping[str, Tensor]], device: torch.device, stream: torch.Stream | None) -> Sent:
    """Begin to copy microbatches to the device. Any thread may call it; `receive` is for the one that computes."""
    if stream is None:
        return Sent([to_device(batch, device) for batch in batches], None)
    with stream:
        # torch keeps pinned memory that is let go of until the copies from it, on this stream, are done.
        there = [to_device({name: t.pin_memory() for name, t in batch.items()}, device) for batch in batches]
        return Sent(there, stream.record_event())


def receive(sent: Sent) -> list[dict[str, Tensor]]:
    """The microbatches, for what is computed from here on: the device waits for them if it must, not the host."""
    if sent.arrived is not None:
        stream = torch.accelerator.current_stream()
        stream.wait_event(sent.arrived)
        for batch in sent.batches:
            for t in batch.values():
                if t.device.type != "cpu":
                    t.record_stream(stream)  # else the next batch could be copied over what is still read
    return sent.batches


def fetch(numbers: Mapping[str, Tensor]) -> Callable[[], tuple[dict[str, float], float]]:
    """Begin to copy 0-dim tensors to the host, all in one copy and in the type that holds all of theirs.

    -> a function that waits for it -> (the numbers, when they were there by time.perf_counter()).
    """
    packed = torch.stack([t.detach() for t in numbers.values()])
    names, host, copied, there = list(numbers), packed, None, time.perf_counter()
    if packed.device.type != "cpu":
        host = torch.empty_like(packed, device="cpu", pin_memory=True).copy_(packed, non_blocking=True)
        copied = torch.accelerator.current_stream().record_event()

    def wait() -> tuple[dict[str, float], float]:
        if copied is not None:
            copied.synchronize()
        at = there if copied is None else time.perf_counter()
        return dict(zip(names, map(float, host.tolist()), strict=True)), at

    return wait


def a_step_late(items: Iterable[T], at_once: Callable[[T], bool]) -> Iterator[T]:
    """Each item after the next one was made, or before, where `at_once` says so: what an item is the beginning of
    has had time to happen. An error in making the next one is raised after it."""
    waiting: list[T] = []
    try:
        for item in items:
            yield from waiting
            waiting = [] if at_once(item) else [item]
            if not waiting:
                yield item
    except Exception:
        yield from waiting
        raise
    yield from waiting

"""Flow matching along straight lines (arXiv 2210.02747, 2209.03003): data at time 0, noise at time 1, and a model that
gives the velocity from the one to the other."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

Time = TypeVar("Time", float, Tensor)


def between(data: Tensor, noise: Tensor, time: Time) -> Tensor:
    """The point at `time`; the velocity there is `noise - data`."""
    return (1 - time) * data + time * noise


def shifted(time: Time, shift: float) -> Time:
    """Times in [0, 1] moved towards noise (shift > 1), which large images need more of (arXiv 2403.03206, 5.3.2)."""
    return shift * time / (1 + (shift - 1) * time)


def schedule(steps: int, shift: float = 1.0) -> list[float]:
    """The `steps` + 1 times from noise (1) to data (0)."""
    return [shifted(1 - step / steps, shift) for step in range(steps + 1)]


def euler(velocity: Callable[[Tensor, float], Tensor], x: Tensor, times: Sequence[float]) -> Tensor:
    """Follows velocity(x, time) through the times, each step in a straight line."""
    for time, then in zip(times, times[1:]):
        x = x + (then - time) * velocity(x, time)
    return x

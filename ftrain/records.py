"""What a run leaves behind beside its checkpoints: run.json, metrics.jsonl and TensorBoard's events."""

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from .config import TrainConfig, to_json
from .disk import CHECKPOINTS, discard

CONFIG, METRICS, EVENTS = "run.json", "metrics.jsonl", "tensorboard"


class Sink(NamedTuple):
    """Another place for the numbers of a step: log(step, values) and close()."""

    log: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


class Records:
    """The open records of a run: `log` adds to all of them. Made by `open_records`."""

    def __init__(self, metrics: Path, sinks: Sequence[Sink]) -> None:
        self._path, self._sinks = metrics, sinks
        self._file = open(metrics, "a")  # noqa: SIM115

    def log(self, step: int, **values: Any) -> None:
        """Add one object: the step and its values (numbers, or lists of them; NaN and infinity become
        null in the file). The line is flushed when this returns. Raises OSError, naming the file."""
        line = json.dumps({"step": step} | {name: _finite(value) for name, value in values.items()})
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(f"{self._path} cannot be written: {error.strerror}") from error
        for sink in self._sinks:
            sink.log(step, {name: v for name, v in values.items() if isinstance(v, (int, float))})

    def close(self) -> None:
        self._file.close()
        for sink in self._sinks:
            sink.close()


def open_records(cfg: TrainConfig, resumed: int | None, warn: Callable[[str], None]) -> Records:
    """Open the records in cfg.out, for rank 0. `resumed` is the step that the run goes on from: what
    was recorded after it is dropped, so that no step appears twice; None starts them anew.

    Writes the configuration too. Warns where TensorBoard is missing.
    """
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    _replace(out / CONFIG, to_json(cfg))
    if resumed is None:
        (out / METRICS).unlink(missing_ok=True)
        _clear_events(out)
    else:
        truncate(out / METRICS, resumed)
    sinks = [tensorboard(out / EVENTS, resumed, warn)] + ([wandb(cfg)] if cfg.track == "wandb" else [])
    return Records(out / METRICS, [sink for sink in sinks if sink])


def changes(cfg: TrainConfig) -> list[str]:
    """Where `cfg` differs from the configuration that cfg.out was last run with, as `name old -> new`."""
    try:
        before = json.loads((Path(cfg.out) / CONFIG).read_text())
    except (OSError, ValueError):
        return []
    now = json.loads(to_json(cfg))
    return [f"{name} {before[name]} -> {now[name]}" for name in now if name in before and before[name] != now[name]]


def read(path: Path) -> list[dict]:
    """The objects of a metrics.jsonl; a last line torn by a crash is left out.
    Raises ValueError, naming the file and the line, for any other that is no JSON object with a step."""
    lines = Path(path).read_text().split("\n")
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            entry["step"]
        except (json.JSONDecodeError, TypeError, KeyError):
            if number == len(lines):  # what follows the last newline: nothing, or a torn line
                continue
            raise ValueError(f"{path}: line {number} is not a JSON object with a step") from None
        objects.append(entry)
    return objects


def truncate(path: Path, step: int) -> None:
    """Drop what a metrics.jsonl says of the steps after `step`."""
    if path.exists():
        _replace(path, "".join(json.dumps(entry) + "\n" for entry in read(path) if entry["step"] <= step))


def clear(out: str) -> None:
    """Delete what an earlier run left in its directory: its checkpoints and records, and nothing else."""
    for directory in (Path(out) / CHECKPOINTS).glob("step-*"):
        discard(directory, "overwritten")
    _clear_events(Path(out))
    for name in (METRICS, CONFIG):
        (Path(out) / name).unlink(missing_ok=True)


def _clear_events(out: Path) -> None:
    for path in (out / EVENTS).glob("events.out.tfevents.*"):
        path.unlink()


@contextmanager
def hold(out: str, rank: int, patience: float = 10.0) -> Iterator[None]:
    """Rank 0 holds the run directory: two runs would delete each other's checkpoints in the making, and
    mix their records. It is let go when the process ends, however it ends; `patience`, in seconds, is
    for one that is ending.

    Raises ValueError where another run holds it, and where it has records that no run of ours left.
    """
    if rank:
        yield
        return
    folder = Path(out)
    for name in (METRICS, EVENTS):
        if (folder / name).exists() and not (folder / CONFIG).exists():
            raise ValueError(f"--out {out} holds {name}, but no {CONFIG}: it is not a run's directory; give another")
    folder.mkdir(parents=True, exist_ok=True)
    handle, until = os.open(folder, os.O_RDONLY), time.monotonic() + patience
    try:
        with suppress(OSError):  # a file system without locks
            while not _locked(handle):
                if time.monotonic() > until:
                    raise ValueError(f"--out {out}: another run is writing there; wait for its end, or give another")
                time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def tensorboard(folder: Path, resumed: int | None, warn: Callable[[str], None]) -> Sink | None:
    """TensorBoard's events; on a resume the points after it are hidden. None, with a warning, where
    the package is missing."""
    try:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        warn(f"no TensorBoard events are written: {error}")
        return None
    writer = SummaryWriter(str(folder), purge_step=None if resumed is None else resumed + 1)

    def log(step: int, values: Mapping[str, float]) -> None:
        # One event of them all: a call of add_scalar for each takes several times as long.
        writer.file_writer.add_summary(
            Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()]), step
        )

    return Sink(log, writer.close)


def wandb(cfg: TrainConfig) -> Sink:
    """Weights & Biases, under the run directory's name. Raises ValueError where the package is missing."""
    try:
        import wandb
    except ImportError:
        raise ValueError("--track wandb: the package wandb is not installed (pip install wandb)") from None
    run = wandb.init(project="ftrain", name=Path(cfg.out).name, dir=cfg.out, config=json.loads(to_json(cfg)))
    return Sink(lambda step, values: run.log(dict(values), step=step), run.finish)


def _finite(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)

"""What rank 0 says while it trains: rich on a terminal, plain lines with the same words elsewhere."""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TextIO


class TensorSummary(NamedTuple):
    """How one tensor is spread: its whole shape, the plan's placements, and this rank's bytes."""

    name: str
    shape: tuple[int, ...]
    placements: str
    local_bytes: int


@dataclass(frozen=True)
class Console:
    """Where to print. `rich` is rich's Console on a terminal, None for plain lines.
    `on` is false on every rank but the first: then nothing is said."""

    on: bool
    stream: TextIO
    rich: Any = None
    alive_every: float = 10.0  # seconds between signs of life where nothing can spin

    def info(self, text: str) -> None:
        self._print(text)

    def warn(self, text: str) -> None:
        self._print(f"warning: {text}", "yellow")

    def header(self, *, model: str, plan: str, mesh: str, precision: str, total: int, active: int, local: int,
               largest: Sequence[TensorSummary], **more: str) -> None:  # fmt: skip
        """The run at a glance: parameters (elements) in all, used by one token, and on this rank; then
        how the largest tensors are sharded. `more` are further rows, by their names."""
        params = f"{si(total)} total, {si(active)} active, {si(local)} per rank"
        rows = {"model": model, "plan": plan, "mesh": mesh, "precision": precision, "parameters": params} | more
        self._table([], [(name.replace("_", " "), value) for name, value in rows.items()])
        self._table(
            ["largest tensors", "shape", "placements", "per rank"],
            [(s.name, " x ".join(map(str, s.shape)), s.placements, bytes_(s.local_bytes)) for s in largest],
        )

    def step(self, step: int, steps: int, *, loss: float | None, grad_norm: float, lr: float, tokens_per_s: float,
             mfu: float | None, peak_memory_bytes: int, eta_s: float, **more: str) -> None:  # fmt: skip
        """One line a step. loss: None of a model without one of this name. mfu is a fraction, or None where the
        machine's peak or the model's work is not known."""
        parts = [
            f"step {step:>{len(str(steps))}}/{steps}", *([] if loss is None else [f"loss {loss:.4f}"]), f"grad norm {grad_norm:.3f}",
            f"lr {lr:.2e}", f"{si(tokens_per_s)} tokens/s", f"mfu {'-' if mfu is None else f'{mfu:.1%}'}",
            f"peak memory {bytes_(peak_memory_bytes)}", f"eta {clock(eta_s)}",
        ]  # fmt: skip
        self._print("  ".join(parts + [f"{name.replace('_', ' ')} {value}" for name, value in more.items()]))

    @contextmanager
    def phase(self, what: str) -> Iterator[None]:
        """Something that takes a while: says that it began, that it goes on, and how long it took."""
        if not self.on:
            yield
            return
        start = time.monotonic()
        with self._alive(what, start):
            yield
        self._print(f"{what}: {time.monotonic() - start:.1f} s")

    @contextmanager
    def _alive(self, what: str, start: float) -> Iterator[None]:
        if self.rich:
            with self.rich.status(f"{what} ..."):
                yield
            return
        self._print(f"{what} ...")
        done = threading.Event()

        def tick() -> None:
            while not done.wait(self.alive_every):
                self._print(f"{what} ... {time.monotonic() - start:.0f} s")

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _print(self, text: str, style: str = "") -> None:
        if not self.on:
            return
        if self.rich:
            self.rich.print(text, style=style, markup=False, highlight=not style, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def _table(self, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if not self.on or not rows:
            return
        if self.rich:
            from rich.table import Table
            from rich.text import Text

            table = Table(*titles, show_header=bool(titles))
            for row in rows:
                table.add_row(*map(Text, row))
            self.rich.print(table)
            return
        lines = [titles, *rows] if titles else list(rows)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            self._print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def console(rank: int = 0, stream: TextIO | None = None) -> Console:
    """The console of this rank, on stdout: silent unless it is the first."""
    stream = stream or sys.stdout
    if rank or not stream.isatty():
        return Console(on=rank == 0, stream=stream)
    from rich.console import Console as Rich

    return Console(on=True, stream=stream, rich=Rich(file=stream))


def si(value: float) -> str:
    """Three digits and a letter: 12345678 -> 12.3M."""
    for unit in ("", "K", "M", "B"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def bytes_(value: float) -> str:
    """Binary units: 1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 3725 -> 1:02:05."""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}"

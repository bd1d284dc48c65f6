"""A folder of things that are slow to make, each named by a hash of what it was made from."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar


def cache_root() -> Path:
    """The user's cache folder for ftrain: $XDG_CACHE_HOME/ftrain, else ~/.cache/ftrain."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ftrain"


def content_hash(*parts: str | bytes) -> str:
    """32 hex digits that change with any part, and with where one part ends and the next begins."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()[:32]


T = TypeVar("T")


def cached(
    root: Path, name: str, make: Callable[[], T], store: Callable[[T, Path], None], load: Callable[[Path], T]
) -> T:
    """`load(root/name)`; where that fails, `store(make(), root/name)` comes first.

    Processes that want the same entry wait for the one that makes it, and an entry appears
    whole or not at all. A damaged entry is made again.
    Raises OSError, naming the folder, when it cannot be written.
    """
    root = Path(root)
    entry = root / name

    def hit():
        try:
            return load(entry)
        except Exception:  # absent, truncated, from another version: all mean "make it again"
            return None

    found = hit()
    if found is not None:
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / f"{name}.lock", "w")
    except OSError as error:
        raise _unwritable(root, error) from error
    with lock:
        with suppress(OSError):  # a file system without locks costs double work, no more
            fcntl.flock(lock, fcntl.LOCK_EX)
        found = hit()
        if found is not None:
            return found
        value = make()
        try:
            _publish(value, store, entry, lambda: hit() is not None)
        except OSError as error:
            raise _unwritable(root, error) from error
    return load(entry)


def _publish(value, store, entry: Path, whole: Callable[[], bool]) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", dir=entry.parent))
    try:
        store(value, partial)
        try:
            partial.rename(entry)
        except OSError:  # there is one already: another process was faster, or it is damaged
            if not whole():
                shutil.rmtree(entry)
                partial.rename(entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unwritable(root: Path, error: OSError) -> OSError:
    return OSError(
        f"cache folder {root}: {error.strerror or error}; set XDG_CACHE_HOME to a folder that can be written"
    )

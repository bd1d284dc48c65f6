"""Directories that are there whole or not at all: manifests of checksums, syncing, renaming into place."""

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

CHECKPOINTS = "checkpoints"  # the folder of a run directory that holds step-N, ...
TRAIN_STATE = "train_state"  # the folder of a step-N that holds all but the model
MANIFEST = f"{TRAIN_STATE}/manifest.json"
CHUNK = 1 << 24  # bytes that are written, or read for a checksum, at a time

Checks = Mapping[str, tuple[int, int]]  # path in the directory -> (size in bytes, crc32)


class Corrupt(ValueError):
    """A checkpoint that is not as it was written; the message names the file."""


def write_json(path: Path, content: Mapping) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises FileNotFoundError or ValueError, naming the file, where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a JSON {type(content).__name__}, but must hold an object")
    return content


def file_crc(path: Path) -> int:
    """The crc32 of a file's content."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def write_manifest(path: Path, checks: Checks) -> None:
    write_json(path, {"files": {name: list(check) for name, check in checks.items()}, "crc32": _own_crc(checks)})


def read_manifest(path: Path) -> dict[str, tuple[int, int]]:
    """Raises Corrupt naming the manifest if it is missing or not as it was written."""
    try:
        content = read_json(path)
        checks = {name: (int(size), int(crc)) for name, (size, crc) in content["files"].items()}
        whole = content["crc32"] == _own_crc(checks)
    except FileNotFoundError as error:
        raise Corrupt(str(error)) from None
    except (KeyError, TypeError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise Corrupt(f"{path} is truncated or corrupt")
    return checks


def _own_crc(checks: Checks) -> int:
    return zlib.crc32(repr(sorted((name, *check) for name, check in checks.items())).encode())


def verify(directory: Path, checks: Checks, names: Iterable[str]) -> None:
    """Raises Corrupt naming the first of the files that is missing, truncated or changed."""
    for name in names:
        path, (size, crc) = directory / name, checks[name]
        try:
            found = path.stat().st_size
            if found != size:
                raise Corrupt(f"{path} is truncated or corrupt: it has {found} bytes, {size} were written")
            if file_crc(path) != crc:
                raise Corrupt(f"{path} is corrupt: its checksum is not that of what was written")
        except FileNotFoundError:
            raise Corrupt(f"{path} is missing") from None
        except OSError as error:
            raise Corrupt(f"{path} cannot be read: {error.strerror}") from error


def sync_tree(directory: Path) -> None:
    """Returns when everything in the directory is on disk."""
    for folder, _, names in os.walk(directory, topdown=False):
        for path in (*(os.path.join(folder, name) for name in names), folder):
            _sync(path)


def _sync(path: str | os.PathLike) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def step_of(directory: Path) -> int | None:
    """N of a directory named step-N, None of another."""
    match = re.fullmatch(r"step-(\d+)", directory.name)
    return int(match[1]) if match else None


def latest(out: str | os.PathLike) -> list[Path]:
    """The checkpoints of a run directory, newest first. Their names are given to whole directories only."""
    found = (Path(out) / CHECKPOINTS).glob("step-*")
    return sorted((path for path in found if path.is_dir() and step_of(path) is not None), key=step_of, reverse=True)


def instead_of(directory: str | os.PathLike) -> str:
    """'; it is a run directory: give CHECKPOINT', the newest, or nothing: for errors about a missing model."""
    found = latest(directory)
    return f"; it is a run directory: give {found[0]}" if found else ""


# Names while things are in the making, for a directory step-5: step-5.tmp-TOKEN is not whole yet,
# or no longer wanted; step-5.old-TOKEN is whole, and makes room for its successor.


def swap_in(tmp: Path, target: Path) -> None:
    """Sync the directory TARGET.tmp-TOKEN and rename it to TARGET, in the place of an older one."""
    sync_tree(tmp)
    old = tmp.with_name(tmp.name.replace(".tmp-", ".old-"))
    if target.exists():
        target.rename(old)
    tmp.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def discard(directory: Path, token: str) -> None:
    """Remove a directory, which is out of sight before it is incomplete."""
    shutil.rmtree(directory.rename(directory.with_name(f"{directory.name}.tmp-{token}")), ignore_errors=True)


def tidy(parent: Path) -> None:
    """Remove what interrupted saves left in a directory of checkpoints, and bring back what they had put aside."""
    for old in parent.glob("step-*.old-*"):
        target = old.with_name(old.name.rpartition(".old-")[0])
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)
    for unfinished in parent.glob("step-*.tmp-*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def no_room(target: Path, needed: int, error: Exception) -> str:
    """The sentence for an error while writing `needed` bytes to `target`."""
    try:
        free = f", {_gigabytes(shutil.disk_usage(target.parent).free)} are free"
    except OSError:
        free = ""
    reason = getattr(error, "strerror", None) or error
    return f"cannot write {target}: {reason} (it needs {_gigabytes(needed)}{free})"


def _gigabytes(n: int) -> str:
    return f"{n / 1e9:.3g} GB" if n >= 1e8 else f"{n / 1e6:.3g} MB"

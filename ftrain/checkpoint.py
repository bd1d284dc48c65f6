"""Checkpoints: a Hugging Face directory with the rest of the train state beside it, all safetensors and JSON.

    OUT/checkpoints/step-N/
        config.json, tokenizer files, model-*.safetensors, model.safetensors.index.json
        train_state/mu-*.safetensors, nu-*.safetensors and their indices; of optax, optax*-*.safetensors
        train_state/train_state.json    step, data position, random state and what the caller adds
        train_state/manifest.json       size and crc32 of every file that `restore` reads

Files hold whole tensors, in fp32, so that any mesh reads what any other wrote, however it kept its moments: each
rank reads its slices. A directory is written under another name and renamed when it is whole and on disk.
"""

import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from . import __version__
from .collectives import Group, all_gather, all_reduce, group_over
from .disk import (
    CHECKPOINTS, MANIFEST, TRAIN_STATE, Corrupt, discard, file_crc, latest, no_room, read_json, read_manifest, step_of,
    swap_in, tidy, verify, write_json, write_manifest,
)  # fmt: skip
from .layout import Placements
from .model import Model
from .moments import write_
from .optim import Optimizer
from .pretrained import FILE_BYTES, hf_config
from .safetensors_io import INDEX, Layout, make_header, make_index, read_values, stem_for, write_file
from .specs import ParamSpec, Specs, stored, to_stored, trainable, zeros
from .state import State, gather_to, kept_by_optimizer, make_state, own_slices

_MESSAGE = 2048  # bytes of an error message sent to the other ranks

T = TypeVar("T")


# --- Agreement of ranks: without it, one rank's failure would leave the others waiting.


def _all_ranks(mesh: DeviceMesh) -> Group:
    return group_over(mesh, mesh.mesh_dim_names)


def sum_over_ranks(mesh: DeviceMesh, numbers: list[int]) -> list[int]:
    """The sums over all ranks, on every rank."""
    return all_reduce(torch.tensor(numbers, dtype=torch.int64, device=mesh.device_type), _all_ranks(mesh)).tolist()


def all_or_none(
    mesh: DeviceMesh, act: Callable[[], T], failure: type[Exception], message: Callable[[Exception], str] = str
) -> T:
    """`act()` on every rank: all succeed, or all raise `failure`. Returns when all are done.

    message: the text of a failure. A rank that failed raises its own, the others the first failed rank's.
    """
    result, error, text = None, None, b""
    try:
        result = act()
    except Exception as caught:
        error, text = caught, message(caught).encode()
    mine = torch.tensor(list(text[:_MESSAGE].ljust(_MESSAGE, b"\0")), dtype=torch.uint8, device=mesh.device_type)
    texts = all_gather(mine, _all_ranks(mesh)).cpu()
    if error is not None:
        raise failure(text.decode()) from error
    for row in texts[texts[:, 0] > 0][:1]:
        raise failure(bytes(row.tolist()).rstrip(b"\0").decode(errors="replace"))
    return result


# --- Saving


class File(NamedTuple):
    """A file of a checkpoint, the rank that writes it, and the parameters that it holds."""

    path: str
    kind: str
    rank: int
    specs: dict[str, ParamSpec]

    @property
    def layout(self) -> Layout:
        return {name: (torch.float32, shape) for name, shape in stored(self.specs).items()}


def kinds(specs: Specs, kept: str | Optimizer = "fp32") -> dict[str, dict[str, ParamSpec]]:
    """What a checkpoint holds: the parameters in Hugging Face's names, what the optimizer keeps in our own, experts
    stacked. kept: as of `make_state`."""
    if not isinstance(kept, str):
        return {"model": dict(specs)} | {kind: dict(of) for kind, of in kept.kinds(specs).items()}
    stacked = {name: replace(spec, parts=(), within=None) for name, spec in trainable(specs).items()}
    return {"model": dict(specs), "mu": stacked, "nu": stacked}


def kinds_of(state: State, specs: Specs) -> dict[str, dict[str, ParamSpec]]:
    """`kinds`, of what a state has."""
    return {"model": dict(specs)} | {
        kind: {name: ParamSpec(tuple(t.shape), zeros) for name, t in of.items()}
        for kind, of in kept_by_optimizer(state).items()
    }


def share_out(
    of_kinds: Mapping[str, Specs], ranks: int, file_bytes: int = FILE_BYTES, stem: str = "model"
) -> list[File]:  # fmt: skip
    """The files of a checkpoint. Of each kind of tensor every rank writes about as many bytes,
    neighbours in the model together."""
    files = []
    for kind, of_kind in of_kinds.items():
        total, before, size = sum(spec.numel for spec in of_kind.values()), 0, 0
        groups: list[tuple[int, dict[str, ParamSpec]]] = []
        for name, spec in of_kind.items():
            rank = (2 * before + spec.numel) * ranks // (2 * total)  # the share that its middle falls in
            before += spec.numel
            size += 4 * spec.numel
            shared = spec.within and groups and spec.within.name in stored(groups[-1][1])  # a tensor is in one file
            if not groups or not shared and (groups[-1][0] != rank or size > file_bytes):
                groups.append((rank, {}))
                size = 4 * spec.numel
            groups[-1][1][name] = spec
        folder = "" if kind == "model" else f"{TRAIN_STATE}/"
        files += [
            File(f"{folder}{stem if kind == 'model' else kind}-{i:05d}-of-{len(groups):05d}.safetensors", kind, rank, members)
            for i, (rank, members) in enumerate(groups, 1)
        ]
    return files


def save(
    out: str | os.PathLike, state: State, model: Model, meta: Mapping[str, Any],
    tokenizer: Callable[[Path], None] | None = None, *,
    keep: int = 0, file_bytes: int = FILE_BYTES,
) -> Path:  # fmt: skip
    """Write OUT/checkpoints/step-N, visible when it is whole; every rank calls it and writes its share.

    meta: what else `restore` shall return, JSON. tokenizer: writes a tokenizer's files into a directory.
    keep: so many checkpoints are left, this one and the ones before it; 0 leaves all.
    file_bytes: about the size of a file. A rank holds a few whole tensors at a time.
    Raises OSError, on every rank, naming the directory and the space needed; what was there stays.
    """
    mesh = next(iter(state.params.values())).device_mesh
    rank, ranks = _all_ranks(mesh).rank, _all_ranks(mesh).size
    step = int(state.step)
    directory = Path(out) / CHECKPOINTS
    stem = stem_for(model.hf)
    of_kinds = kinds_of(state, model.specs)
    files = share_out(of_kinds, ranks, file_bytes, stem)
    sizes = {file.path: make_header(file.layout)[1] for file in files}
    token = sum_over_ranks(mesh, [secrets.randbits(32) if rank == 0 else 0])[0]
    tmp, target = (directory / f"step-{step}{suffix}" for suffix in (f".tmp-{token:08x}", ""))

    def prepare() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        tidy(directory)
        (tmp / TRAIN_STATE).mkdir(parents=True)

    def publish() -> None:
        write_json(tmp / "config.json", hf_config(model.hf, torch.float32))
        if tokenizer is not None:
            tokenizer(tmp)
        for kind in of_kinds:
            of_kind = [tmp / file.path for file in files if file.kind == kind]
            layouts = {Path(file.path).name: file.layout for file in files if file.kind == kind}
            index = f"{stem if kind == 'model' else kind}{INDEX}"
            write_json(of_kind[0].with_name(index), make_index(layouts))
        of_job = {"step": step, "model_type": model.family, "ftrain": __version__, "rng": get_rng()}
        write_json(tmp / TRAIN_STATE / "train_state.json", {**meta, **of_job})
        checks = {file.path: (sizes[file.path], crc) for file, crc in zip(files, crcs, strict=True)}
        for path in [*tmp.glob("*.index.json"), *(tmp / TRAIN_STATE).glob("*.json")]:
            checks[str(path.relative_to(tmp))] = (path.stat().st_size, file_crc(path))
        write_manifest(tmp / MANIFEST, checks)
        swap_in(tmp, target)

    def message(error: Exception) -> str:
        return no_room(target, sum(sizes.values()), error)

    def first_rank(act: Callable[[], None]) -> None:
        all_or_none(mesh, act if rank == 0 else lambda: None, OSError, message)

    try:
        first_rank(prepare)
        own = all_or_none(mesh, lambda: write_share(tmp, state, files, rank), OSError, message)
        crcs = sum_over_ranks(mesh, [own.get(file.path, 0) for file in files])
        first_rank(publish)
    except BaseException:
        if rank == 0:
            tidy(directory)
        raise
    if rank == 0 and keep:
        for older in [path for path in latest(out) if step_of(path) < step][keep - 1 :]:
            discard(older, f"{token:08x}")
    return target


def write_share(tmp: Path, state: State, files: list[File], rank: int) -> dict[str, int]:
    """Gather every tensor, one after the other, and write those of this rank's files: path -> crc32.

    The order of the gathers goes round the ranks, and a thread writes, so that all ranks write at once.
    """
    arrived: Queue[Tensor | None] = Queue(maxsize=1)

    def arriving() -> Iterator[Tensor]:
        while (tensor := arrived.get()) is not None:
            yield tensor

    def write() -> dict[str, int]:
        tensors = arriving()

        try:
            mine = [file for file in files if file.rank == rank]
            return {f.path: write_file(tmp / f.path, f.layout, to_stored(f.specs, tensors)) for f in mine}
        finally:
            for _ in tensors:  # after a failure the gathers go on, since other ranks take part in them
                pass

    held = {"model": state.params, **kept_by_optimizer(state)}
    turns: dict[int, list[tuple[File, str]]] = {}
    for file in files:
        turns.setdefault(file.rank, []).extend((file, name) for name in file.specs)
    order = [turn for turns_of_all in zip_longest(*turns.values()) for turn in turns_of_all if turn]
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(write)
        try:
            for file, name in order:
                full = gather_to(held[file.kind][name], file.rank)
                if full is not None:
                    arrived.put(full.detach().cpu())
                del full
        finally:
            arrived.put(None)
        return written.result()


# --- Restoring


def restore(
    directory: str | os.PathLike, specs: Specs, placements: Placements, mesh: DeviceMesh, kept: str | Optimizer = "fp32"
) -> tuple[State, dict[str, Any]]:
    """A checkpoint -> the state, bit by bit, on any mesh, and the meta that was saved with it.

    kept: how its moments are to be, as of `make_state`. In less than fp32, they are rounded to the nearest: bit by bit
    are then those that were kept so before, in 8 bits in the same pieces.
    The ranks check all files together, then each reads its slices. Every rank must call it.
    Raises on every rank: Corrupt naming a file that is not as it was written; ValueError
    naming tensors that are missing, extra or mis-shaped for `specs`.
    """
    directory = Path(directory)
    rank, ranks = _all_ranks(mesh).rank, _all_ranks(mesh).size
    checks = all_or_none(mesh, lambda: read_manifest(directory / MANIFEST), Corrupt)
    mine = sorted(checks, key=lambda name: (-checks[name][0], name))[rank::ranks]
    all_or_none(mesh, lambda: verify(directory, checks, mine), Corrupt)

    def read() -> tuple[State, dict[str, Any]]:
        of_kinds = kinds(specs, kept)
        wanted = of_kinds.keys() - {"model"}
        there = {path.name.removesuffix(INDEX) for path in (directory / TRAIN_STATE).glob(f"*{INDEX}")}
        if there != wanted:
            raise ValueError(
                f"{directory} holds {', '.join(sorted(there)) or 'nothing'} of its optimizer, not "
                f"{', '.join(sorted(wanted)) or 'nothing'}: another --optimizer wrote it; go on with "
                f"that, or begin a new run with its weights (--init {directory} and another --out)"
            )
        values = {
            kind: read_values(directory if kind == "model" else directory / TRAIN_STATE, of_kind, kind)
            for kind, of_kind in of_kinds.items()
        }
        meta = read_json(directory / TRAIN_STATE / "train_state.json")
        state = make_state(specs, placements, mesh, values["model"], kept)
        for kind, moments in kept_by_optimizer(state).items():
            for name, moment in moments.items():
                spec = of_kinds[kind][name]
                piece = values[kind](name, spec, own_slices(spec.shape, moment.placements, mesh))
                write_(moment.to_local(), piece)
        state.step.fill_(meta["step"])
        return state, meta

    return all_or_none(mesh, read, ValueError)


def resume(
    out: str | os.PathLike, specs: Specs, placements: Placements, mesh: DeviceMesh, kept: str | Optimizer = "fp32",
    warn: Callable[[str], None] = warnings.warn,
) -> tuple[State, dict[str, Any], Path]:  # fmt: skip
    """The newest whole checkpoint of a run directory: (state, meta, its directory); random states are set.

    kept: as of `restore`. A corrupt one is skipped, with a warning on every rank, and the one before is tried.
    Raises FileNotFoundError where there is none, Corrupt where none is whole; else as `restore`.
    """
    rank = _all_ranks(mesh).rank
    all_or_none(mesh, lambda: tidy(Path(out) / CHECKPOINTS) if rank == 0 else None, OSError)
    found = latest(out)
    if not found:
        raise FileNotFoundError(f"{out} holds no checkpoint (checkpoints/step-N)")
    for directory in found:
        try:
            state, meta = restore(directory, specs, placements, mesh, kept)
        except Corrupt as error:
            if directory == found[-1]:
                raise Corrupt(f"{error}; no whole checkpoint is left in {found[0].parent}") from error
            warn(f"{error}; going back to the checkpoint before")
        else:
            set_rng(meta["rng"])
            return state, meta, directory


def get_rng() -> dict[str, str]:
    """The states of torch's random generators, by device, as hexadecimal digits."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: bytes(state.tolist()).hex() for device, state in states.items()}


def set_rng(states: Mapping[str, str]) -> None:
    """Put torch's random generators into the states of `get_rng`, on this machine's devices."""
    for device, digits in states.items():
        state = torch.frombuffer(bytearray.fromhex(digits), dtype=torch.uint8)
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state)

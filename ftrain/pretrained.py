"""Hugging Face directories: published weights in, plain directories out."""

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .disk import MANIFEST, no_room, read_json, read_manifest, swap_in, verify, write_json
from .layout import Placements
from .model import Model, find_model
from .optim import Optimizer
from .safetensors_io import (
    DTYPES, INDEX, Entry, Layout, check_names, make_header, make_index, read_index, read_values, stem_for, values_from, write_file,
)  # fmt: skip
from .specs import ParamSpec, stored
from .state import State, initial, make_state

FILE_BYTES = 4 << 30  # a file is ended before the tensor that would make it larger
_FLOATS = {
    "fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16,
}  # fmt: skip


def load_pretrained(directory: str | os.PathLike) -> tuple[Model, dict[str, Tensor]]:
    """A Hugging Face directory on one device, in the files' dtype; experts stacked along dimension 0.

    Tensors may be views of the mapped files: memory is used as they are read.
    Raises FileNotFoundError for what is no such directory, and ValueError naming missing, extra or mis-shaped tensors
    or a corrupt file.
    """
    if not os.path.isdir(directory):  # also of a preset's name, which has no weights
        raise FileNotFoundError(f"{directory} is not a directory: weights are read from a Hugging Face directory")
    model = find_model(Path(directory))
    values = read_values(directory, model.specs, ignored=model.ignored)
    everything = {name: tuple(slice(0, n) for n in spec.shape) for name, spec in model.specs.items()}
    return model, {name: values(name, model.specs[name], slices) for name, slices in everything.items()}


def init_from(
    directory: str | os.PathLike, model: Model, placements: Placements, mesh: DeviceMesh, kept: str | Optimizer = "fp32"
) -> State:
    """A state at step 0 with a directory's weights; each rank reads its own slices. kept: as `make_state`.

    Raises ValueError naming missing, extra or mis-shaped tensors, or a corrupt file.
    """
    return make_state(model.specs, placements, mesh, read_values(directory, model.specs, ignored=model.ignored), kept)


def init_from_sources(
    model: Model, placements: Placements, mesh: DeviceMesh, seed: int, kept: str | Optimizer = "fp32"
) -> State:
    """A state at step 0: the parameters of `model.sources` with the weights of their directories, the others random.
    kept: as `make_state`.

    Raises ValueError naming missing or mis-shaped tensors, or a corrupt file.
    """
    of_directory: dict[str, dict[str, ParamSpec]] = {}
    for name, (directory, there) in model.sources.items():
        spec = model.specs[name]
        parts = tuple(there.removesuffix(name) + part for part in spec.parts) if there.endswith(name) else spec.parts
        of_directory.setdefault(directory, {})[there] = replace(spec, parts=parts)
    read = {}
    for directory, specs in of_directory.items():
        wanted = stored(specs)
        entries = {name: entry for name, entry in read_index(directory).items() if name in wanted}
        check_names(entries, specs, Path(directory))
        read[directory] = values_from(entries)

    def value(name: str, spec: ParamSpec, slices: tuple[slice, ...]) -> Tensor:
        if name not in model.sources:
            return initial(name, spec, seed)[slices]
        directory, there = model.sources[name]
        return read[directory](there, of_directory[directory][there], slices)

    return make_state(model.specs, placements, mesh, value, kept)


def hf_config(hf: Mapping, dtype: torch.dtype | None) -> dict:
    """The content of `config.json` beside weights of this dtype (None: as they were)."""
    if "_class_name" in hf:  # diffusers' configs say neither dtype nor architecture
        return dict(hf)
    named = {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
    if "torch_dtype" in hf and named:  # the name that transformers had for it before
        named["torch_dtype"] = named["dtype"]
    if not hf.get("architectures"):
        from transformers.models.auto import modeling_auto as auto

        classes = {**auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, **auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
        if hf["model_type"] in classes:
            named["architectures"] = [classes[hf["model_type"]]]
    return {**hf, **named}


def export(
    source: str | os.PathLike, dest: str | os.PathLike, dtype: str | torch.dtype | None = None, *,
    file_bytes: int = FILE_BYTES,
) -> Path:  # fmt: skip
    """Write a checkpoint's model (or any Hugging Face directory) to `dest`: config, weights, tokenizer.

    dtype: fp32, bf16, fp16 or a torch dtype; None keeps each tensor's. Holds one tensor at a time.
    Raises ValueError for an unknown dtype or a `dest` that is not empty, and, naming the file,
    for a corrupt source; OSError naming `dest` and the space needed.
    """
    source, dest = Path(source), Path(os.path.abspath(dest))
    if isinstance(dtype, str):
        if dtype not in _FLOATS:
            raise ValueError(f"dtype {dtype!r}: valid are {', '.join(_FLOATS)}")
        dtype = _FLOATS[dtype]
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise ValueError(f"{dest} exists and is not an empty directory: export writes a new one")
    manifest = source / MANIFEST
    if manifest.is_file():
        checks = read_manifest(manifest)
        verify(source, checks, [name for name in checks if "/" not in name])
    entries = read_index(source)
    config = hf_config(read_json(source / "config.json"), dtype)
    stem = stem_for(config)
    files = _files(entries, dtype, file_bytes, stem)
    needed = sum(make_header(layout)[1] for layout in files.values())
    tmp = dest.with_name(f"{dest.name}.tmp-{secrets.token_hex(4)}")
    try:
        tmp.mkdir(parents=True)
        for file, layout in files.items():
            write_file(tmp / file, layout, _read_all(entries, layout))
        write_json(tmp / f"{stem}{INDEX}", make_index(files))
        for path in source.iterdir():  # tokenizer, generation config, chat template
            known = path.suffix in (".json", ".txt", ".model", ".jinja") and not path.name.endswith(".index.json")
            if path.is_file() and known and path.name != "config.json":
                shutil.copyfile(path, tmp / path.name)
        write_json(tmp / "config.json", config)
        if dest.exists():
            dest.rmdir()
        swap_in(tmp, dest)
    except OSError as error:
        raise OSError(no_room(dest, needed, error)) from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return dest


def _files(entries: Mapping[str, Entry], dtype: torch.dtype | None, file_bytes: int, stem: str) -> dict[str, Layout]:
    """The files to write: the source's tensors in the source's order, the larger elements of a file first."""
    groups: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = []
    size = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].file, item[0])):
        if entry.dtype not in DTYPES:
            raise ValueError(f"{entry.file}: {name} is {entry.dtype}, but weights are {', '.join(DTYPES)}")
        kind = dtype or DTYPES[entry.dtype]
        nbytes = prod(entry.shape) * kind.itemsize
        size += nbytes
        if not groups or size > file_bytes:
            groups.append({})
            size = nbytes
        groups[-1][name] = (kind, entry.shape)
    groups = [dict(sorted(group.items(), key=lambda item: -item[1][0].itemsize)) for group in groups]  # aligned
    return {f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _read_all(entries: Mapping[str, Entry], names: Iterable[str]) -> Iterator[Tensor]:
    values = values_from(entries)
    for name in names:
        shape = entries[name].shape
        yield values(name, ParamSpec(shape, torch.empty), tuple(slice(0, n) for n in shape))

"""safetensors directories: headers checked, slices read lazily, files written as tensors arrive.

The format (huggingface.co/docs/safetensors): 8 bytes of header length, a JSON header with each
tensor's dtype, shape and place, the tensors' bytes. Nothing here can run code from a file.
"""

import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .disk import CHUNK, instead_of
from .specs import ParamSpec, Specs, Within, stored

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
STEMS = ("model", "diffusion_pytorch_model")  # the weights' files, as transformers and diffusers name them
_ALL, _FEW = 20, 3  # an error names so many tensors in all, or of each kind so few and counts the rest
_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.\d+\.(?P<projection>gate|up|down)_proj\.weight")

Slices = tuple[slice, ...]
INDEX = ".safetensors.index.json"  # how the name of a checkpoint's index ends
Values = Callable[[str, ParamSpec, Slices], Tensor]
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # a file's tensors, in the file's order


class Entry(NamedTuple):
    """A tensor in a file; dtype is safetensors' name of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file, by name, from its header alone.

    Raises ValueError naming a file that is truncated, corrupt or not safetensors, and
    FileNotFoundError naming one that is not there.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((info["data_offsets"][1] for info in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"its header describes {8 + length + end} bytes, the file has {size}")
        return {name: Entry(path, info["dtype"], tuple(info["shape"])) for name, info in header.items()}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist, but belongs to the checkpoint") from None
    except (ValueError, struct.error, AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is truncated, corrupt or not a safetensors file ({error})") from error


def read_index(directory: Path, kind: str = "model") -> dict[str, Entry]:
    """Every tensor of a directory: of `KIND.safetensors.index.json`, else `KIND.safetensors`, else all *.safetensors.
    The model's may also be named as diffusers does.

    Raises as read_header does, and FileNotFoundError for a directory without safetensors files.
    """
    directory = Path(directory)
    for stem in STEMS if kind in STEMS else (kind,):
        index, single = directory / f"{stem}{INDEX}", directory / f"{stem}.safetensors"
        if index.is_file():
            return _of_index(index)
        if single.is_file():
            return read_header(single)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory} is not a directory")
        what = instead_of(directory) or ": only safetensors weights are read"
        raise FileNotFoundError(f"{directory} holds no *.safetensors files{what}")
    return {name: entry for file in files for name, entry in read_header(file).items()}


def _of_index(index: Path) -> dict[str, Entry]:
    try:
        where = {str(name): str(file) for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files ({error!r})") from error
    headers = {file: read_header(index.parent / file) for file in sorted(set(where.values()))}
    return {name: headers[file][name] for name, file in where.items() if name in headers[file]}


def stem_for(hf: Mapping) -> str:
    """What the weight files beside this config are called."""
    return STEMS[1] if "_class_name" in hf else STEMS[0]


def _within(spec: ParamSpec) -> Within | None:
    """Where a parameter may be that is not alone: as its spec says; of experts that the checkpoint usually keeps apart,
    where transformers 5 keeps them when it does not take them apart."""
    match = _EXPERT.fullmatch(spec.parts[0]) if spec.parts else None
    if match is None:
        return spec.within
    rows = spec.shape[1]
    if match["projection"] == "down":
        return Within(f"{match['experts']}.down_proj", rows)
    return Within(f"{match['experts']}.gate_up_proj", 2 * rows, rows if match["projection"] == "up" else 0)


def check_names(entries: Mapping[str, Entry], specs: Specs, where: object, ignored: tuple[str, ...] = ()) -> None:
    """Raises one ValueError that counts missing, extra, mis-shaped and mis-typed tensors, and names them.

    All of them where they are few, the first of each kind where they are many.

    Not extra: the output matrix of a model that ties it to the embedding, and the rotary
    frequencies that old checkpoints hold; both are computed. Nor what begins with one of `ignored`.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    for name, spec in specs.items():
        within = _within(spec)
        if within and within.name in entries:
            shapes, found = within.shapes(spec), entries[within.name].shape
            wanted[within.name] = found if found in shapes else shapes[0]
        else:
            wanted |= stored({name: spec})
    computed = {"lm_head.weight"} | {name for name in entries if name.endswith("rotary_emb.inv_freq")}
    both = [name for name in wanted if name in entries]
    problems = {
        "missing": [f"{name} {list(shape)}" for name, shape in wanted.items() if name not in entries],
        "extra": [n for n in entries if n not in wanted and n not in computed and not n.startswith(ignored)],
        "mis-shaped": [
            f"{name} is {list(entries[name].shape)} instead of {list(wanted[name])}"
            for name in both
            if entries[name].shape != tuple(wanted[name])
        ],
        "of another type": [
            f"{name} is {entries[name].dtype} instead of {', '.join(DTYPES)}"
            for name in both
            if entries[name].dtype not in DTYPES
        ],
    }
    found = []
    many = sum(map(len, problems.values())) > _ALL
    for kind, names in problems.items():
        rest = [f"and {len(names) - _FEW} more"] if many and len(names) > _FEW else []
        named = names[:_FEW] if rest else names
        found += [f"{len(names)} {kind}: {', '.join(named + rest)}"] if names else []
    if found:
        raise ValueError(f"the tensors in {where} are not those of the model: " + "; ".join(found))


def values_from(entries: Mapping[str, Entry]) -> Values:
    """-> values(name, spec, slices): that piece of the parameter, in the file's dtype.

    Reads the bytes of the slices only, and opens no file that holds none of them; of a
    stacked parameter only the experts that slices[0] selects. A result may be a view of the
    mapped file. Raises ValueError naming a file that safetensors refuses.
    """

    @lru_cache(maxsize=8)  # neighbours in the model are neighbours in a file
    def opened(path: Path):
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated, corrupt or not a safetensors file ({error})") from error

    def read(name: str, slices: Slices) -> Tensor:
        return opened(entries[name].file).get_slice(name)[slices]

    def values(name: str, spec: ParamSpec, slices: Slices) -> Tensor:
        slices = tuple(slice(*s.indices(n)[:2]) for s, n in zip(slices, spec.shape, strict=True))
        shape = [max(0, s.stop - s.start) for s in slices]
        if not prod(shape):
            return torch.empty(shape)
        within = _within(spec)
        if within and within.name in entries:
            experts, rows, columns = slices
            rows = slice(rows.start + within.start, rows.stop + within.start)
            if entries[within.name].shape == (spec.shape[0], within.rows, spec.shape[2]):
                return read(within.name, (experts, rows, columns))
            return read(within.name, (experts, columns, rows)).transpose(1, 2)
        if not spec.parts:
            return read(name, slices)
        return torch.stack([read(part, slices[1:]) for part in spec.parts[slices[0]]])

    return values


def read_values(directory: Path, specs: Specs, kind: str = "model", ignored: tuple[str, ...] = ()) -> Values:
    """The values of `specs` in a directory, for make_state. Raises as read_index and check_names do."""
    entries = read_index(directory, kind)
    check_names(entries, specs, directory, ignored)
    return values_from(entries)


def make_header(layout: Layout) -> tuple[bytes, int]:
    """A file's first bytes, its tensors in this order, and the file's size."""
    header: dict = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say so
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + end


def write_file(path: Path, layout: Layout, tensors: Iterable[Tensor]) -> int:
    """Write the tensors, cast to the layout's dtypes, as they arrive, and sync them to disk. -> the file's crc32."""
    header, _ = make_header(layout)
    crc = zlib.crc32(header)
    with open(path, "wb") as file:
        file.write(header)
        for (name, (dtype, shape)), tensor in zip(layout.items(), tensors, strict=True):
            if tuple(tensor.shape) != tuple(shape):
                raise RuntimeError(f"{name} has shape {tuple(tensor.shape)}, announced as {tuple(shape)}")
            raw = memoryview(tensor.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8).numpy())
            for start in range(0, len(raw), CHUNK):
                chunk = raw[start : start + CHUNK]
                crc = zlib.crc32(chunk, crc)
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return crc


def make_index(files: Mapping[str, Layout]) -> dict:
    """The content of `*.safetensors.index.json`, of the layout of each file."""
    tensors = [tensor for layout in files.values() for tensor in layout.values()]
    metadata = {
        "total_parameters": sum(prod(shape) for _, shape in tensors),
        "total_size": sum(prod(shape) * dtype.itemsize for dtype, shape in tensors),
    }
    weight_map = {name: file for file, layout in files.items() for name in layout}
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}

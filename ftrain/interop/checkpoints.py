"""Checkpoints as sharded jax.Arrays: what ftrain wrote is read by JAX, and what JAX writes is resumed by ftrain."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.distributed as dist
from jax.sharding import NamedSharding, PartitionSpec
from torch import Tensor
from torch.distributed.tensor import Replicate

from .. import checkpoint
from ..disk import MANIFEST, TRAIN_STATE, read_json, read_manifest, verify
from ..mesh import Mesh, device_mesh
from ..model import Model
from ..safetensors_io import INDEX, Values, read_index, read_values, values_from
from ..specs import ParamSpec, Specs, zeros
from ..state import State, kept_by_optimizer, place
from .trees import to_jax

Shardings = Mapping[str, NamedSharding]


def load_params(directory: str | os.PathLike, model: Model, shardings: Shardings) -> dict[str, jax.Array]:
    """The weights of a Hugging Face directory, or of a checkpoint, in the files' dtype; experts stacked along dimension
    0. Of each file a device reads the bytes of its shard and no others.

    shardings: of every parameter, as `partition_specs` makes them.
    Raises ValueError naming missing, extra or mis-shaped tensors, parameters without a sharding, or a corrupt file.
    """
    return _arrays(read_values(directory, model.specs, ignored=model.ignored), model.specs, shardings)


def load_state(directory: str | os.PathLike, model: Model, shardings: Shardings) -> tuple[State, dict[str, Any]]:
    """A checkpoint of ftrain's -> the state, of jax.Arrays, and the meta that was saved with it.

    The moments lie as their parameters do; of optax, `state.extra` has what it kept, in fp32 as in the files.
    Raises disk.Corrupt naming a file that is not as it was written, else as `load_params`.
    """
    directory = Path(directory)
    checks = read_manifest(directory / MANIFEST)
    verify(directory, checks, list(checks))
    meta = read_json(directory / TRAIN_STATE / "train_state.json")
    params = load_params(directory, model, shardings)
    mesh = next(iter(shardings.values())).mesh
    of_kinds = {}
    for index in sorted((directory / TRAIN_STATE).glob(f"*{INDEX}")):
        kind = index.name.removesuffix(INDEX)
        entries = read_index(directory / TRAIN_STATE, kind)
        specs = {name: ParamSpec(entry.shape, zeros) for name, entry in entries.items()}
        placed = {name: shardings.get(name, NamedSharding(mesh, PartitionSpec())) for name in specs}
        of_kinds[kind] = _arrays(values_from(entries), specs, placed)
    step = jnp.asarray(meta["step"], jnp.int32)
    if of_kinds.keys() == {"mu", "nu"}:
        return State(params, of_kinds["mu"], of_kinds["nu"], step), meta
    return State(params, {}, {}, step, of_kinds), meta


def save_state(
    out: str | os.PathLike, state: State, model: Model, meta: Mapping[str, Any] = {},
    tokenizer: Callable[[Path], None] | None = None,
) -> Path:  # fmt: skip
    """Write a state of jax.Arrays as OUT/checkpoints/step-N, from which `python -m ftrain --out OUT` goes on.

    meta: what `load_state` gave, with `sequences` for how many of the data were seen since; of another optimizer than
    AdamW, `optimizer` as the flag has it. tokenizer: writes a tokenizer's files into a directory. Holds the state once
    more, in fp32.
    Raises ValueError for an array of which another process holds a part, or that has not its parameter's shape, for a
    state that is no whole one, and for a meta that is not JSON; OSError as `checkpoint.save`.
    """
    _check_whole(state, model)
    if state.extra and "optimizer" not in meta:
        raise ValueError("meta does not say of which `optimizer` the state is, as the flag has it: optax:lion")
    try:
        json.dumps(dict(meta))
    except TypeError as error:
        raise ValueError(f"meta is not JSON: {error}") from None
    with _one_rank() as mesh, _random_state(meta):
        nowhere = (Replicate(),) * mesh.ndim

        def placed(arrays: Mapping[str, jax.Array]) -> dict:
            values = {name: _tensor(array) for name, array in arrays.items()}
            return {name: place(value, tuple(value.shape), nowhere, mesh) for name, value in values.items()}

        whole = State(
            placed({name: state.params[name] for name in model.specs}), placed(state.mu), placed(state.nu),
            torch.tensor(int(state.step)), {kind: placed(arrays) for kind, arrays in state.extra.items()},
        )  # fmt: skip
        return checkpoint.save(out, whole, model, {"sequences": 0, "seed": 0, "data": "", **meta}, tokenizer)


def _check_whole(state: State, model: Model) -> None:
    """Raises ValueError for what a checkpoint would lose."""
    if missing := [name for name in model.specs if name not in state.params]:
        raise ValueError(f"the state has no {', '.join(missing[:3])}, which the model declares")
    for kind, arrays in {"params": state.params, "mu": state.mu, "nu": state.nu}.items():
        if strange := [name for name in arrays if name not in model.specs]:
            raise ValueError(f"the state has {kind} of {', '.join(strange[:3])}, which the model does not declare")
    if state.mu.keys() != state.nu.keys():
        raise ValueError(f"mu and nu are not of the same parameters: {', '.join(sorted(state.mu.keys() ^ state.nu.keys())[:3])}")
    for kind, arrays in {"params": state.params, **kept_by_optimizer(state)}.items():
        for name, array in arrays.items():
            if not array.is_fully_addressable:
                raise ValueError(f"{kind}, {name}: other processes hold parts of it; gather it on one first")
            expected = model.specs[name].shape if name in model.specs else array.shape
            if tuple(array.shape) != tuple(expected):
                raise ValueError(f"{kind}, {name} has shape {list(array.shape)}, the model says {list(expected)}")
    if state.extra and state.mu:
        raise ValueError("a state has AdamW's mu and nu, or `extra` of another optimizer: not both")


@contextmanager
def _random_state(meta: Mapping[str, Any]) -> Iterator[None]:
    """Within, torch's random generators are where meta says, for them to be saved."""
    before = checkpoint.get_rng()
    checkpoint.set_rng(meta.get("rng", {}))
    try:
        yield
    finally:
        checkpoint.set_rng(before)


def _arrays(values: Values, specs: Specs, shardings: Shardings) -> dict[str, jax.Array]:
    if missing := [name for name in specs if name not in shardings]:
        raise ValueError(f"no sharding is given for {', '.join(missing[:3])}" + ", ..." * (len(missing) > 3))

    def array(name: str, spec: ParamSpec) -> jax.Array:
        def piece(index: tuple[slice, ...]) -> jax.Array:
            return to_jax(values(name, spec, index), copy=True)

        return jax.make_array_from_callback(spec.shape, shardings[name], piece)

    return {name: array(name, spec) for name, spec in specs.items()}


def _tensor(array: jax.Array) -> Tensor:
    """The whole array, as fp32; a number as [1]."""
    return torch.from_numpy(np.array(jax.device_get(array), np.float32, ndmin=1))


@contextmanager
def _one_rank() -> Iterator:
    """A mesh of this process alone."""
    if dist.is_initialized():
        raise RuntimeError("a checkpoint is written from JAX by a process that is no rank of torch's")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield device_mesh(Mesh(), 1, "cpu")
    finally:
        dist.destroy_process_group()

"""Trees of tensors on both sides, sharing memory: DLPack for the leaves, jax.tree for what holds them."""

from typing import Any

import jax
import torch
from jax.tree_util import keystr, tree_map_with_path
from torch import Tensor
from torch.distributed.tensor import DTensor


def to_jax(tree: Any, copy: bool = False) -> Any:
    """A tree (dicts, lists, tuples, NamedTuples, None) with torch tensors among its leaves -> the same with jax.Arrays.

    Each array lies where its tensor lies. JAX takes arrays for constant: do not write to the tensor while the array is
    in use, or ask for a `copy`, which also makes of any tensor one that JAX can take.
    Raises ValueError, naming the leaf: a DTensor (its `to_local()` or `full_tensor()` can be given); a tensor that
    requires a gradient, which would be lost (`detach` it, or use `from_jax_fn`); without `copy`, one that cannot share
    its memory, for it is neither contiguous nor transposed, or is not aligned; a dtype that JAX would narrow.
    """
    return tree_map_with_path(lambda path, leaf: _array(leaf, keystr(path), copy), tree)


def from_jax(tree: Any) -> Any:
    """`to_jax` the other way: torch tensors that lie where the arrays lie. Do not write to them: JAX takes arrays for
    constant.

    Raises ValueError, naming the leaf: an array on several devices, a dtype that torch has not.
    """
    return tree_map_with_path(lambda path, leaf: _tensor(leaf, keystr(path)), tree)


def _array(leaf: Any, where: str, copy: bool) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    name = f"the tensor {where} ({leaf.dtype}, {list(leaf.shape)})".replace("  ", " ")
    if isinstance(leaf, DTensor):
        raise ValueError(f"{name} is a DTensor: give its to_local(), this rank's piece, or its full_tensor()")
    if leaf.requires_grad:
        raise ValueError(f"{name} requires a gradient, which would end here: detach it, or use from_jax_fn")
    if leaf.dtype in (torch.int64, torch.uint64, torch.float64, torch.complex128) and not jax.config.jax_enable_x64:
        raise ValueError(
            f"{name} has 64 bits, of which JAX would keep 32: jax.config.update('jax_enable_x64', True), or cast it"
        )
    if copy:
        leaf = leaf.clone(memory_format=torch.contiguous_format)
    try:
        array = jax.dlpack.from_dlpack(leaf)
    except Exception as error:
        kind = "cannot be taken as it lies" if leaf.numel() and not _compact(leaf) else "has no twin in JAX"
        raise ValueError(f"{name} {kind}: make it contiguous, or cast it ({str(error).splitlines()[0]})") from error
    if leaf.numel() and array.unsafe_buffer_pointer() != leaf.data_ptr():
        raise ValueError(f"{name} does not begin where JAX needs it, at a multiple of 64 bytes: ask for copy=True")
    return array


def _compact(t: Tensor) -> bool:
    """Whether its elements fill their part of the memory, in any order of the dimensions."""
    order = sorted((stride, size) for stride, size in zip(t.stride(), t.shape) if size > 1)
    expected = 1
    for stride, size in order:
        if stride != expected:
            return False
        expected *= size
    return True


def _tensor(leaf: Any, where: str) -> Any:
    if not isinstance(leaf, jax.Array):
        return leaf
    name = f"the array {where} ({leaf.dtype}, {list(leaf.shape)})".replace("  ", " ")
    if len(leaf.devices()) > 1 and not leaf.is_fully_replicated:
        raise ValueError(
            f"{name} lies on {len(leaf.devices())} devices: give one of its addressable_shards, or gather it first"
        )
    try:
        return torch.from_dlpack(leaf if len(leaf.devices()) == 1 else leaf.addressable_data(0))
    except Exception as error:
        raise ValueError(f"{name} has no twin in torch ({str(error).splitlines()[0]})") from error

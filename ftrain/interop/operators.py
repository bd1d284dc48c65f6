"""What operators of torch that run JAX have in common."""

from itertools import count

import jax
import jax.numpy as jnp
import torch
from torch import Tensor

_numbers = count()  # torch keeps operators as long as the process lives, by names of their own


def unique(stem: str) -> str:
    """A name for an operator that no other has."""
    return f"ftrain::{stem}_{next(_numbers)}"


def aligned(t: Tensor) -> Tensor:
    """The tensor in a form that JAX takes as it lies: itself, where it is."""
    t = t.detach()
    return t if t.is_contiguous() and t.data_ptr() % 64 == 0 else t.clone(memory_format=torch.contiguous_format)


def shape_of(t: Tensor) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(t.shape), jnp.dtype(str(t.dtype).removeprefix("torch.")))

"""JAX on the other side: trees, shardings, checkpoints, optax, and JAX functions within models. The extra `jax`."""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is torch's too

try:
    import jax  # noqa: F401
    import optax  # noqa: F401
except ImportError as error:
    raise ImportError("ftrain.interop needs JAX and optax: pip install 'ftrain[jax]'") from error

from .checkpoints import load_params, load_state, save_state
from .functions import from_jax_fn
from .optimizer import from_optax
from .sharding import partition_specs
from .trees import from_jax, to_jax

__all__ = [
    "from_jax", "from_jax_fn", "from_optax", "load_params", "load_state", "partition_specs", "save_state", "to_jax",
]  # fmt: skip

"""JAX with eight devices of this CPU, for the tests that need it; imported before any array is made."""

import pytest

jax = pytest.importorskip("jax", reason="needs the extra jax")
pytest.importorskip("optax", reason="needs the extra jax")
jax.config.update("jax_num_cpu_devices", 8)


def mesh_of(fsdp: int = 1, sp: int = 1, ep: int = 1):
    """XLA finds out how what is computed is cut, as in most JAX code; JAX's default asks to be told."""
    auto = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((fsdp, sp, ep), ("fsdp", "sp", "ep"), auto, devices=jax.devices()[: fsdp * sp * ep])

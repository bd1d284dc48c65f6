"""A Qwen3 train step in JAX (docs/qwen3_in_jax.py), jitted whole, in one process. In bf16 the parameters are cast inside
the step."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import shared
from safetensors.numpy import load_file

sys.path.append(str(Path(__file__).parents[3] / "docs"))
from qwen3_in_jax import loss_of  # noqa: E402


def main() -> None:
    work = shared.read()
    dtype = jnp.bfloat16 if work.dtype == "bf16" else jnp.float32
    adam = optax.adamw(work.lr, work.beta1, work.beta2, work.eps, weight_decay=0.0)
    optimizer = optax.chain(optax.clip_by_global_norm(work.clip), adam)
    cfg = work.config

    def update(params, state, ids):
        loss, grads = jax.value_and_grad(loss_of)(params, ids, cfg, dtype)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, optax.global_norm(grads)

    update = jax.jit(update, donate_argnums=(0, 1))
    params = {name: jnp.asarray(t) for name, t in load_file(f"{work.model}/model.safetensors").items()}
    state = optimizer.init(params)

    def step(ids) -> tuple[float, float]:
        nonlocal params, state
        params, state, loss, norm = update(params, state, jnp.asarray(ids, jnp.int32))
        return float(loss), float(norm)

    shared.write(work, shared.train(work, step))


if __name__ == "__main__":
    main()

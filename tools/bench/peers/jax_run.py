"""A Qwen3 train step in JAX, jitted whole, in one process. In bf16 the parameters are cast inside the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import shared
from safetensors.numpy import load_file

LAYER = "input_layernorm", "post_attention_layernorm", *(
    f"{block}.{name}" for block, names in {
        "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"),
        "mlp": ("gate_proj", "up_proj", "down_proj"),
    }.items() for name in names
)  # fmt: skip


def rms_norm(x, w, eps):
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt((x32 * x32).mean(-1, keepdims=True) + eps)).astype(x.dtype) * w


def rope_tables(cfg, length: int):
    """-> cos, sin [S, 1, D]"""
    D = cfg["head_dim"]
    angles = np.outer(np.arange(length), cfg["rope_parameters"]["rope_theta"] ** (-np.arange(0, D, 2) / D))
    return (np.concatenate([f(angles)] * 2, -1)[:, None].astype(np.float32) for f in (np.cos, np.sin))


def rotate(x, cos, sin):
    """x [B, S, heads, D]"""
    a, b = jnp.split(x, 2, -1)
    return (x * cos + jnp.concatenate([-b, a], -1) * sin).astype(x.dtype)


def attention(q, k, v):
    """q [B, S, N, D], k and v [B, S, K, D] -> [B, S, N * D], causal; softmax in fp32"""
    B, S, N, D = q.shape
    K = k.shape[2]
    scores = jnp.einsum("bqkrd,bskd->bkrqs", q.reshape(B, S, K, N // K, D), k) * D**-0.5
    scores = jnp.where(jnp.tril(jnp.ones((S, S), bool)), scores.astype(jnp.float32), -jnp.inf)
    weights = jax.nn.softmax(scores, -1).astype(q.dtype)
    return jnp.einsum("bkrqs,bskd->bqkrd", weights, v).reshape(B, S, N * D)


def loss_of(params, ids, cfg, dtype):
    """The mean cross-entropy of ids [B, S]; parameters are fp32 and are computed with in `dtype`."""
    p = jax.tree.map(lambda t: t.astype(dtype), params)
    eps, D = cfg["rms_norm_eps"], cfg["head_dim"]
    B, S = ids.shape
    cos, sin = rope_tables(cfg, S)
    embedding = p["model.embed_tokens.weight"]
    x = embedding[ids]
    for i in range(cfg["num_hidden_layers"]):
        w = {name: p[f"model.layers.{i}.{name}.weight"] for name in LAYER}
        h = rms_norm(x, w["input_layernorm"], eps)
        q, k, v = ((h @ w[f"self_attn.{n}_proj"].T).reshape(B, S, -1, D) for n in "qkv")
        q, k = (rotate(rms_norm(t, w[f"self_attn.{n}_norm"], eps), cos, sin) for n, t in (("q", q), ("k", k)))
        x = x + attention(q, k, v) @ w["self_attn.o_proj"].T
        h = rms_norm(x, w["post_attention_layernorm"], eps)
        x = x + (jax.nn.silu(h @ w["mlp.gate_proj"].T) * (h @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T
    logits = (rms_norm(x, p["model.norm.weight"], eps) @ embedding.T)[:, :-1].astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


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

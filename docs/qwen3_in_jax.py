"""Qwen3 in JAX: the loss of models/qwen3.py as a JAX user would write it, from the same safetensors files.

Parameters are a dict by Hugging Face's names, so `ftrain.interop` loads and saves them, and the gradients have them too.
"""

import jax
import jax.numpy as jnp
import numpy as np

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
    theta = cfg["rope_parameters"]["rope_theta"] if "rope_parameters" in cfg else cfg["rope_theta"]
    angles = np.outer(np.arange(length), theta ** (-np.arange(0, D, 2) / D))
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
    unembedding = p.get("lm_head.weight", embedding)
    logits = (rms_norm(x, p["model.norm.weight"], eps) @ unembedding.T)[:, :-1].astype(jnp.float32)
    return (jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]).mean()

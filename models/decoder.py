"""What the decoder families share: embedding, layers of attention and MLP between norms, unembedding.

B rows, S tokens, H hidden, N query heads, K key/value heads, D head size, I inner size, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import Ops, Output, Router
from ..specs import ParamSpec, normal
from . import fields
from .layers import norm_specs, project, projection, rms_norm, swiglu, swiglu_specs
from .rope import Rope, rope_config, rope_tables, rotate

LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float  # of the norms
    std: float  # of the initial weights
    tied: bool  # the unembedding is the embedding
    padding: int | None  # the token whose embedding gets no gradient
    rope: Rope
    windows: tuple[int | None, ...]  # per layer, how far attention looks back; None: without bound
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    prefix: str = "model"  # of the parameters' names
    head: str = "lm_head.weight"  # the unembedding's name, where it is not the embedding


def decoder_config(hf: Mapping, windows: Callable | None = None, **family) -> DecoderConfig:
    """The fields that all decoder families have; `family` adds what differs.

    windows: (hf, layers) -> the window of each layer, for families that have them.
    Raises ValueError, naming key and value, for what is missing, impossible or not implemented.
    """
    hidden, layers = fields.size(hf, "hidden_size"), fields.size(hf, "num_hidden_layers")
    heads = fields.size(hf, "num_attention_heads")
    kv_heads = fields.size(hf, "num_key_value_heads", heads)
    if heads % kv_heads:
        fields.refuse("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads = {heads}")
    if hf.get("head_dim") is None and hidden % heads:
        fields.refuse("hidden_size", hidden, f"a multiple of num_attention_heads = {heads} where head_dim is not given")
    head_dim = fields.size(hf, "head_dim", hidden // heads)
    if head_dim % 2:
        fields.refuse("head_dim", head_dim, "even, because rope turns pairs")
    if fields.read(hf, "hidden_act", "silu") != "silu":
        fields.refuse("hidden_act", hf["hidden_act"], "'silu'")
    if fields.read(hf, "attention_dropout", 0) != 0:
        fields.refuse("attention_dropout", hf["attention_dropout"], "0: dropout is not implemented")
    vocab = fields.size(hf, "vocab_size")
    padding = hf.get("pad_token_id")
    if padding is not None and not (type(padding) is int and -vocab <= padding < vocab):
        fields.refuse("pad_token_id", padding, f"a token below vocab_size = {vocab}, or null")
    return DecoderConfig(
        vocab=vocab,
        hidden=hidden,
        inner=fields.size(hf, "intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        eps=fields.number(hf, "rms_norm_eps", 1e-6),
        std=fields.number(hf, "initializer_range", 0.02),
        tied=fields.flag(hf, "tie_word_embeddings", False),
        padding=padding,
        rope=rope_config(hf, head_dim, fields.size(hf, "max_position_embeddings")),
        windows=windows(hf, layers) if windows else (None,) * layers,
        **family,
    )


def nested(hf: Mapping, theta: float, positions: int, **rope) -> dict:
    """The decoder's config where it stands in another, as `text_config`: tied where the whole says so.

    theta, positions, rope: the family's defaults, for `rope_parameters` and `max_position_embeddings`.
    """
    text = fields.read(hf, "text_config")
    rope |= text.get("rope_scaling") or text.get("rope_parameters") or {}
    rope.setdefault("rope_theta", fields.read(text, "rope_theta", theta))
    rest = {key: value for key, value in text.items() if key not in ("rope_scaling", "rope_parameters")}
    tied = fields.flag(hf, "tie_word_embeddings", False)
    return {"max_position_embeddings": positions, **rest, "rope_parameters": rope, "tie_word_embeddings": tied}


def layer_windows(hf: Mapping, layers: int) -> tuple[int | None, ...]:
    """Qwen's windows: from `layer_types`, else on the layers from `max_window_layers` on."""
    window = fields.size(hf, "sliding_window", 4096) if fields.flag(hf, "use_sliding_window", False) else None
    types = hf.get("layer_types")
    if types is None:
        full = fields.read(hf, "max_window_layers", 28)
        if type(full) is not int:
            fields.refuse("max_window_layers", full, "an integer")
        return tuple(window if layer >= full else None for layer in range(layers))
    if not isinstance(types, (list, tuple)) or len(types) != layers or any(kind not in LAYER_TYPES for kind in types):
        fields.refuse("layer_types", types, f"a list of {layers} of {' or '.join(map(repr, LAYER_TYPES))}")
    if window is None and LAYER_TYPES[1] in types:
        fields.refuse("layer_types", types, "all 'full_attention' unless use_sliding_window is true")
    return tuple(window if kind == LAYER_TYPES[1] else None for kind in types)


def attention_specs(cfg: DecoderConfig, prefix: str) -> dict[str, ParamSpec]:
    H, D, std = cfg.hidden, cfg.head_dim, cfg.std
    specs = {
        **projection(f"{prefix}.q_proj", cfg.heads * D, H, cfg.qkv_bias, std),
        **projection(f"{prefix}.k_proj", cfg.kv_heads * D, H, cfg.qkv_bias, std),
        **projection(f"{prefix}.v_proj", cfg.kv_heads * D, H, cfg.qkv_bias, std),
        **projection(f"{prefix}.o_proj", H, cfg.heads * D, cfg.o_bias, std),
    }
    if cfg.qk_norm:
        specs |= norm_specs(f"{prefix}.q_norm", D, bias=False) | norm_specs(f"{prefix}.k_norm", D, bias=False)
    return specs


def mlp_specs(cfg: DecoderConfig, prefix: str) -> dict[str, ParamSpec]:
    """Of a layer's dense MLP."""
    return swiglu_specs(prefix, cfg.hidden, cfg.inner, cfg.mlp_bias, cfg.std)


def specs(cfg: DecoderConfig, mlp: Callable | None = None) -> dict[str, ParamSpec]:
    """Every parameter, by its name in the checkpoint.

    mlp: (layer, prefix) -> the specs of that layer's MLP; by default a dense SwiGLU.
    """
    H = cfg.hidden
    table = ParamSpec((cfg.vocab, H), normal(cfg.std), active=1.0 if cfg.tied else 0.0)
    out = {f"{cfg.prefix}.embed_tokens.weight": table}
    for layer in range(cfg.layers):
        at = f"{cfg.prefix}.layers.{layer}"
        out |= attention_specs(cfg, f"{at}.self_attn")
        out |= mlp(layer, f"{at}.mlp") if mlp else mlp_specs(cfg, f"{at}.mlp")
        out |= norm_specs(f"{at}.input_layernorm", H, bias=False)
        out |= norm_specs(f"{at}.post_attention_layernorm", H, bias=False)
    out |= norm_specs(f"{cfg.prefix}.norm", H, bias=False)
    if not cfg.tied:
        out[cfg.head] = ParamSpec((cfg.vocab, H), normal(cfg.std))
    return out


def attention(q: Mapping[str, Tensor], x: Tensor, turn: Callable, mask, cfg: DecoderConfig, ops: Ops) -> Tensor:
    """Grouped-query attention: x [B, S, H] -> [B, S, H]; `turn` applies rope to [B, S, N, D]."""
    heads = (-1, cfg.head_dim)
    query = project(q, "self_attn.q_proj", x, ops).unflatten(-1, heads)
    key = project(q, "self_attn.k_proj", x, ops).unflatten(-1, heads)
    value = project(q, "self_attn.v_proj", x, ops).unflatten(-1, heads)
    if cfg.qk_norm:
        query = rms_norm(query, q["self_attn.q_norm.weight"], cfg.eps)
        key = rms_norm(key, q["self_attn.k_norm.weight"], cfg.eps)
    seen = ops.attention(turn(query), turn(key), value, mask)
    return project(q, "self_attn.o_proj", seen.flatten(-2), ops)


def embed(p: Mapping[str, Tensor], batch: Mapping[str, Tensor], cfg: DecoderConfig) -> Tensor:
    """The layers' input [B, S, H]: each token's row of the table, or its row of `batch["embeddings"]` [B, S, H] where
    `batch["placed"]` [B, S] says so."""
    x = F.embedding(batch["input_ids"], p[f"{cfg.prefix}.embed_tokens.weight"], padding_idx=cfg.padding)
    if "embeddings" not in batch:
        return x
    return torch.where(batch["placed"][..., None], batch["embeddings"].to(x.dtype), x)


def forward(p: Mapping[str, Tensor], batch: Mapping[str, Tensor], cfg: DecoderConfig, ops: Ops, mlp=None) -> Output:
    """A decoder: p by name, batch with input_ids, position_ids (with axes [B, S, axes]) and segment_ids, all [B, S].

    mlp: (q, x, layer) -> (y, Router or None), for families whose MLP is not the dense one.
    The batch may also have `embeddings` and `placed` (see `embed`), `deep` [levels, B, S, H], which is added to
    what the first `levels` layers give (deepstack, arXiv 2406.04334), and `max_position`, 0-dim, the largest
    position of a batch of which this is a part.
    """
    x, deep = embed(p, batch, cfg), batch.get("deep", ())
    cos, sin = rope_tables(cfg.rope, batch["position_ids"], x.dtype, batch.get("max_position"))
    turn = partial(rotate, cos=cos, sin=sin)
    masks = {window: ops.mask(batch["segment_ids"], window) for window in dict.fromkeys(cfg.windows)}

    def block(q, x, layer):
        y = rms_norm(x, q["input_layernorm.weight"], cfg.eps)
        x = x + attention(q, y, turn, masks[cfg.windows[layer]], cfg, ops)
        y = rms_norm(x, q["post_attention_layernorm.weight"], cfg.eps)
        y, router = mlp(q, y, layer) if mlp else (swiglu(q, y, ops), None)
        x = x + y
        return (x + deep[layer] if layer < len(deep) else x), router

    x, routers = ops.scan(block, p, f"{cfg.prefix}.layers", cfg.layers, x)
    routers = [router for router in routers if router is not None]
    return Output(
        hidden=rms_norm(x, p[f"{cfg.prefix}.norm.weight"], cfg.eps),
        unembedding=p[f"{cfg.prefix}.embed_tokens.weight" if cfg.tied else cfg.head],
        router=Router(*map(torch.stack, zip(*routers))) if routers else None,
    )

"""Qwen3 with a mixture of experts in place of most MLPs. Checked against transformers' `Qwen3MoeForCausalLM`."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..ops import Ops, Output
from ..specs import ParamSpec
from . import decoder, fields
from .decoder import DecoderConfig
from .layers import swiglu
from .moe import moe, moe_specs


@dataclass(frozen=True, kw_only=True)
class MoeConfig(DecoderConfig):
    experts: int
    top_k: int
    expert_inner: int
    normalise: bool  # whether each token's k weights sum to 1
    sparse: tuple[bool, ...]  # per layer: experts, or one dense MLP
    balance: float  # the family's weight of the load-balancing loss


def config(hf: Mapping) -> MoeConfig:
    hf = {"num_key_value_heads": 4, "max_position_embeddings": 32768, **hf}  # transformers' defaults
    bias = fields.flag(hf, "attention_bias", False)
    base = decoder.decoder_config(hf, _windows, qk_norm=True, qkv_bias=bias, o_bias=bias)
    # transformers 5 writes the number of experts under another name
    experts = fields.size(hf, "num_experts", hf.get("num_local_experts") or fields.MISSING)
    top_k = fields.size(hf, "num_experts_per_tok")
    if top_k > experts:
        fields.refuse("num_experts_per_tok", top_k, f"at most num_experts = {experts}")
    step, dense = fields.size(hf, "decoder_sparse_step", 1), fields.read(hf, "mlp_only_layers", [])
    if not isinstance(dense, (list, tuple)) or any(layer not in range(base.layers) for layer in dense):
        fields.refuse("mlp_only_layers", dense, f"a list of layers, 0 to {base.layers - 1}")
    balance = fields.read(hf, "router_aux_loss_coef", 0.001)
    if type(balance) not in (int, float) or not balance >= 0:
        fields.refuse("router_aux_loss_coef", balance, "a number, at least 0")
    return MoeConfig(
        **vars(base),
        experts=experts,
        top_k=top_k,
        expert_inner=fields.size(hf, "moe_intermediate_size"),
        normalise=fields.flag(hf, "norm_topk_prob", False),
        sparse=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(base.layers)),
        balance=float(balance),
    )


def _windows(hf: Mapping, layers: int) -> tuple[int | None, ...]:
    """Unlike Qwen3's, one window for all layers."""
    windowed = fields.flag(hf, "use_sliding_window", False)
    return (fields.size(hf, "sliding_window", 4096) if windowed else None,) * layers


def specs(cfg: MoeConfig) -> dict[str, ParamSpec]:
    def mlp(layer: int, prefix: str) -> dict[str, ParamSpec]:
        if not cfg.sparse[layer]:
            return decoder.mlp_specs(cfg, prefix)
        return moe_specs(prefix, cfg.hidden, cfg.expert_inner, cfg.experts, cfg.top_k, cfg.std)

    return decoder.specs(cfg, mlp)


def forward(p: Mapping[str, Tensor], batch: Mapping[str, Tensor], cfg: MoeConfig, ops: Ops) -> Output:
    valid = batch["segment_ids"] >= 0

    def mlp(q, x, layer):
        if not cfg.sparse[layer]:
            return swiglu(q, x, ops), None
        return moe(q, x, valid, cfg.top_k, cfg.normalise, ops)

    return decoder.forward(p, batch, cfg, ops, mlp)


def _qwen3_moe(hidden: int, inner: int, expert_inner: int, layers: int, heads: int, **other) -> dict:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "moe_intermediate_size": expert_inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": layers,
        "tie_word_embeddings": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        **other,
    }


# Small enough to learn something in minutes on two CPU cores; its tokenizer is trained with it.
_TINY = {
    "vocab_size": 4096,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}

PRESETS = {
    "qwen3-moe-tiny": _qwen3_moe(256, 768, 256, 4, 8, **_TINY),
    "Qwen3-30B-A3B": _qwen3_moe(2048, 6144, 768, 48, 32),
    "Qwen3-235B-A22B": _qwen3_moe(4096, 12288, 1536, 94, 64),
}

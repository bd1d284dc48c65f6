"""Llama: the plain decoder, with optional biases. Checked against transformers' `LlamaForCausalLM`."""

from collections.abc import Mapping

from . import decoder, fields
from .decoder import DecoderConfig, forward, specs  # noqa: F401 - the family is the shared decoder


def config(hf: Mapping) -> DecoderConfig:
    hf = {"max_position_embeddings": 2048, **hf}  # transformers' defaults, where they can be left out
    bias, mlp_bias = fields.flag(hf, "attention_bias", False), fields.flag(hf, "mlp_bias", False)
    return decoder.decoder_config(hf, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)


def _llama31(hidden: int, inner: int, layers: int, heads: int) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }


PRESETS = {
    "Llama-3.1-8B": _llama31(4096, 14336, 32, 32),
    "Llama-3.1-70B": _llama31(8192, 28672, 80, 64),
    "SmolLM2-135M": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.041666666666666664,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}

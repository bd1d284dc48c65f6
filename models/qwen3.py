"""Qwen3: norms on queries and keys instead of their biases, heads of a size of their own.

Checked against transformers' `Qwen3ForCausalLM`.
"""

from collections.abc import Mapping

from . import decoder, fields
from .decoder import DecoderConfig, forward, specs  # noqa: F401 - the family is the shared decoder


def config(hf: Mapping) -> DecoderConfig:
    # transformers' defaults
    hf = {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, **hf}
    bias = fields.flag(hf, "attention_bias", False)
    return decoder.decoder_config(hf, decoder.layer_windows, qk_norm=True, qkv_bias=bias, o_bias=bias)


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> dict:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
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
        "tie_word_embeddings": tied,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }


PRESETS = {
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen3-8B": _qwen3(4096, 12288, 36, 32, tied=False),
    "Qwen3-14B": _qwen3(5120, 17408, 40, 40, tied=False),
    "Qwen3-32B": _qwen3(5120, 25600, 64, 64, tied=False),
}

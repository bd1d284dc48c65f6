"""Qwen2 and Qwen2.5: a bias on q, k and v, sliding windows on some layers.

Checked against transformers' `Qwen2ForCausalLM`.
"""

from collections.abc import Mapping

from . import decoder
from .decoder import DecoderConfig, forward, specs  # noqa: F401 - the family is the shared decoder


def config(hf: Mapping) -> DecoderConfig:
    hf = {"num_key_value_heads": 32, "max_position_embeddings": 32768, **hf}  # transformers' defaults
    return decoder.decoder_config(hf, decoder.layer_windows, qkv_bias=True)


def _qwen2(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, eps: float) -> dict:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": eps,
        "initializer_range": 0.02,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "sliding_window": 131072,
        "max_window_layers": layers,
        "tie_word_embeddings": False,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    }


PRESETS = {
    "Qwen2-7B": _qwen2(3584, 18944, 28, 28, 4, 1e-6),
    "Qwen2.5-32B": _qwen2(5120, 27648, 64, 40, 8, 1e-5),
    "Qwen2-72B": _qwen2(8192, 29568, 80, 64, 8, 1e-5),
}

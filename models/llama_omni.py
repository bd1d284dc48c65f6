"""Llama that hears: speech in, text out, as in LLaMA-Omni (arXiv 2409.06666); one of VeOmni's recipes.

A composition (omni.py) of Llama and Whisper's encoder: several of its outputs, one after the other, are one token, and
a projector of two layers takes them to the embeddings' width. As published, the encoder is frozen.
"""

from collections.abc import Mapping

from . import llama, omni
from .encoders import whisper
from .omni import blanks, examples, forward, prepare, sources, specs, targets, weights  # noqa: F401 - a composition's


def config(hf: Mapping) -> omni.OmniConfig:
    return omni.config(hf, "llama")


def _llama_omni(foundation: Mapping, placeholder: int, ear: Mapping) -> dict:
    audio = {"type": "whisper", "placeholder": placeholder, "lr": 0.0, "projector": "mlp", "config": ear}
    return {"model_type": "llama_omni", "foundation": foundation, "encoders": {"audio": audio}}


_TINY = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 10000.0,
}  # fmt: skip
_LARGE_V3 = {
    "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "num_mel_bins": 128,
    "max_source_positions": 1500, "stack": 5,
}  # fmt: skip
RESERVED = 128002  # a token of Llama 3's that no text has

PRESETS = {
    "llama-omni-tiny": _llama_omni(_TINY, 7, whisper.TINY),
    "Llama-3.1-8B-Omni": _llama_omni(llama.PRESETS["Llama-3.1-8B"], RESERVED, _LARGE_V3),
    "Llama-3.1-70B-Omni": _llama_omni(llama.PRESETS["Llama-3.1-70B"], RESERVED, _LARGE_V3),
}

"""The thinker of Qwen2.5-Omni (arXiv 2503.20215): Qwen2.5 that sees, hears, and answers in text.

Checked against transformers' `Qwen2_5OmniThinkerForConditionalGeneration`. Speech, the talker's part, is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ..ops import Ops, Output
from ..specs import ParamSpec
from . import decoder, fields, qwen2, thinker
from .decoder import DecoderConfig
from .encoders import qwen2_5_audio, qwen2_5_vision

ALIASES = ("qwen2_5_omni_thinker",)
IGNORED = ("talker.", "token2wav.")
TOWERS = {"visual": qwen2_5_vision, "audio": qwen2_5_audio}
TOKENS = {
    "audio": 151646, "image": 151655, "video": 151656,
    "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "audio_start_token_id": 151647, "audio_end_token_id": 151648,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Qwen2_5OmniConfig(DecoderConfig, thinker.Senses):
    pass


def config(hf: Mapping) -> Qwen2_5OmniConfig:
    hf, root = thinker.nested(hf)
    base = qwen2.config(decoder.nested(hf, 1_000_000.0, 32768, mrope_section=[16, 24, 24]))
    visual = qwen2_5_vision.config(fields.read(hf, "vision_config"), projections=("q", "k", "v"))
    audio = qwen2_5_audio.config(fields.read(hf, "audio_config"))
    more = thinker.senses(hf, root, base, visual, audio, TOKENS)
    chunk = int(more["rate"] * fields.number(hf, "seconds_per_chunk", 2))
    return Qwen2_5OmniConfig(**vars(base) | more, chunk=chunk)


def specs(cfg: Qwen2_5OmniConfig) -> dict[str, ParamSpec]:
    return thinker.specs(cfg, TOWERS) | decoder.specs(cfg)


def forward(p: Mapping[str, Tensor], batch: Mapping[str, Tensor], cfg: Qwen2_5OmniConfig, ops: Ops) -> Output:
    return decoder.forward(p, thinker.sense(p, batch, cfg, ops, TOWERS), cfg, ops)


blanks, prepare, examples = (
    partial(function, towers=TOWERS) for function in (thinker.blanks, thinker.prepare, thinker.examples)
)


def _qwen2_5_omni(text: Mapping, visual: Mapping, audio: Mapping, **other) -> dict:
    return {
        "architectures": ["Qwen2_5OmniForConditionalGeneration"],
        "model_type": "qwen2_5_omni",
        "enable_audio_output": False,
        "thinker_config": {
            "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"],
            "model_type": "qwen2_5_omni_thinker",
            "audio_token_index": 151646,
            "image_token_index": 151655,
            "video_token_index": 151656,
            **{key: token for key, token in TOKENS.items() if key in thinker.MARKS},
            "position_id_per_seconds": 25,
            "seconds_per_chunk": 2,
            "text_config": {
                "model_type": "qwen2_5_omni_text",
                "hidden_act": "silu",
                "max_position_embeddings": 32768,
                "rms_norm_eps": 1e-6,
                "initializer_range": 0.02,
                "rope_theta": 1000000.0,
                "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
                "use_sliding_window": False,
                "sliding_window": 32768,
                "tie_word_embeddings": False,
                **text,
            },
            "vision_config": {
                "model_type": "qwen2_5_omni_vision_encoder",
                "depth": 32,
                "hidden_act": "silu",
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "in_channels": 3,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
                "out_hidden_size": text["hidden_size"],
                **visual,
            },
            "audio_config": {
                "model_type": "qwen2_5_omni_audio_encoder",
                "d_model": 1280,
                "encoder_layers": 32,
                "encoder_attention_heads": 20,
                "encoder_ffn_dim": 5120,
                "num_mel_bins": 128,
                "n_window": 100,
                "max_source_positions": 1500,
                "output_dim": text["hidden_size"],
                **audio,
            },
            **other,
        },
    }


def _text(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "max_window_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


PRESETS = {
    "qwen2.5-omni-tiny": _qwen2_5_omni(
        _text(48, 80, 2, 4, 2, 320)
        | {"rope_theta": 10000.0, "rope_scaling": {"mrope_section": [1, 2, 3], "rope_type": "default"}},
        {"depth": 2, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "patch_size": 4}
        | {"window_size": 16, "fullatt_block_indexes": [1]},
        {"d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 40}
        | {"num_mel_bins": 11, "n_window": 10},
        **thinker.TINY, audio_token_index=313, image_token_index=314, video_token_index=315, seconds_per_chunk=1,
    ),
    "Qwen2.5-Omni-3B": _qwen2_5_omni(_text(2048, 11008, 36, 16, 2, 151936), {}, {}),
    "Qwen2.5-Omni-7B": _qwen2_5_omni(_text(3584, 18944, 28, 28, 4, 152064), {}, {}),
}  # fmt: skip

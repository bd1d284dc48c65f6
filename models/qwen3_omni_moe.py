"""The thinker of Qwen3-Omni (arXiv 2509.17765): Qwen3 with a mixture of experts that sees, hears, and answers in text.

Checked against transformers' `Qwen3OmniMoeThinkerForConditionalGeneration`. Speech, the talker's part, is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ..ops import Ops, Output
from ..specs import ParamSpec
from . import decoder, fields, qwen3_moe, thinker
from .encoders import qwen3_audio, qwen3_vision

ALIASES = ("qwen3_omni_moe_thinker",)
IGNORED = ("talker.", "code2wav.")
TOWERS = {"visual": qwen3_vision, "audio": qwen3_audio}
TOKENS = {
    "audio": 151646, "image": 151655, "video": 151656,
    "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "audio_start_token_id": 151647, "audio_end_token_id": 151670,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Qwen3OmniMoeConfig(qwen3_moe.MoeConfig, thinker.Senses):
    pass


def config(hf: Mapping) -> Qwen3OmniMoeConfig:
    hf, root = thinker.nested(hf)
    text = {"norm_topk_prob": True, **decoder.nested(hf, 1_000_000.0, 32768, mrope_section=[24, 20, 20])}
    text["rope_parameters"]["mrope_interleaved"] = True  # whatever it says
    base = qwen3_moe.config({**text, "use_sliding_window": False})
    names = {"mergers": "merger_list", "merger": ("ln_q", "mlp.0", "mlp.2")}
    visual = qwen3_vision.config(fields.read(hf, "vision_config"), **names)
    if len(visual.deepstack) > base.layers:
        fields.refuse("deepstack_visual_indexes", visual.deepstack, f"as many as num_hidden_layers = {base.layers}")
    audio = qwen3_audio.config(fields.read(hf, "audio_config"))
    more = thinker.senses(hf, root, base, visual, audio, TOKENS)
    return Qwen3OmniMoeConfig(**vars(base) | more, exact=True)


def specs(cfg: Qwen3OmniMoeConfig) -> dict[str, ParamSpec]:
    return thinker.specs(cfg, TOWERS) | qwen3_moe.specs(cfg)


def forward(p: Mapping[str, Tensor], batch: Mapping[str, Tensor], cfg: Qwen3OmniMoeConfig, ops: Ops) -> Output:
    return qwen3_moe.forward(p, thinker.sense(p, batch, cfg, ops, TOWERS), cfg, ops)


blanks, prepare, examples = (
    partial(function, towers=TOWERS) for function in (thinker.blanks, thinker.prepare, thinker.examples)
)


def _qwen3_omni_moe(text: Mapping, visual: Mapping, audio: Mapping, **other) -> dict:
    return {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "model_type": "qwen3_omni_moe",
        "enable_audio_output": False,
        "thinker_config": {
            "architectures": ["Qwen3OmniMoeThinkerForConditionalGeneration"],
            "model_type": "qwen3_omni_moe_thinker",
            "audio_token_id": 151675,
            "image_token_id": 151655,
            "video_token_id": 151656,
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
            "audio_start_token_id": 151669,
            "audio_end_token_id": 151670,
            "position_id_per_seconds": 13,
            "text_config": {
                "model_type": "qwen3_omni_moe_text",
                "vocab_size": 152064,
                "hidden_size": 2048,
                "intermediate_size": 768,
                "moe_intermediate_size": 768,
                "num_hidden_layers": 48,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "norm_topk_prob": True,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "router_aux_loss_coef": 0.001,
                "hidden_act": "silu",
                "max_position_embeddings": 65536,
                "rms_norm_eps": 1e-6,
                "initializer_range": 0.02,
                "rope_theta": 1000000.0,
                "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
                "attention_bias": False,
                **text,
            },
            "vision_config": {
                "model_type": "qwen3_omni_moe_vision_encoder",
                "depth": 27,
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_heads": 16,
                "in_channels": 3,
                "patch_size": 16,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [8, 16, 24],
                "out_hidden_size": 2048,
                **visual,
            },
            "audio_config": {
                "model_type": "qwen3_omni_moe_audio_encoder",
                "d_model": 1280,
                "encoder_layers": 32,
                "encoder_attention_heads": 20,
                "encoder_ffn_dim": 5120,
                "num_mel_bins": 128,
                "downsample_hidden_size": 480,
                "n_window": 50,
                "n_window_infer": 800,
                "max_source_positions": 1500,
                "output_dim": 2048,
                **audio,
            },
            **other,
        },
    }


_TINY_TEXT = {
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "num_experts": 8, "num_experts_per_tok": 2,
    "rope_theta": 10000.0,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [2, 2, 2], "rope_type": "default"},
}  # fmt: skip
_TINY_VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "patch_size": 4, "out_hidden_size": 48,
    "num_position_embeddings": 25, "deepstack_visual_indexes": [0],
}  # fmt: skip
_TINY_AUDIO = {
    "d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 40, "num_mel_bins": 11,
    "downsample_hidden_size": 4, "n_window_infer": 200, "output_dim": 48,
}  # fmt: skip

PRESETS = {
    "qwen3-omni-moe-tiny": _qwen3_omni_moe(
        _TINY_TEXT, _TINY_VISION, _TINY_AUDIO,
        **thinker.TINY, audio_token_id=313, image_token_id=314, video_token_id=315,
    ),
    "Qwen3-Omni-30B-A3B": _qwen3_omni_moe({}, {}, {}),
}  # fmt: skip

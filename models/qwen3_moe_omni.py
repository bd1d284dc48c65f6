"""Qwen3-MoE that sees, hears and draws, among VeOmni's recipes (arXiv 2508.02317).

A composition (omni.py) of Qwen3-MoE with Qwen2.5-Omni's towers for images and sounds, and a decoder of images as
discrete codes, which an encoder of codes feeds back: `drawn`, an image's codes, are read at its placeholder tokens, and
each is the target of the token before it.
"""

from collections.abc import Mapping

import torch

from ..loss import IGNORE
from . import omni, qwen3_moe
from .drawing import next_codes
from .encoders import codes, qwen2_5_audio, qwen2_5_vision
from .omni import blanks, forward, sources, specs, targets, weights  # noqa: F401 - a composition's


def config(hf: Mapping) -> omni.OmniConfig:
    cfg = omni.config(hf, "qwen3_moe")
    for kind, name in (("encoders", "drawn"), ("decoders", "drawing")):
        if name not in getattr(cfg, kind):
            raise ValueError(f"the {kind} of qwen3_moe_omni lack {name!r}: without it, take model_type omni")
    return cfg


def prepare(inputs: Mapping, cfg: omni.OmniConfig) -> dict:
    """As a composition's, with the targets that follow from `drawn` where `drawing.labels` are not given: there, the
    text has none. Raises ValueError also where an image that is drawn has no token before it."""
    batch = omni.prepare(inputs, cfg)
    if "drawing.labels" in inputs or "drawn" not in batch["items"]:
        return batch
    labels = next_codes(batch["segment_ids"], batch["items"]["drawn"])
    batch["drawing.labels"] = labels
    if "labels" in batch:
        batch["labels"] = batch["labels"].masked_fill(labels != IGNORE, IGNORE)
    return batch


def examples(cfg: omni.OmniConfig, generator: torch.Generator) -> list[dict]:
    """As a composition's, whose targets are what is drawn."""
    found = omni.examples(cfg, generator)
    return [{key: value for key, value in inputs.items() if key != "drawing.labels"} for inputs in found]


def _qwen3_moe_omni(foundation: Mapping, tokens: Mapping, eye: Mapping, ear: Mapping, hand: Mapping) -> dict:
    parts = {
        "image": {"type": "qwen2_5_vision", "config": eye},
        "audio": {"type": "qwen2_5_audio", "config": ear},
        "drawn": {"type": "codes", "projector": "none", "config": hand},
    }
    return {
        "model_type": "qwen3_moe_omni",
        "foundation": foundation,
        "encoders": {name: {**part, "placeholder": tokens[name]} for name, part in parts.items()},
        "decoders": {"drawing": {"type": "codes", "config": hand}},
    }


_TINY = {
    "model_type": "qwen3_moe", "vocab_size": 300, "hidden_size": 40, "intermediate_size": 72, "head_dim": 12,
    "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True, "rope_theta": 10000.0,
}  # fmt: skip
_EYE = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": 3584,
}  # fmt: skip
_EAR = {
    "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "num_mel_bins": 128,
    "n_window": 100, "output_dim": 3584,
}  # fmt: skip
_HAND = {"num_embeddings": 16384, "embed_dim": 8, "projection_dim": 2048}

PRESETS = {
    "qwen3-moe-omni-tiny": _qwen3_moe_omni(
        _TINY, {"image": 7, "audio": 8, "drawn": 9},
        qwen2_5_vision.TINY, qwen2_5_audio.TINY, codes.TINY | {"projection_dim": 40},
    ),
    # Tokens that are in Qwen3's vocabulary and in no text: <|image_pad|>, one that it leaves free, <|vision_pad|>.
    "Qwen3-30B-A3B-Omni": _qwen3_moe_omni(
        qwen3_moe.PRESETS["Qwen3-30B-A3B"], {"image": 151655, "audio": 151675, "drawn": 151654}, _EYE, _EAR, _HAND
    ),
}  # fmt: skip

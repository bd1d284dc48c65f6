"""Qwen3-VL: Qwen3 that sees images and videos, of which several layers of the encoder reach the first layers of the
decoder (deepstack). Checked against transformers' `Qwen3VLForConditionalGeneration`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..items import Item
from ..ops import Ops, Output, layer_params
from ..specs import ParamSpec
from . import decoder, fields, qwen2_vl, qwen3
from .decoder import DecoderConfig
from .encoders import qwen3_vision as vision

NAMES = {"prefix": "model.language_model", "head": "lm_head.weight"}


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What these families have beside their decoder's fields."""

    vision: vision.VisionConfig
    tokens: Mapping[str, int]  # the placeholders, of "image" and of "video"
    rate: None = None  # time is told by the text


@dataclass(frozen=True, kw_only=True)
class Qwen3VLConfig(DecoderConfig, Sight):
    pass


def text_config(hf: Mapping) -> dict:
    """The decoder's config, with transformers' defaults."""
    text = decoder.nested(hf, 500_000.0, 128_000, mrope_section=[24, 20, 20])
    text["rope_parameters"]["mrope_interleaved"] = True  # whatever it says
    return text


def sight(hf: Mapping, base: DecoderConfig) -> dict[str, Any]:
    """The fields of `Sight`, checked against those of the decoder."""
    seen = vision.config(fields.read(hf, "vision_config"))
    if seen.width != base.hidden:
        fields.refuse("out_hidden_size", seen.width, f"the decoder's hidden_size = {base.hidden}")
    if len(seen.deepstack) > base.layers:
        deep = list(seen.deepstack)
        fields.refuse("deepstack_visual_indexes", deep, f"at most num_hidden_layers = {base.layers} layers")
    return {"vision": seen, "tokens": qwen2_vl.placeholders(hf, base.vocab)}


def config(hf: Mapping) -> Qwen3VLConfig:
    base = qwen3.config(text_config(hf))
    return Qwen3VLConfig(**{**vars(base), **NAMES, **sight(hf, base)})


def specs(cfg: Qwen3VLConfig) -> dict[str, ParamSpec]:
    return vision.specs(cfg.vision, "model.visual") | decoder.specs(cfg)


def blanks(cfg: Sight) -> dict[str, Item]:
    return {"visual": vision.blank(cfg.vision)}


def forward(p: Mapping[str, Tensor], batch: Mapping[str, Tensor], cfg: Qwen3VLConfig, ops: Ops) -> Output:
    return decoder.forward(p, see(p, batch, cfg, ops), cfg, ops)


def see(p: Mapping[str, Tensor], batch: Mapping[str, Tensor], cfg: Sight, ops: Ops) -> dict:
    """The batch with what the decoder takes of the encoder."""
    seen = vision.encode(p, "model.visual", layer_params(batch, "visual"), cfg.vision, ops)
    last, *deep = ops.place(seen, batch, "visual").unbind(2)
    return {**batch, "embeddings": last, "placed": batch["visual.source"] >= 0, "deep": deep}


def prepare(inputs: Mapping, cfg: Sight) -> dict:
    """As Qwen2-VL's, each frame of a video a span of its own: between them stands their time, as text."""
    if inputs.get("video_grid_thw") is not None:
        grids = torch.as_tensor(inputs["video_grid_thw"])
        alone = grids.repeat_interleave(grids[:, 0], 0)
        inputs = {**inputs, "video_grid_thw": torch.cat([torch.ones_like(alone[:, :1]), alone[:, 1:]], 1)}
    return qwen2_vl.prepare(inputs, cfg, vision)


def examples(cfg: Sight, generator: torch.Generator) -> list[dict]:
    """As Qwen2-VL's."""
    return [_apart(example, cfg) for example in qwen2_vl.examples(cfg, generator)]


def _apart(example: dict, cfg: Sight) -> dict:
    """Qwen2-VL's example with a token of text before each frame of a video but the first."""
    ids, kinds, start = example["input_ids"][0].tolist(), example["mm_token_type_ids"][0].tolist(), 0
    for t, h, w in example.get("video_grid_thw", torch.zeros(0, 3, dtype=torch.long)).tolist():
        start = ids.index(cfg.tokens["video"], start)
        for _ in range(t):
            start += h * w // cfg.vision.group
            ids.insert(start, 1)
            kinds.insert(start, 0)
            start += 1
    ids, kinds = torch.tensor([ids]), torch.tensor([kinds])
    return {**example, "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}


def published(family: str, text: Mapping, seen: Mapping, tied: bool) -> dict:
    """A config.json as published: `family` as in the names of transformers' classes."""
    name = {"Qwen3VL": "qwen3_vl", "Qwen3VLMoe": "qwen3_vl_moe"}[family]
    return {
        "architectures": [f"{family}ForConditionalGeneration"],
        "model_type": name,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "tie_word_embeddings": tied,
        "text_config": {
            "model_type": f"{name}_text",
            "vocab_size": 151936,
            "head_dim": 128,
            "num_key_value_heads": 8,
            "hidden_act": "silu",
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.02,
            "rope_theta": 5000000,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "tie_word_embeddings": tied,
            **text,
        },
        "vision_config": {
            "model_type": name,
            "hidden_act": "gelu_pytorch_tanh",
            "initializer_range": 0.02,
            "in_channels": 3,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": text["hidden_size"],
            **seen,
        },
    }


SMALL = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
LARGE = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}


def tiny(family: str, **text) -> dict:
    """Small enough to learn something in seconds on a CPU."""
    text = {
        "vocab_size": 512, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 96, "max_position_embeddings": 2048,
        "rope_theta": 10000, "bos_token_id": None, "eos_token_id": None,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [2, 2, 2], "rope_type": "default"}, **text,
    }  # fmt: skip
    seen = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 56, "num_heads": 4, "num_position_embeddings": 36,
        "patch_size": 4, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return published(family, text, seen, tied=True) | {token: 508 + i for i, token in enumerate(tokens)}


def _qwen3_vl(hidden: int, inner: int, layers: int, heads: int, seen: Mapping, tied: bool) -> dict:
    text = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return published("Qwen3VL", {**text, "num_attention_heads": heads}, seen, tied)


PRESETS = {
    "qwen3-vl-tiny": tiny("Qwen3VL"),
    "Qwen3-VL-2B": _qwen3_vl(2048, 6144, 28, 16, SMALL, tied=True),
    "Qwen3-VL-4B": _qwen3_vl(2560, 9728, 36, 32, SMALL, tied=True),
    "Qwen3-VL-8B": _qwen3_vl(4096, 12288, 36, 32, LARGE, tied=False),
    "Qwen3-VL-32B": _qwen3_vl(5120, 25600, 64, 64, LARGE, tied=False),
}

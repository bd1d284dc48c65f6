"""Qwen2.5-VL (arXiv 2502.13923): Qwen2-VL with windows in its vision tower, and videos' positions in seconds.

Checked against transformers' `Qwen2_5_VLForConditionalGeneration`.
"""

from collections.abc import Mapping
from functools import partial

from . import fields, qwen2_vl
from .encoders import qwen2_5_vision
from .qwen2_vl import examples  # noqa: F401 - the same kinds of samples


def config(hf: Mapping) -> qwen2_vl.VLConfig:
    rate = fields.number(fields.read(hf, "vision_config"), "tokens_per_second", 4)
    return qwen2_vl.config(hf, qwen2_5_vision, rate)


specs, blanks, forward, prepare = (
    partial(function, tower=qwen2_5_vision)
    for function in (qwen2_vl.specs, qwen2_vl.blanks, qwen2_vl.forward, qwen2_vl.prepare)
)


def _qwen2_5_vl(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vision: Mapping, **other) -> dict:
    of_family = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
    more = {"max_position_embeddings": 128000, **of_family, **other}
    return qwen2_vl.published(hidden, inner, layers, heads, kv_heads, vision, **more)


def _tower(inner: int, out: int) -> dict:
    return {
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": inner,
        "out_hidden_size": out,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    }


_TINY_TOWER = {
    "hidden_size": 32, "intermediate_size": 40, "window_size": 16, "fullatt_block_indexes": [1], "out_hidden_size": 48
}  # fmt: skip

PRESETS = {
    "qwen2.5-vl-tiny": _qwen2_5_vl(
        48, 80, 2, 4, 2, {**_tower(40, 48), **_TINY_TOWER, **qwen2_vl.TINY_VISION}, **qwen2_vl.TINY
    ),
    "Qwen2.5-VL-3B": _qwen2_5_vl(
        2048, 11008, 36, 16, 2, _tower(3420, 2048), vocab_size=151936, tie_word_embeddings=True
    ),
    "Qwen2.5-VL-7B": _qwen2_5_vl(3584, 18944, 28, 28, 4, _tower(3420, 3584)),
    "Qwen2.5-VL-32B": _qwen2_5_vl(5120, 27648, 64, 40, 8, _tower(3456, 5120)),
    "Qwen2.5-VL-72B": _qwen2_5_vl(8192, 29568, 80, 64, 8, _tower(3456, 8192)),
}

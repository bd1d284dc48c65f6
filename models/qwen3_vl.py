"""Qwen3-VL: Qwen3 that sees images and videos, of which several layers of the encoder reach the first layers of the
decoder (deepstack). Checked against transformers' `Qwen3VLForConditionalGeneration`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..items import Item, seat
from ..ops import Ops, Output, fill_batch
from ..specs import ParamSpec
from . import decoder, fields, qwen3
from .decoder import DecoderConfig
from .encoders import qwen3_vision as vision
from .mrope import coordinates, grid

TEXT, IMAGE, VIDEO = range(3)  # kinds of tokens
NAMES = {"prefix": "model.language_model", "head": "lm_head.weight"}
INPUTS = ((IMAGE, "pixel_values", "image_grid_thw"), (VIDEO, "pixel_values_videos", "video_grid_thw"))


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What these families have beside their decoder's fields."""

    vision: vision.VisionConfig
    image_token: int
    video_token: int


@dataclass(frozen=True, kw_only=True)
class Qwen3VLConfig(DecoderConfig, Sight):
    pass


def text_config(hf: Mapping) -> dict:
    """The decoder's config: the nested one, with transformers' defaults, tied where the whole says so."""
    text = fields.read(hf, "text_config")
    turned = text.get("rope_scaling") or text.get("rope_parameters") or {}
    sections = {"mrope_section": [24, 20, 20], **turned, "mrope_interleaved": True}  # interleaved whatever it says
    sections.setdefault("rope_theta", fields.read(text, "rope_theta", 500_000.0))
    rest = {key: value for key, value in text.items() if key not in ("rope_scaling", "rope_parameters")}
    tied = fields.flag(hf, "tie_word_embeddings", False)
    return {"max_position_embeddings": 128_000, **rest, "rope_parameters": sections, "tie_word_embeddings": tied}


def sight(hf: Mapping, base: DecoderConfig) -> dict[str, Any]:
    """The fields of `Sight`, checked against those of the decoder."""
    seen = vision.config(fields.read(hf, "vision_config"))
    if seen.width != base.hidden:
        fields.refuse("out_hidden_size", seen.width, f"the decoder's hidden_size = {base.hidden}")
    if len(seen.deepstack) > base.layers:
        fields.refuse("deepstack_visual_indexes", list(seen.deepstack), f"as many as num_hidden_layers = {base.layers}")
    tokens = {}
    for kind, default in (("image", 151655), ("video", 151656)):
        tokens[f"{kind}_token"] = token = fields.size(hf, f"{kind}_token_id", default)
        if token >= base.vocab:
            fields.refuse(f"{kind}_token_id", token, f"below vocab_size = {base.vocab}")
    return {"vision": seen, **tokens}


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
    packed = {name.removeprefix("visual."): t for name, t in batch.items() if name.startswith("visual.")}
    levels = ops.place(vision.encode(p, "model.visual", packed, cfg.vision, ops), batch, "visual").unbind(2)
    return {**batch, "embeddings": levels[0], "placed": batch["visual.source"] >= 0, "deep": levels[1:]}


# --- From a processor's output to a batch


def prepare(inputs: Mapping, cfg: Sight) -> dict:
    """Raises ValueError where images or videos do not match their placeholder tokens."""
    given = inputs.get("position_ids")
    # [B, S]; or one for each axis; or the place in the document, then one for each axis
    text = {key: inputs[key] for key in ("input_ids", "labels", "attention_mask", "segment_ids") if key in inputs}
    if given is not None and (given.ndim == 2 or len(given) == 4):
        text["position_ids"] = given if given.ndim == 2 else given[0]
    batch = fill_batch(text)
    ids = batch["input_ids"]
    kinds = torch.zeros_like(ids)
    for kind, token in ((IMAGE, cfg.image_token), (VIDEO, cfg.video_token)):
        kinds[(ids == token) & (batch["segment_ids"] >= 0)] = kind

    found, grids = [], {}
    for kind, pixels, thw in INPUTS:
        made, sizes = [], inputs.get(thw)
        if inputs.get(pixels) is not None:
            if sizes is None:
                raise ValueError(f"{pixels} come without {thw}, which says how many patches high and wide each is")
            made = vision.from_processor(inputs[pixels], sizes, cfg.vision)
        found += seat(made, (kinds.flatten() == kind).nonzero()[:, 0], pixels)
        # Each frame is a span of its own, with text between that tells its time.
        frames = torch.as_tensor(sizes).tolist() if made else []
        grids[kind] = iter([(h // cfg.vision.merge, w // cfg.vision.merge) for t, h, w in frames for _ in range(t)])
    if given is None:
        at = torch.stack([_row(*row, grids) for row in zip(kinds.cpu(), batch["segment_ids"].cpu())]).to(ids.device)
    else:
        at = given[..., None].expand(*given.shape, 3) if given.ndim == 2 else given[-3:].permute(1, 2, 0)
    return {**batch, "position_ids": at, "items": {"visual": found}}


def _row(kinds: Tensor, segments: Tensor, grids: Mapping) -> Tensor:
    """Positions [S, 3] of a row, each document's from 0 on; of padding 0."""
    runs, lengths = torch.unique_consecutive(torch.stack([segments, kinds]), return_counts=True, dim=1)
    row = []
    for segment, document in groupby(zip(*runs.tolist(), lengths.tolist()), key=lambda run: run[0]):
        pieces = [piece for _, kind, n in document for piece in ([n] if kind == TEXT else _frames(n, grids[kind]))]
        row.append(coordinates(pieces) if segment >= 0 else torch.zeros(sum(pieces), 3, dtype=torch.long))
    return torch.cat(row)


def _frames(tokens: int, grids) -> list[Tensor]:
    """The coordinates of the images or frames that a run of placeholder tokens stands for."""
    pieces, rest = [], tokens
    while rest > 0:
        h, w = next(grids)
        rest -= h * w
        pieces.append(grid(1, h, w))
    if rest:
        raise ValueError(f"a run of {tokens} placeholder tokens ends within an image or frame, of {h * w} tokens")
    return pieces


# --- Samples and presets


def examples(cfg: Sight, generator: torch.Generator) -> list[dict]:
    """Text alone, an image, two images, a video, an image and a video."""
    return [_sample(kinds, cfg, generator) for kinds in ([], [IMAGE], [IMAGE, IMAGE], [VIDEO], [IMAGE, VIDEO])]


def _sample(kinds: list[int], cfg: Sight, generator: torch.Generator) -> dict:
    special, made = (cfg.image_token, cfg.video_token), {IMAGE: [], VIDEO: []}

    def words(least: int) -> list[int]:
        n = least + int(torch.randint(6, (), generator=generator))
        drawn = torch.randint(cfg.vocab, (n,), generator=generator).tolist()
        return [0 if token in special else token for token in drawn]

    ids = words(4)
    for kind in kinds:
        raw = vision.example(cfg.vision, generator, video=kind == VIDEO)
        patches, (t, h, w) = vision.patches(raw, cfg.vision)
        made[kind].append((patches, (t, h, w)))
        for _ in range(t):
            ids += [special[kind - 1]] * (h * w // cfg.vision.merge**2) + words(1)
    tokens = torch.tensor([ids])
    out = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    out["mm_token_type_ids"] = IMAGE * (tokens == special[0]) + VIDEO * (tokens == special[1])
    for kind, pixels, thw in INPUTS:
        if made[kind]:
            patches, grids = zip(*made[kind])
            out |= {pixels: torch.cat(patches), thw: torch.tensor(grids)}
    return out


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

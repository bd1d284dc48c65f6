"""Qwen2-VL (arXiv 2409.12191): Qwen2 that sees images and videos. Checked against transformers'
`Qwen2VLForConditionalGeneration`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..items import Item, seat
from ..ops import Ops, Output, layer_params
from ..specs import ParamSpec
from . import decoder, fields, mrope, processor, qwen2
from .decoder import DecoderConfig
from .encoders import qwen2_vision
from .processor import PICTURES

@dataclass(frozen=True, kw_only=True)
class VLConfig(DecoderConfig):
    vision: qwen2_vision.VisionConfig
    tokens: Mapping[str, int]  # the placeholder of each of PICTURES
    rate: float | None = None  # how far a video's positions go on in a second; None: by one in a step


def config(hf: Mapping, tower: ModuleType = qwen2_vision, rate: float | None = None) -> VLConfig:
    """From the published config, or from transformers 5's, whose text part is nested."""
    text = dict(hf.get("text_config") or hf)
    text["tie_word_embeddings"] = any(fields.flag(part, "tie_word_embeddings", False) for part in (hf, text))
    base = qwen2.config({"rms_norm_eps": 1e-5, "rope_theta": 1e6, **text})  # transformers' defaults
    if not base.rope.axes or max(base.rope.axes) > 2:
        axes = sorted(set(base.rope.axes)) or None
        fields.refuse("mrope_section", axes, "three numbers, of the pairs that time, height and width turn")
    vision = tower.config(fields.read(hf, "vision_config"))
    if vision.width != base.hidden:
        fields.refuse("hidden_size", base.hidden, f"{vision.width}, the width of what the vision tower gives")
    return VLConfig(**vars(base), vision=vision, tokens=placeholders(hf, base.vocab), rate=rate)


def placeholders(hf: Mapping, vocab: int) -> dict[str, int]:
    """The token that stands for each of PICTURES."""
    tokens = {kind: fields.size(hf, f"{kind}_token_id", 151655 + i) for i, kind in enumerate(PICTURES)}
    for kind, token in tokens.items():
        if token >= vocab or list(tokens.values()).count(token) > 1:
            fields.refuse(f"{kind}_token_id", token, f"a token of its own below vocab_size = {vocab}")
    return tokens


def specs(cfg: VLConfig, tower: ModuleType = qwen2_vision) -> dict[str, ParamSpec]:
    return tower.specs(cfg.vision, "visual") | decoder.specs(cfg)


def blanks(cfg: VLConfig, tower: ModuleType = qwen2_vision) -> dict[str, Item]:
    return {"visual": tower.blank(cfg.vision)}


def forward(
    p: Mapping[str, Tensor], batch: Mapping[str, Tensor], cfg: VLConfig, ops: Ops, tower: ModuleType = qwen2_vision
) -> Output:
    seen = tower.encode(p, "visual", layer_params(batch, "visual"), cfg.vision, ops)
    embeddings, placed = ops.place(seen, batch, "visual"), batch["visual.source"] >= 0
    return decoder.forward(p, {**batch, "embeddings": embeddings, "placed": placed}, cfg, ops)


def prepare(inputs: Mapping, cfg: VLConfig, tower: ModuleType = qwen2_vision) -> dict:
    """What transformers' processor gives -> the batch: input_ids and segment_ids [B, S], position_ids [B, S, 3], items.

    position_ids may be given as transformers has them: [B, S], [3, B, S], or [4, B, S] with those of text first.
    Raises ValueError where the placeholder tokens are not those of the images and videos.
    """
    batch = processor.text(inputs)
    ids, valid = batch["input_ids"], batch["segment_ids"] >= 0
    items: list[Item] = []
    grids: dict[int, Iterator[Tensor]] = {}
    for kind, (pixels, grid) in PICTURES.items():
        tokens = ((ids == cfg.tokens[kind]) & valid).flatten().nonzero()[:, 0]
        sizes = processor.grids(inputs, kind)
        found = tower.from_processor(inputs[pixels], sizes, cfg.vision) if len(sizes) else []
        items += seat(found, tokens, kind)
        seconds = inputs.get("second_per_grid_ts") if kind == "video" else None
        grids[cfg.tokens[kind]] = iter(_coordinates(sizes.tolist(), kind, seconds, cfg))
    at = processor.coordinates(inputs)
    batch["position_ids"] = positions(ids, batch["segment_ids"], grids) if at is None else at
    return {**batch, "items": {"visual": items}}


def _coordinates(sizes: list, kind: str, seconds, cfg: VLConfig) -> list[Tensor]:
    """Each grid's tokens [n, 3], counted from its first."""
    if seconds is not None and len(seconds) != len(sizes):
        raise ValueError(f"second_per_grid_ts has {len(seconds)} numbers for {len(sizes)} videos: one each is needed")
    steps = [1.0] * len(sizes)
    if kind == "video" and cfg.rate is not None:
        steps = [cfg.rate * float(second) for second in (seconds if seconds is not None else steps)]
    m = cfg.vision.merge
    return [mrope.grid(t, h // m, w // m, step) for (t, h, w), step in zip(sizes, steps, strict=True)]


def positions(ids: Tensor, segments: Tensor, grids: Mapping[int, Iterator[Tensor]]) -> Tensor:
    """Coordinates [B, S, 3], from 0 in each segment of ids [B, S], and 0 in padding.

    grids: for each placeholder token the coordinates of its grids, in the batch's order.
    Raises ValueError where a grid's tokens do not stand together.
    """

    def of_document(row: int, here: Tensor) -> Tensor:
        return mrope.coordinates(_pieces(ids[row, here].tolist(), grids))

    return mrope.by_document(segments, of_document, torch.long)


def _pieces(tokens: list[int], grids: Mapping[int, Iterator[Tensor]]) -> Iterator[int | Tensor]:
    at = 0
    while at < len(tokens):
        token, end = tokens[at], at + 1
        if token in grids:
            piece = next(grids[token])
            end = at + len(piece)
            if tokens[at:end] != [token] * len(piece):
                raise ValueError(f"the {len(piece)} placeholder tokens {token} of a grid do not stand together")
            yield piece
        else:
            while end < len(tokens) and tokens[end] not in grids:
                end += 1
            yield end - at
        at = end


def examples(cfg: VLConfig, generator: torch.Generator) -> list[dict]:
    """One row each: text alone, an image, two, a video, and all together."""
    kinds = ((), ("image",), ("image", "image"), ("video",), ("image", "video", "image"))
    return [example(cfg, generator, kind) for kind in kinds]


def example(cfg: VLConfig, generator: torch.Generator, kinds: tuple[str, ...]) -> dict:
    """One row with these images and videos, of random sizes, between random text: as the processor gives it."""

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    m, vision = cfg.vision.merge, cfg.vision
    special = [*cfg.tokens.values(), cfg.padding]
    ordinary = torch.tensor([token for token in range(min(cfg.vocab, 1000)) if token not in special])
    row, out = [], {name: [] for names in PICTURES.values() for name in names}
    for kind in (*kinds, None):
        row.append(ordinary[draw(0, len(ordinary), int(draw(2, 9)))])
        if kind:
            pixels, grid = PICTURES[kind]
            t, (h, w) = int(draw(2, 4)) if kind == "video" else 1, (draw(1, 5, 2) * m).tolist()
            width = vision.channels * vision.frames * vision.patch**2
            out[pixels].append(torch.randn(t * h * w, width, generator=generator))
            out[grid].append(torch.tensor([[t, h, w]]))
            row.append(torch.full((t * h * w // vision.group,), cfg.tokens[kind]))
    ids = torch.cat(row)[None]
    kind_of = sum((i * (ids == cfg.tokens[kind]) for i, kind in enumerate(PICTURES, 1)), torch.zeros_like(ids))
    seconds = 0.25 + torch.rand(len(out["video_grid_thw"]), generator=generator)
    timed = {"second_per_grid_ts": seconds} if cfg.rate is not None and len(seconds) else {}
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kind_of,
        **{name: torch.cat(parts) for name, parts in out.items() if parts}, **timed,
    }  # fmt: skip


def published(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vision: Mapping, **other) -> dict:
    """A config as these models are published with."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vocab_size": 152064,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": layers,
        "tie_word_embeddings": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_config": {
            "depth": 32,
            "num_heads": 16,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **vision,
        },
        **other,
    }


# Small enough to learn in seconds.
TINY = {
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]},
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "vision_start_token_id": 508,
    "vision_end_token_id": 509,
    "image_token_id": 510,
    "video_token_id": 511,
}
TINY_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4}


def _tower(out: int) -> dict:
    return {"embed_dim": 1280, "hidden_size": out, "mlp_ratio": 4}


PRESETS = {
    "qwen2-vl-tiny": published(
        48, 80, 2, 4, 2, {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2, **TINY_VISION}, **TINY
    ),
    "Qwen2-VL-2B": published(1536, 8960, 28, 12, 2, _tower(1536), vocab_size=151936, tie_word_embeddings=True),
    "Qwen2-VL-7B": published(3584, 18944, 28, 28, 4, _tower(3584)),
    "Qwen2-VL-72B": published(8192, 29568, 80, 64, 8, _tower(8192)),
}

"""What Qwen's thinkers share: a decoder that sees and hears, films with their sound too, and answers in text.

They are published as part of a larger model, whose config has theirs under `thinker_config` and whose tensors' names
begin with `thinker.`; alone they have neither. The towers are modules of encoders/, by name: `visual` and `audio`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..items import Item, seat
from ..ops import Ops, layer_params
from ..specs import ParamSpec
from . import fields, mrope, processor
from .decoder import DecoderConfig
from .processor import PICTURES

TEXT, IMAGE, VIDEO, AUDIO = range(4)  # kinds of tokens
KINDS = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}
# What stands around pictures and sounds; around a film both do, the picture's outside.
MARKS = ("vision_start_token_id", "vision_end_token_id", "audio_start_token_id", "audio_end_token_id")

# Of the tiny presets.
TINY = {
    "vision_start_token_id": 316, "vision_end_token_id": 317, "audio_start_token_id": 318, "audio_end_token_id": 319,
    "position_id_per_seconds": 5,
}  # fmt: skip

Towers = Mapping[str, ModuleType]


@dataclass(frozen=True, kw_only=True)
class Senses:
    """What a thinker has beside its decoder's fields.

    root: what its parameters' names begin with. tokens: the placeholder of each of KINDS. rate: positions in a second.
    chunk: in films, sight and sound alternate in pieces of so many positions; None: one by one, as they come.
    exact: positions are real numbers, and the marks around a film count one by one; else they are whole, and the two
    at its start stand at one position, as do the two at its end.
    """

    root: str
    visual: Any
    audio: Any
    tokens: Mapping[str, int]
    marks: tuple[int, ...]
    rate: float
    chunk: int | None = None
    exact: bool = False


def nested(hf: Mapping) -> tuple[Mapping, str]:
    """The thinker's config, and what its parameters' names begin with."""
    within = hf.get("thinker_config")
    return (hf, "") if within is None else (within, "thinker.")


def senses(hf: Mapping, root: str, base: DecoderConfig, visual: Any, audio: Any, first: Mapping[str, int]) -> dict:
    """The fields of a decoder that `Senses` adds or changes; first: the family's defaults of tokens."""
    for tower, key, at in ((visual, "out_hidden_size", "vision"), (audio, "output_dim", "audio")):
        if tower.width != base.hidden:
            fields.refuse(key, tower.width, f"the decoder's hidden_size = {base.hidden}, in {at}_config")
    if not base.rope.axes or max(base.rope.axes) > 2:
        fields.refuse("mrope_section", None, "three numbers, of time, height and width")
    tokens = {}
    for kind in KINDS:
        key = f"{kind}_token_index" if hf.get(f"{kind}_token_id") is None else f"{kind}_token_id"
        tokens[kind] = fields.size(hf, key, first[kind])
        if tokens[kind] >= base.vocab or list(tokens.values()).count(tokens[kind]) > 1:
            fields.refuse(key, tokens[kind], f"a token of its own below vocab_size = {base.vocab}")
    marks = tuple(fields.size(hf, key, first[key]) for key in MARKS)
    return {
        "root": root, "prefix": f"{root}model", "head": f"{root}lm_head.weight", "visual": visual, "audio": audio,
        "tokens": tokens, "marks": marks, "rate": fields.number(hf, "position_id_per_seconds", 25),
    }  # fmt: skip


def specs(cfg: Senses, towers: Towers) -> dict[str, ParamSpec]:
    """Of the towers."""
    of_audio = towers["audio"].specs(cfg.audio, f"{cfg.root}audio_tower")
    return of_audio | towers["visual"].specs(cfg.visual, f"{cfg.root}visual")


def blanks(cfg: Senses, towers: Towers) -> dict[str, Item]:
    return {name: tower.blank(getattr(cfg, name)) for name, tower in towers.items()}


def sense(p: Mapping[str, Tensor], batch: Mapping[str, Tensor], cfg: Senses, ops: Ops, towers: Towers) -> dict:
    """The batch with what the decoder takes of the towers."""
    y = {}
    for name, at in (("visual", "visual"), ("audio", "audio_tower")):
        out = towers[name].encode(p, cfg.root + at, layer_params(batch, name), getattr(cfg, name), ops)
        y[name] = ops.place(out, batch, name)
    first, *deep = y["visual"].unbind(2) if y["visual"].ndim == 4 else [y["visual"]]
    placed = (batch["visual.source"] >= 0) | (batch["audio.source"] >= 0)
    return {**batch, "embeddings": first + y["audio"], "placed": placed, "deep": deep}


# --- From a processor's output to a batch


def prepare(inputs: Mapping, cfg: Senses, towers: Towers) -> dict:
    """What transformers' processor gives -> the batch: input_ids and segment_ids [B, S], position_ids [B, S, 3], items.

    Which video has a sound is read off the tokens, not `use_audio_in_video`. position_ids may be given as transformers
    has them: [B, S], [3, B, S], or [4, B, S] with those of text first.
    Raises ValueError where the placeholder tokens are not those of the images, videos and sounds.
    """
    batch = processor.text(inputs)
    ids, valid = batch["input_ids"], batch["segment_ids"] >= 0
    kinds = torch.zeros_like(ids)
    for name, kind in KINDS.items():
        kinds[(ids == cfg.tokens[name]) & valid] = kind

    items: dict[str, list[Item]] = {"visual": [], "audio": []}
    for name, kind in KINDS.items():
        if name == "audio":
            encoder, made = "audio", towers["audio"].from_processor(sounds(inputs), cfg.audio)
        else:
            encoder, grids = "visual", processor.grids(inputs, name)
            made = towers["visual"].from_processor(inputs[PICTURES[name][0]], grids, cfg.visual) if len(grids) else []
        items[encoder] += seat(made, (kinds == kind).flatten().nonzero()[:, 0], name)
    at = processor.coordinates(inputs)
    if at is None:
        at = positions(kinds, batch["segment_ids"], _pictures(inputs, cfg), cfg)
    return {**batch, "position_ids": at.float() if cfg.exact else at, "items": items}


def sounds(inputs: Mapping) -> list[Tensor]:
    """`input_features` [n, mels, frames], without what `feature_attention_mask` [n, frames] says is padding ->
    [frames, mels] of each."""
    features, heard = inputs.get("input_features"), inputs.get("feature_attention_mask")
    if features is None:
        return []
    if heard is None or (len(heard), heard.shape[-1]) != (len(features), features.shape[-1]):
        found = "missing" if heard is None else list(heard.shape)
        raise ValueError(f"feature_attention_mask is {found}: it must say which frames of input_features "
                         f"{list(features.shape)} are heard")  # fmt: skip
    return [feature.T[mask.bool()] for feature, mask in zip(features, heard, strict=True)]


def _pictures(inputs: Mapping, cfg: Senses) -> dict[int, Iterator[Tensor]]:
    """The coordinates [n, 3] of the tokens of each image, and of each video, from its first."""
    videos = processor.grids(inputs, "video")
    seconds = inputs.get("video_second_per_grid")
    seconds = torch.ones(len(videos)) if seconds is None else torch.as_tensor(seconds, dtype=torch.float32)
    if len(seconds) != len(videos):
        raise ValueError(f"video_second_per_grid has {len(seconds)} numbers for {len(videos)} videos")
    images = processor.grids(inputs, "image")
    return {
        IMAGE: iter([_coordinates(grid, torch.tensor(1.0), cfg) for grid in images.tolist()]),
        VIDEO: iter([_coordinates(*of_video, cfg) for of_video in zip(videos.tolist(), seconds, strict=True)]),
    }


def _coordinates(grid: list[int], seconds: Tensor, cfg: Senses) -> Tensor:
    t, h, w = grid
    times = torch.arange(t) * seconds * cfg.rate
    times = times if cfg.exact else times.long()
    sides = (torch.arange(n // cfg.visual.merge).to(times.dtype) for n in (h, w))
    return torch.cartesian_prod(times, *sides)


def positions(kinds: Tensor, segments: Tensor, pictures: Mapping[int, Iterator[Tensor]], cfg: Senses) -> Tensor:
    """Coordinates [B, S, 3], from 0 in each document, and 0 in padding.

    Text and sounds count along all axes alike; an image or a video spreads over them from where it starts, and so do
    both parts of a film. What follows goes on after the largest coordinate of what came last: in a film, of its last
    run of sight or of sound.
    """

    def of_document(row: int, here: Tensor) -> Tensor:
        return _document(kinds[row, here], pictures, cfg)

    return mrope.by_document(segments, of_document, torch.float32 if cfg.exact else torch.long)


def _document(kinds: Tensor, pictures: Mapping[int, Iterator[Tensor]], cfg: Senses) -> Tensor:
    spans = [[*span] for _, span in groupby(kinds.tolist(), key=lambda kind: VIDEO if kind == AUDIO else kind)]
    films = [{VIDEO, AUDIO} <= {*span} for span in spans]
    out, start = [], torch.tensor(0)
    for i, span in enumerate(spans):
        if films[i]:
            seen = torch.tensor(span) == VIDEO
            own = _placed(seen, next(pictures[VIDEO]))
            last = len(span) - int((seen != seen[-1]).nonzero()[-1]) - 1
        elif span[0] in (IMAGE, VIDEO):
            own, last = next(pictures[span[0]]), len(span)
            while len(own) < len(span):  # several, with nothing between
                own = torch.cat([own, next(pictures[span[0]]) + own.max() + 1])
            if len(own) > len(span):
                raise ValueError(f"a run of {len(span)} placeholder tokens ends within an image or a video")
        else:
            own, last = torch.arange(len(span)), len(span)
            if span[0] == TEXT and not cfg.exact:
                own[1:] -= int(i > 0 and films[i - 1])
                own[-1:] -= int(films[i + 1 : i + 2] == [True])
            own = own.clamp(min=0)[:, None].expand(-1, 3)
        out.append(own + start)
        start = out[-1][-last:].max() + 1
    return torch.cat(out)


def _placed(seen: Tensor, coordinates: Tensor) -> Tensor:
    """A film's tokens, of sight where `seen`, else of sound -> [n, 3] from its start."""
    if int(seen.sum()) != len(coordinates):
        raise ValueError(f"a film has {int(seen.sum())} placeholder tokens of a video: it must have {len(coordinates)}")
    out = coordinates.new_zeros(len(seen), 3)
    out[seen] = coordinates
    out[~seen] = torch.arange(int((~seen).sum()))[:, None].expand(-1, 3).to(out.dtype)
    return out


# --- Samples


def examples(cfg: Senses, generator: torch.Generator, towers: Towers) -> list[dict]:
    """One row each: text alone, an image, a sound, a video, a film with its sound, several of them."""
    rows = ((), ("image",), ("audio",), ("video",), ("film",), ("image", "video", "audio"), ("audio", "film", "image"))
    return [example(cfg, generator, row, towers) for row in rows]


def example(cfg: Senses, generator: torch.Generator, row: tuple[str, ...], towers: Towers) -> dict:
    """One row with these, of random sizes, between random text: as the processor gives it."""

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    def words() -> list[int]:
        drawn = draw(0, cfg.vocab, int(draw(3, 9))).tolist()
        special = {*cfg.tokens.values(), *cfg.marks, cfg.padding}
        return [0 if token in special else token for token in drawn]

    def picture(name: str) -> Tensor:
        t, (h, w) = 1 if name == "image" else int(draw(2, 4)), (draw(1, 4, 2) * cfg.visual.merge).tolist()
        width = cfg.visual.channels * cfg.visual.frames * cfg.visual.patch**2
        out[PICTURES[name][0]].append(torch.randn(t * h * w, width, generator=generator))
        out[PICTURES[name][1]].append(torch.tensor([[t, h, w]]))
        seconds = torch.rand((), generator=generator) * 8 / cfg.rate
        if name == "video":
            out["video_second_per_grid"].append(seconds[None])
        return _coordinates([t, h, w], seconds, cfg)[:, 0]

    def sound() -> int:
        heard.append(towers["audio"].example(cfg.audio, generator))
        return towers["audio"].outputs(len(heard[-1]), cfg.audio)

    look, looked, listen, listened = cfg.marks
    image, video, audio = (cfg.tokens[name] for name in KINDS)
    heard: list[Tensor] = []
    out: dict[str, list] = {name: [] for names in PICTURES.values() for name in names} | {"video_second_per_grid": []}
    ids = words()
    for name in row:
        if name == "image":
            ids += [look, *[image] * len(picture("image")), looked]
        elif name == "video":
            ids += [look, *[video] * len(picture("video")), looked]
        elif name == "audio":
            ids += [listen, *[audio] * sound(), listened]
        else:
            step = cfg.chunk or 1 / 2**10
            parts = [(time // step, False) for time in picture("video").tolist()]
            parts += [(time // step, True) for time in range(sound())]
            ids += [look, listen, *(audio if later else video for _, later in sorted(parts)), listened, looked]
        ids += words()
    tokens = torch.tensor([ids])
    made = {name: torch.cat(parts) for name, parts in out.items() if parts}
    if heard:
        mask = torch.zeros(len(heard), max(map(len, heard)), dtype=torch.long)
        for of_sound, sound_ in zip(mask, heard, strict=True):
            of_sound[: len(sound_)] = 1
        features = torch.nn.utils.rnn.pad_sequence(heard, batch_first=True).transpose(1, 2)
        made |= {"input_features": features, "feature_attention_mask": mask}
    if "film" in row:
        made["use_audio_in_video"] = True
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **made}

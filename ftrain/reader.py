"""How a conversation becomes a model's inputs: by transformers' processor where it has one for the model, or by a
tokenizer and the encoders of a composition. Either says which tokens lie in the spans of text that are learned."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from . import tokenizer
from .model import Model

KINDS = ("image", "audio", "video")
RATE = 16_000  # of sounds, where nothing says it
_MARKED = re.compile("\ue000(" + "|".join(KINDS) + ")\ue001")  # where there is no processor to say how

Span = tuple[int, int]


class Reader(NamedTuple):
    """How samples become inputs of a model.

    render: (messages, add_generation_prompt) -> text. encode: (text, spans of it, what is given) -> the model's
    inputs for one row, and which of its tokens [S] lie in the spans. kinds: what may be given, beside text.
    """

    render: Callable[[list[dict], bool], str]
    encode: Callable[[str, Sequence[Span], Mapping[str, list]], tuple[dict, torch.Tensor]]
    kinds: Sequence[str]
    rate: int  # samples of a sound, a second
    tokenizer: Any  # transformers'

    @property
    def end(self) -> str | None:
        """What ends a turn."""
        return self.tokenizer.eos_token


def make_reader(model: Model, source: Path | None) -> Reader:
    """For models that transformers has a processor for, that one; for others a tokenizer, and what the parts of a
    composition make of images and sounds. Raises FileNotFoundError and ValueError where the directory lacks one."""
    if source is None or not tokenizer.has_tokenizer(source):
        where = f"{source} has none" if source else "a preset has none"
        raise FileNotFoundError(
            f"messages need a tokenizer, and {where}: name a directory that has one with --tokenizer"
        )
    encoders = getattr(model.cfg, "encoders", None)
    if model.blanks and encoders is None:
        processor = load_processor(source)
        of, template = processor.tokenizer, processor.chat_template or processor.tokenizer.chat_template
        markers = {kind: token for kind in KINDS if (token := getattr(processor, f"{kind}_token", None))}
        hears = getattr(processor, "feature_extractor", None)
        rate = hears.sampling_rate if hears else RATE
        encode = partial(_by_processor, processor=processor, markers=markers)
        forms = (lambda message: message["content"], partial(_marked, markers))
    else:
        from transformers import AutoTokenizer

        of = AutoTokenizer.from_pretrained(source, local_files_only=True)
        parts = {name: part for name, part in (encoders or {}).items() if name.startswith(KINDS)}
        markers = {kind: f"\ue000{kind}\ue001" for kind in KINDS if any(name.startswith(kind) for name in parts)}
        rate = next((part.cfg.rate for part in parts.values() if hasattr(part.cfg, "rate")), RATE)
        encode = partial(_by_parts, tokenizer=of, encoders=parts)
        template = of.chat_template
        forms = (partial(_marked, markers), lambda message: [{"type": "text", "text": _marked(markers, message)}])
    if not template:
        return Reader(partial(_plainly, markers, of.eos_token or ""), encode, list(markers), rate, of)
    # Some templates take contents as text, some as lists, and many would leave out the other without a word.
    probe = [{"role": "user", "content": [{"type": "text", "text": "\ue002"}]}]
    for form in forms:
        render = partial(_templated, of, template, form)
        with suppress(ValueError):
            if "\ue002" in render(probe, False):
                return Reader(render, encode, list(markers), rate, of)
    raise ValueError(f"{source}: its chat template does not show what messages say")


def _templated(of, template: str, form: Callable[[Mapping], Any], messages: list[dict], prompt: bool) -> str:
    """By the chat template; form: a message -> its content as the template takes it."""
    from jinja2 import TemplateError

    messages = [{**message, "content": form(message)} for message in messages]
    try:
        return of.apply_chat_template(messages, chat_template=template, add_generation_prompt=prompt, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from None


def _plainly(markers: Mapping[str, str], end: str, messages: list[dict], prompt: bool) -> str:
    """Where there is no template: contents one after the other, the assistant's ended."""
    return "".join(_marked(markers, m) + (end if m["role"] == "assistant" else "") for m in messages)


def _marked(markers: Mapping[str, str], message: Mapping) -> str:
    return "".join(entry["text"] if entry["type"] == "text" else markers[entry["type"]] for entry in message["content"])


def _all_shown(text: str, given: Mapping[str, list], markers: Mapping[str, str]) -> None:
    for kind, marker in markers.items():
        if (n := text.count(marker)) != len(given[kind]):
            raise ValueError(f"the chat template shows {n} {kind}s of {len(given[kind])}")


_PART = {"image": "image_processor", "audio": "feature_extractor", "video": "video_processor"}


def load_processor(source: Path):
    """transformers' processor of a directory; without torchvision, all of it but videos."""
    try:
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(source, local_files_only=True)
    except ImportError as error:
        if "orchvision" not in str(error):
            raise ValueError(f"{source}: its processor cannot be made ({str(error).strip().splitlines()[0]})") from None
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{source}: its processor cannot be read ({str(error).strip().splitlines()[0]})") from None
    return _without_torchvision(source)


def _without_torchvision(source: Path):
    """transformers makes only its processors of videos from torchvision, but no processor without one of them."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    parts: dict[str, Any] = {"tokenizer": transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)}
    for name, of in (("image_processor", "AutoImageProcessor"), ("feature_extractor", "AutoFeatureExtractor")):
        try:
            parts[name] = getattr(transformers, of).from_pretrained(source, local_files_only=True)
        except (OSError, ValueError):
            pass
    config = json.loads((source / "config.json").read_text())
    cls = getattr(transformers, PROCESSOR_MAPPING_NAMES[config["model_type"]])
    # A processor holds its parts to classes of which one cannot be imported here.
    open_cls = type(cls.__name__, (cls,), {"check_argument_for_proper_class": lambda self, name, part: type(part)})
    for name in open_cls.get_attributes():
        parts.setdefault(name, None)
    return open_cls(**{name: parts[name] for name in open_cls.get_attributes()}, chat_template=_template_of(source))


def _template_of(source: Path) -> str | None:
    jinja, as_json = source / "chat_template.jinja", source / "chat_template.json"
    if jinja.is_file():
        return jinja.read_text("utf-8")
    return json.loads(as_json.read_text("utf-8"))["chat_template"] if as_json.is_file() else None


def _by_processor(
    text: str, spans: Sequence[Span], given: Mapping[str, list], *, processor, markers: Mapping[str, str]
) -> tuple[dict, torch.Tensor]:
    _all_shown(text, given, markers)
    more: dict[str, Any] = {}
    for kind, part in _PART.items():
        if given[kind] and getattr(processor, part, None) is None:
            raise ValueError(f"{kind}s need torchvision (pip install ftrain[omni])")
    if given["image"]:
        more["images"] = given["image"]
    if given["audio"]:
        more |= {"audio": given["audio"], "sampling_rate": processor.feature_extractor.sampling_rate}
    if given["video"]:
        more["videos"] = [video.frames for video in given["video"]]
        more["video_metadata"] = [
            {"total_num_frames": len(frames), "fps": fps, "frames_indices": [*range(len(frames))]}
            for frames, fps in given["video"]
        ]
        more["do_sample_frames"] = False  # they are sampled already
    inputs = dict(processor(text=[text], return_tensors="pt", add_special_tokens=False, **more))
    plain = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    special = processor.tokenizer.convert_tokens_to_ids(list(markers.values()))
    at = aligned(plain["input_ids"], inputs["input_ids"][0].tolist(), {*special})
    trained = torch.zeros(inputs["input_ids"].shape[1], dtype=torch.bool)
    for (start, end), place in zip(plain["offset_mapping"], at, strict=True):
        if place is not None:
            trained[place] = _within(text, start, end, spans)
    return inputs, trained


def _within(text: str, start: int, end: int, spans: Sequence[Span]) -> bool:
    """Whether a token is of the spans, and of no more than spaces before one, which many tokenizers join to what
    follows. Others count no spaces: a token of nothing else is where it ends."""
    return any(a < end <= b and not text[start:a].strip(" ") for a, b in spans)


def aligned(plain: Sequence[int], expanded: Sequence[int], placeholders: set[int]) -> list[int | None]:
    """Of each token of a text, where it is once placeholders were expanded; None of the placeholders.

    Raises ValueError where the text between them is not found again.
    """
    out: list[int | None] = []
    at = 0  # in `expanded`
    pieces: list[list[int]] = [[]]
    for token in plain:
        if token in placeholders:
            pieces.append([])
        else:
            pieces[-1].append(token)
    for number, piece in enumerate(pieces):
        last = len(expanded) - len(piece)
        if number:
            out.append(None)
            at = min(at + 1, last)
        places = [0] if number == 0 else [last] if number == len(pieces) - 1 else range(at, last + 1)
        at = next((p for p in places if p >= at and list(expanded[p : p + len(piece)]) == piece), -1)
        if at < 0:
            raise ValueError("the processor changes the text between its placeholders: the assistant's turns are lost")
        out += range(at, at + len(piece))
        at += len(piece)
    return out


def _by_parts(
    text: str, spans: Sequence[Span], given: Mapping[str, list], *, tokenizer, encoders: Mapping
) -> tuple[dict, torch.Tensor]:
    """For a composition: a placeholder for each output of its encoders. An encoder called image..., audio... or
    video... is for those."""
    _all_shown(text, given, {kind: f"\ue000{kind}\ue001" for kind in KINDS})
    ids: list[int] = []
    trained: list[bool] = []
    inputs: dict[str, list] = {name: [] for name in encoders}
    queues = {kind: iter(of_kind) for kind, of_kind in given.items()}
    at = 0
    for number, piece in enumerate(_MARKED.split(text)):
        if number % 2:
            found, counts = next(queues[piece]), {}
            for name, part in encoders.items():
                if name.startswith(piece):
                    raw = _raw(part, piece, found)
                    inputs[name].append(raw)
                    n = sum(item.outputs for item in part.module.items(raw, part.cfg))
                    if counts.setdefault(part.placeholder, n) != n:
                        raise ValueError(f"encoders that share placeholder {part.placeholder} differ in their outputs")
            for placeholder, n in counts.items():
                ids += [placeholder] * n
                trained += [False] * n
            at += len(piece) + 2  # the marks around it
            continue
        encoded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            ids.append(token)
            trained.append(_within(text, at + start, at + end, spans))
        at += len(piece)
    tensors = {"input_ids": torch.tensor([ids])}
    return {**tensors, **{name: raws for name, raws in inputs.items() if raws}}, torch.tensor(trained)


def _raw(part: Any, kind: str, found: Any) -> Any:
    """What an encoder takes: its module's `load` says how it is made, else an image is uint8 [H, W(, 3)], a video
    [T, H, W, 3], and a sound its samples."""
    if hasattr(part.module, "load"):
        return part.module.load(found, part.cfg)
    if kind == "image":
        return np.asarray(found.convert("L") if getattr(part.cfg, "channels", 3) == 1 else found)
    return found.frames if kind == "video" else found

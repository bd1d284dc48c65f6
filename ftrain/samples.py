"""Conversations with images, sounds and videos in them: JSONL, as users of multimodal models have it -> packed rows.

Each line is an object with `messages` ({"role", "content"}) and, where they are used, `images`, `audios` and `videos`:
lists of paths (from the file's folder), data URIs or base64. A content is a string with the markers <image>, <audio>
and <video>, or a list of {"type": "text", "text": ...}, {"type": "image"}, ..., which may name what they show themselves:
{"type": "image", "image": PATH}. Loss is taken on the assistant's turns alone.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from . import media, tokenizer
from .cache import cache_root, cached, content_hash
from .corpus import JSON_LINES
from .data import Data, collate, epoch_order, in_one_row
from .generate import complete
from .loss import IGNORE
from .model import Model
from .precision import quiet
from .reader import KINDS, Reader, Span, make_reader

HELDOUT = 0.05
_RECIPE = "samples 2"  # to change with what a sample is made into: its length is cached by it
_MARKER = re.compile("<(" + "|".join(KINDS) + ")>")
_OTHER = "\ue003"  # said in place of an answer, to find where it is


class Sample(NamedTuple):
    """messages: contents are lists of {"type", "text"}. given: of each kind, what the contents refer to, in order."""

    messages: list[dict]
    given: dict[str, list]


def are_samples(path: str | None) -> bool:
    """Whether a file holds such lines, by its first."""
    if path is None or not path.endswith(JSON_LINES) or not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        record = json.loads(first)
    except ValueError:
        return False
    return isinstance(record, dict) and "messages" in record


class Lines:
    """A file's lines, read one by one as they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path, self.starts, self.numbers, self.hashes = path, [], [], []
        at = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self.starts.append(at)
                    self.numbers.append(number)
                    self.hashes.append(content_hash(line))
                at += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def where(self, index: int) -> str:
        return f"{self.path}, line {self.numbers[index]}"

    def __getitem__(self, index: int) -> Any:
        with open(self.path, "rb") as file:
            file.seek(self.starts[index])
            line = file.readline()
        try:
            return json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.where(index)}: not valid JSON ({error})") from None


def prepare(path: str, model: Model, source: Path | None, seq_len: int, cache_dir: Path | None = None) -> Data:
    """The samples of a file, 5% of them held out, packed into rows of `seq_len`.

    source: the directory of the tokenizer or processor. Samples that are longer than a row are left out, and counted.
    The first time, every sample is prepared once to know its length, which is cached by content.
    Raises FileNotFoundError or ValueError, naming file and line, for samples that cannot be used.
    """
    lines = Lines(Path(path))
    with quiet():  # transformers imports torchao
        from transformers import __version__ as transformers_version

        read = make_reader(model, source)
    folder = lines.path.resolve().parent

    def prepared(index: int, prompt: bool = False) -> dict:
        try:
            return to_batch(model, read, parse(lines[index], read.kinds), folder, prompt)
        except (ValueError, OSError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"{lines.where(index)}: {error}") from error

    sizes = [str(media.size(r, folder)) for i in range(len(lines)) for rs in _references(lines[i]) for r in rs]
    files = [(source / name).read_bytes() for name in tokenizer.FILES if (source / name).is_file()]
    files += [Path(part.module.__file__).read_bytes() for part in getattr(model.cfg, "encoders", {}).values()]
    config = json.dumps(model.hf, sort_keys=True, default=str)
    digest = content_hash(_RECIPE, transformers_version, config, *lines.hashes, *sizes, *files)

    def measure() -> np.ndarray:
        return np.array([prepared(i)["segment_ids"].shape[1] for i in range(len(lines))], np.int64)

    lengths = cached(
        Path(cache_dir or cache_root()), f"lengths-{digest}", measure,
        lambda made, entry: np.save(entry / "lengths.npy", made), lambda entry: np.load(entry / "lengths.npy"),
    )  # fmt: skip
    fit = [i for i in range(len(lines)) if lengths[i] <= seq_len]
    if len(fit) < 2:
        shortest = int(lengths.argmin()) if len(lines) else None
        why = f"its shortest ({lines.where(shortest)}) has {lengths[shortest]} tokens" if len(lines) else "it is empty"
        raise ValueError(f"--data {path}: {len(fit)} samples fit a row of {seq_len} tokens, two are needed; {why}")
    first = prepared(fit[0])
    alone = any(name.startswith("row_") for name in first)
    chosen = {*sorted(fit, key=lambda i: (lines.hashes[i], i))[: max(round(HELDOUT * len(fit)), 1)]}
    train, heldout = (
        pack([i for i in fit if (i in chosen) is held], lengths, 1 if alone else seq_len) for held in (False, True)
    )

    def rows(numbers: Sequence[Sequence[int]]) -> dict:
        return collate([in_one_row([prepared(i) for i in row]) for row in numbers], seq_len)

    def batch(index: int, batch_size: int, seed: int) -> dict:
        epochs, at = np.divmod(np.arange(index, index + batch_size), len(train))
        return rows([train[epoch_order(len(train), seed, int(e))[a]] for e, a in zip(epochs, at, strict=True)])

    def of_heldout(batch_size: int, limit: int | None = None) -> Iterator[dict]:
        for n, start in enumerate(range(0, len(heldout), batch_size)):
            if n == limit:
                return
            yield rows(heldout[start : start + batch_size])

    def show(job, state) -> str:
        index = heldout[0][0]
        prompt = prepared(index, prompt=True)
        (tokens,) = complete(job, state, prompt, 48, [i for i in [read.tokenizer.eos_token_id] if i is not None])
        messages = parse(lines[index], read.kinds).messages
        *before, last = messages[: _last_turn(messages) + 1]
        asked = before[-1] if before else {"content": []}
        return f"{_text(asked)!r} -> {read.tokenizer.decode(tokens)!r}, where the data has {_text(last)!r}"

    left_out = f", {len(lines) - len(fit)} longer than a row left out" if len(fit) < len(lines) else ""
    full = sum(int(lengths[i]) for row in train for i in row) / (len(train) * seq_len)
    return Data(
        batch=batch, heldout=of_heldout, digest=digest,
        describe=f"{len(fit) - len(chosen):,} samples of {path} in {len(train):,} rows, {full:.0%} full, "
        f"{len(chosen):,} held out{left_out}",
        save=partial(tokenizer.save, None, source=source), sample=show,
    )  # fmt: skip


def _references(record: Any) -> list[list]:
    """What a line refers to, whole or not."""
    if not isinstance(record, dict):
        return []
    found = [record.get(f"{kind}s") for kind in KINDS]
    messages = record.get("messages")
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for entry in content if isinstance(content, list) else []:
            found.append([_named(entry)] if isinstance(entry, dict) else [])
    return [references for references in found if isinstance(references, list)]


def pack(samples: Sequence[int], lengths: np.ndarray, seq_len: int) -> list[list[int]]:
    """Samples -> rows of no more than seq_len tokens, few of them: the longest first, each into the fullest row that
    takes it. (A sample that is longer than that has a row of its own.)"""
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free tokens -> rows
    room = np.zeros(seq_len + 1, bool)  # which keys of it there are
    for sample in sorted(samples, key=lambda i: (-lengths[i], i)):
        need = min(int(lengths[sample]), seq_len)
        free = need + int(room[need:].argmax())
        if room[free]:
            row = with_room[free].pop()
            room[free] = bool(with_room[free])
            rows[row].append(sample)
        else:
            free, row = seq_len, len(rows)
            rows.append([sample])
        with_room.setdefault(free - need, []).append(row)
        room[free - need] = True
    return rows


# --- A line -> a sample


def parse(record: Any, kinds: Sequence[str]) -> Sample:
    """A line's object, its markers replaced. Raises ValueError, saying what is wrong with it."""
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise ValueError('expected an object with "messages", a list, on each line')
    waiting = {}
    for kind in KINDS:
        waiting[kind] = record.get(f"{kind}s") or []
        if not isinstance(waiting[kind], list):
            raise ValueError(f'"{kind}s" is of type {type(waiting[kind]).__name__}: it must be a list')
    marked: dict[str, list] = {kind: [] for kind in KINDS}  # None: the next of `waiting`
    messages = []
    for number, message in enumerate(record["messages"]):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{number}] must be an object with a role and a content")
        content = []
        for entry in _entries(message.get("content"), number):
            kind = entry["type"]
            if kind == "text":
                content.append({"type": "text", "text": entry["text"]})
            else:
                marked[kind].append(_named(entry))
                content.append({"type": kind})
        messages.append({**message, "content": content})
    given = {}
    for kind in KINDS:
        unnamed = sum(reference is None for reference in marked[kind])
        if unnamed != len(waiting[kind]):
            raise ValueError(f'the messages show {unnamed} <{kind}>, but "{kind}s" has {len(waiting[kind])}')
        queue = iter(waiting[kind])
        given[kind] = [next(queue) if reference is None else reference for reference in marked[kind]]
        if given[kind] and kind not in kinds:
            raise ValueError(f"the model takes no {kind}: it takes {', '.join(kinds) or 'text alone'}")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message is the assistant's: there is nothing to learn")
    return Sample(messages, given)


def _entries(content: Any, number: int) -> Iterator[dict]:
    """A content's pieces: {"type": "text", "text"} or {"type": kind, ...}."""
    if isinstance(content, str):
        for at, piece in enumerate(_MARKER.split(content)):
            if at % 2:
                yield {"type": piece}
            elif piece:
                yield {"type": "text", "text": piece}
    elif isinstance(content, list):
        for entry in content:
            kind = entry.get("type") if isinstance(entry, dict) else None
            kind = kind.removesuffix("_url") if isinstance(kind, str) else kind
            if kind == "text" and isinstance(entry.get("text"), str):
                yield entry
            elif kind in KINDS:
                yield {**entry, "type": kind}
            else:
                valid = ", ".join(("text", *KINDS))
                raise ValueError(f"messages[{number}] has an entry of type {kind!r}: valid are {valid}")
    else:
        found = type(content).__name__
        raise ValueError(f"messages[{number}] has a content of type {found}: it must be text or a list")


def _named(entry: Mapping) -> Any:
    """What an entry names itself, or None."""
    keys = [k + suffix for k in (*KINDS, "") for suffix in ("", "_url")] + ["url", "path", "base64", "bytes"]
    found = next((entry[key] for key in keys if key != "" and entry.get(key) is not None), None)
    return found.get("url") if isinstance(found, dict) and "url" in found else found


def _text(message: Mapping) -> str:
    return "".join(entry.get("text", f"<{entry['type']}>") for entry in message["content"])


# --- A sample -> a batch of one row


def to_batch(model: Model, read: Reader, sample: Sample, folder: Path, prompt: bool = False) -> dict:
    """The sample as the model's batch of one row, with labels; or, as a prompt, what comes before its last answer."""
    messages = sample.messages[: _last_turn(sample.messages)] if prompt else sample.messages
    shown = {kind: sum(entry["type"] == kind for m in messages for entry in m["content"]) for kind in KINDS}
    loads = {"image": media.image, "audio": partial(media.sound, rate=read.rate), "video": media.video}
    given = {kind: [loads[kind](r, folder) for r in sample.given[kind][: shown[kind]]] for kind in KINDS}
    text, spans = (read.render(messages, True), []) if prompt else trained_spans(read, messages)
    inputs, trained = read.encode(text, spans, given)
    ids = inputs["input_ids"]
    labels = torch.where(trained[None], ids, IGNORE)
    inputs["labels"] = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)  # of each token, the next one
    return model.prepare(inputs)


def _last_turn(messages: Sequence[Mapping]) -> int:
    return max(i for i, message in enumerate(messages) if message["role"] == "assistant")


def trained_spans(read: Reader, messages: list[dict]) -> tuple[str, list[Span]]:
    """The conversation as text, and where in it the assistant's turns are: each from what its header leaves to be
    said, to the token that ends it, included. Raises ValueError where the template leaves a turn out."""
    text = read.render(messages, False)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return text, [_span(read, messages, i, text) for i in turns]


def _span(read: Reader, messages: list[dict], i: int, text: str) -> Span:
    """Where in `text` the i-th message's turn is: a template may render the turns up to there otherwise alone."""
    other = {**messages[i], "content": [{"type": "text", "text": _OTHER}]}
    before, found, after = read.render([*messages[:i], other, *messages[i + 1 :]], False).partition(_OTHER)
    if not found:
        raise ValueError(f"the chat template does not show messages[{i}], of the assistant")
    start = len(commonprefix([text, before]))
    end = max(len(text) - len(commonprefix([text[::-1], after[::-1]])), start)
    if i and text.startswith(read.render(messages[:i], False)):
        # What the template begins an answer with is said too, unless a prompt ends with it.
        start = min(start, len(commonprefix([text, read.render(messages[:i], True)])))
    # What ends a turn follows it, in the conversation that stops here too: `end` or, if that is another, all but space.
    tail = read.render([*messages[:i], other], False).partition(_OTHER)[2]
    closing = commonprefix([text[end:], tail])
    if read.end and read.end in closing:
        return start, end + closing.index(read.end) + len(read.end)
    return start, end + len(closing.rstrip() or closing)

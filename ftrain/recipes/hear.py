"""Speech to text: Whisper tiny.en's encoder and SmolLM2-135M, both as published, joined by a trained projector.

Asterisk's recorded prompts and what they say; a tenth of the sentences are held out.
"""

import gzip
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .. import media, packaged, tokenizer
from ..cache import content_hash
from ..config import TrainConfig
from ..data import Data, collate
from ..disk import read_json
from ..generate import complete
from ..in_memory import data_of
from ..loss import IGNORE
from ..model import Model
from . import Run

DEFAULTS = {
    "steps": 150,
    "batch_size": 4,
    "seq_len": 192,
    "lr": 1e-3,
    "warmup": 10,
    "precision": "bf16",
    "compile": "off",
    "eval_every": 50,
    "save_every": 0,
    "log_every": 5,
}

SOUNDS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
TRANSCRIPTS = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
LONGEST = 12.0  # seconds of a recording: the few longer ones would fill a row alone
HELDOUT = 10  # one sentence in so many
RATE = 16_000
ROWS = 8  # transcribed at once
LANGUAGE_LR = 0.1  # beside the projector's: with so few recordings, learning to listen takes both sides
STACK = 8  # outputs of Whisper, 20 ms each, in one token
PLACEHOLDER = "<empty_output>"  # a token of SmolLM2's that no text has
BEFORE, AFTER = "<|im_start|>user\nRepeat: ", "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
NUMBERS = dict(zip("0123456789", "zero one two three four five six seven eight nine".split())) | {
    "10": "ten", "28": "twenty eight", "#": "pound", "*": "star",
}  # fmt: skip


class Clip(NamedTuple):
    """A recording at RATE samples a second, in [-1, 1], and the words said."""

    name: str
    text: str
    sound: np.ndarray

    @property
    def seconds(self) -> float:
        return len(self.sound) / RATE


def model(cfg: TrainConfig) -> dict:
    language, ear = packaged.smollm2(), packaged.whisper_tiny_en()
    return {
        "model_type": "omni",
        "foundation": str(language),
        "lr": LANGUAGE_LR,
        "encoders": {
            "audio": {
                "type": "whisper",
                "config": {**read_json(ear / "config.json"), "stack": STACK},
                "placeholder": tokenizer.load(language).token_to_id(PLACEHOLDER),
                "lr": 0.0,
                "projector": "mlp",
                "weights": str(ear),
                "weights_prefix": "model.encoder.",
            }
        },
    }


def data(cfg: TrainConfig, model: Model, source: Path | None) -> Data:
    language = Path(model.hf["weights"])
    clips, known = recordings(), tokenizer.load(language)

    def row(clip: Clip, drawn: np.random.Generator | None) -> dict:
        return prepared(clip if drawn is None else varied(clip, drawn), model, known)

    train, heldout = parted(clips)
    return data_of(
        train, heldout, row, cfg.seq_len, content_hash(repr(model.hf), *(clip.sound.tobytes() for clip in clips)),
        "recorded prompts", partial(tokenizer.save, known, source=language),
    )  # fmt: skip


def recordings() -> list[Clip]:
    """Asterisk's prompts of up to LONGEST seconds with words in them. Raises FileNotFoundError where there are none."""
    if not SOUNDS.is_dir() or not TRANSCRIPTS.is_file():
        raise FileNotFoundError(
            f"{SOUNDS if not SOUNDS.is_dir() else TRANSCRIPTS} is missing: --recipe hear trains on Asterisk's prompts, "
            "apt-get install asterisk-core-sounds-en-wav asterisk-core-sounds-en"
        )
    clips = []
    with gzip.open(TRANSCRIPTS, "rt", errors="replace") as lines:
        said = dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith(";"))
    for name, text in sorted(said.items()):
        path = SOUNDS / f"{name}.wav"
        if path.is_file() and words(text):
            clip = Clip(name, " ".join(words(text)), media.sound(path.name, path.parent, RATE))
            clips += [clip] if clip.seconds <= LONGEST else []
    return clips


def words(text: str) -> list[str]:
    """What is said, in lower case: numbers written out, without what stands in brackets."""
    text = re.sub(r"\[.*?\]|\(\D.*?\)", " ", text.lower()).replace("’", "'")
    return [NUMBERS.get(word, word) for word in re.findall(r"[a-z]+(?:['.][a-z]+)*|\d+|[#*]", text)]


def parted(clips: Sequence[Clip]) -> tuple[list[Clip], list[Clip]]:
    """Trained on, held out: by what is said, so that no held-out sentence is trained on in another recording."""
    held = {clip.text for clip in clips if int(content_hash(clip.text)[:8], 16) % HELDOUT == 0}
    return [clip for clip in clips if clip.text not in held], [clip for clip in clips if clip.text in held]


def varied(clip: Clip, drawn: np.random.Generator) -> Clip:
    """Up to a sixth faster, louder or softer, with a little noise."""
    sound = media.resampled(clip.sound, round(RATE * drawn.choice([1.0, 1.05, 1.1, 1.15])), RATE)
    noise = drawn.standard_normal(len(sound)).astype(np.float32) * 10 ** drawn.uniform(-4, -2)
    return clip._replace(sound=sound * np.float32(drawn.uniform(0.5, 1.5)) + noise)


def prepared(clip: Clip, model: Model, known, prompt: bool = False) -> dict:
    """A clip as the model's batch of one row; or only as far as its words."""
    part = model.cfg.encoders["audio"]
    heard = part.module.load(clip.sound, part.cfg)
    (item,) = part.module.items(heard, part.cfg)
    before, after = (known.encode(text).ids for text in (BEFORE, AFTER))
    ids = before + [part.placeholder] * len(item.slots) + after
    said = [] if prompt else known.encode(clip.text + END).ids
    tokens = torch.tensor([ids + said])
    labels = torch.tensor([[IGNORE] * (len(ids) - 1) + said + [IGNORE]]) if said else torch.full_like(tokens, IGNORE)
    return model.prepare({"input_ids": tokens, "labels": labels, "audio": [heard]})


def start(run: Run) -> dict[str, float]:
    """Of every fourth recording: a model that has not learned when to stop says as much as it may."""
    return {"heldout_wer": word_error_rate(run, 4)}


def finish(run: Run) -> dict[str, float]:
    return {"heldout_wer": word_error_rate(run)}


def word_error_rate(run: Run, every: int = 1) -> float:
    """Of the held-out recordings; five transcripts are shown."""
    model, known = run.job.model, tokenizer.load(Path(run.job.model.hf["weights"]))
    heldout = sorted(parted(recordings())[1], key=lambda clip: (clip.seconds, clip.name))[::every]
    (end,) = known.encode(END).ids
    heard: list[str] = []
    for first in range(0, len(heldout), ROWS):
        group = heldout[first : first + ROWS]
        prompts = collate([prepared(clip, model, known, prompt=True) for clip in group])
        most = 6 + round(4 * group[-1].seconds)  # tokens: nobody speaks faster
        heard += [known.decode(tokens) for tokens in complete(run.job, run.state, prompts, most, [end])]
    wrong = [errors(words(text), clip.text.split()) for text, clip in zip(heard, heldout, strict=True)]
    for at in range(0, len(heldout), -(-len(heldout) // 5)):
        run.con.info(f"  said: {heldout[at].text!r}, heard: {heard[at]!r}")
    return sum(wrong) / sum(len(clip.text.split()) for clip in heldout)


def errors(found: Sequence[str], expected: Sequence[str]) -> int:
    """How many words to insert, delete or replace, at least, to make the one of the other."""
    costs = list(range(len(expected) + 1))
    for i, word in enumerate(found, 1):
        before, costs[0] = costs[0], i
        for j, other in enumerate(expected, 1):
            before, costs[j] = costs[j], min(costs[j] + 1, costs[j - 1] + 1, before + (word != other))
    return costs[-1]

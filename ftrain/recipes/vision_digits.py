"""Images to text: scikit-learn's handwritten digits, named in a word, by a model trained from scratch."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .. import digits, tokenizer
from ..config import TrainConfig
from ..data import Data, collate
from ..generate import complete
from ..in_memory import data_of
from ..loss import IGNORE
from ..model import Model
from . import Run

DEFAULTS = {
    "steps": 1800,
    "batch_size": 16,
    "seq_len": 96,
    "lr": 2e-3,
    "warmup": 20,
    "weight_decay": 0.1,
    "compile": "off",
    "eval_every": 300,
    "save_every": 0,
    "log_every": 20,
}

QUESTION, ANSWER = "Which digit is this?", " It is {}."
PLACEHOLDER = 511  # beyond the tokenizer's


def model(cfg: TrainConfig) -> dict:
    return {
        "model_type": "omni",
        "foundation": digits.FOUNDATION,
        "encoders": {
            "image": {
                "type": "vit",
                "placeholder": PLACEHOLDER,
                "config": {
                    "patch_size": 2,
                    "num_channels": 1,
                    "hidden_size": 64,
                    "num_hidden_layers": 3,
                    "num_attention_heads": 4,
                    "max_grid": 4,
                    "initializer_range": 0.05,
                },
            }
        },
    }


def data(cfg: TrainConfig, model: Model, source: Path | None) -> Data:
    train, heldout = digits.load()
    known = words()

    def row(digit: digits.Digit, drawn: np.random.Generator | None) -> dict:
        return prepared(digit if drawn is None else digits.shifted(digit, drawn), model, known)

    digest = digits.digest(repr(model.hf))
    return data_of(train, heldout, row, cfg.seq_len, digest, "images", partial(tokenizer.save, known))


def words():
    """A tokenizer of the ten answers."""
    return digits.tokenizer_of([QUESTION + ANSWER.format(name) for name in digits.NAMES], PLACEHOLDER)


def prepared(digit: digits.Digit, model: Model, known, prompt: bool = False) -> dict:
    """A digit as the model's batch of one row; or only as far as the question."""
    part = model.cfg.encoders["image"]
    image = digit.pixels.astype(np.float32) / digits.MOST
    (item,) = part.module.items(image, part.cfg)
    asked = [part.placeholder] * len(item.slots) + known.encode(QUESTION).ids
    said = [] if prompt else [*known.encode(ANSWER.format(digits.NAMES[digit.label])).ids, *tokenizer.eos_ids(known)]
    labels = torch.tensor([([IGNORE] * (len(asked) - 1) + said + [IGNORE])[: len(asked + said)]])
    return model.prepare({"input_ids": torch.tensor([asked + said]), "labels": labels, "image": [image]})


def start(run: Run) -> Mapping[str, float]:
    return {"heldout_accuracy": named_right(run)}


finish = start


def named_right(run: Run) -> float:
    """The part of the held-out digits whose names the model writes, word for word."""
    known = words()
    _, heldout = digits.load()
    prompts = collate([prepared(digit, run.job.model, known, prompt=True) for digit in heldout])
    said = complete(run.job, run.state, prompts, 8, tokenizer.eos_ids(known))
    answers = [known.decode(tokens) for tokens in said]
    right = [answer == ANSWER.format(digits.NAMES[d.label]) for answer, d in zip(answers, heldout, strict=True)]
    for number in range(5):
        run.con.info(f"  {digits.NAMES[heldout[number].label]}: {answers[number]!r}")
    return sum(right) / len(right)

"""Text to images: handwritten digits drawn from a prompt, pixel after pixel, by a model trained from scratch.

A pixel's 17 levels of grey are codes as those of a VQ model: the model reads what it has drawn by an encoder of codes,
and draws by a decoder of codes, as Janus does.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .. import digits, tokenizer
from ..config import TrainConfig
from ..data import Data
from ..in_memory import data_of
from ..loss import IGNORE
from ..model import Model
from ..models import drawing, omni
from ..ops import plain
from ..packaged import missing
from ..state import whole
from . import Run

DEFAULTS = {
    "steps": 600,
    "batch_size": 16,
    "seq_len": 132,
    "lr": 3e-3,
    "warmup": 20,
    "weight_decay": 0.1,
    "compile": "off",
    "eval_every": 200,
    "save_every": 0,
    "log_every": 20,
}

PROMPT, NO_PROMPT = "draw a {}", "draw a digit"
UNPROMPTED = 0.1  # of the samples: what guidance needs to know
PLACEHOLDER = 511  # beyond the tokenizer's
LEVELS, PIXELS = digits.MOST + 1, 64
DRAWN = 20  # of each digit
GUIDANCE, TEMPERATURE = 1.5, 0.8


def model(cfg: TrainConfig) -> dict:
    config = {"num_embeddings": LEVELS, "embed_dim": 16, "projection_dim": 96, "initializer_range": 0.1}
    return {
        "model_type": "omni",
        "foundation": digits.FOUNDATION,
        "encoders": {"drawn": {"type": "codes", "placeholder": PLACEHOLDER, "config": config, "projector": "none"}},
        "decoders": {"drawing": {"type": "codes", "config": config}},
    }


def data(cfg: TrainConfig, model: Model, source: Path | None) -> Data:
    train, heldout = digits.load()
    if missing("PIL"):
        raise FileNotFoundError("the drawn digits are written by Pillow, which is not installed: pip install pillow")
    known = words()

    def row(digit: digits.Digit, drawn: np.random.Generator | None) -> dict:
        prompted = drawn is None or drawn.random() >= UNPROMPTED
        return prepared(digit.pixels, prompt(known, digit.label if prompted else None), model)

    digest = digits.digest(repr(model.hf))
    return data_of(train, heldout, row, cfg.seq_len, digest, "images", partial(tokenizer.save, known))


def words():
    """A tokenizer of the prompts, each of as many tokens."""
    return digits.tokenizer_of([NO_PROMPT, *(PROMPT.format(name) for name in digits.NAMES)], PLACEHOLDER)


def prompt(known, label: int | None) -> list[int]:
    return known.encode(NO_PROMPT if label is None else PROMPT.format(digits.NAMES[label])).ids


def prepared(pixels: np.ndarray, prompt: list[int], model: Model) -> dict:
    """A prompt and the image after it, of which each pixel is the label of what stands before it."""
    drawn = torch.from_numpy(pixels).long().flatten()
    ids = torch.tensor(prompt + [PLACEHOLDER] * (PIXELS - 1))
    none = torch.full_like(ids, IGNORE)[None]
    labels = torch.cat([none[0, : len(prompt) - 1], drawn])[None]
    return model.prepare({"input_ids": ids[None], "labels": none, "drawn": [drawn[:-1]], "drawing.labels": labels})


def draw(
    params: Mapping[str, torch.Tensor], cfg: omni.OmniConfig, labels: Sequence[int], seed: int = 0,
    guidance: float = GUIDANCE, temperature: float = TEMPERATURE,
) -> np.ndarray:  # fmt: skip
    """-> images [n, 8, 8] of these digits, on one device."""
    known = words()
    ids, without = (torch.tensor([prompt(known, label) for label in of]) for of in (labels, [None] * len(labels)))
    batch = {"input_ids": ids, "segment_ids": torch.zeros_like(ids), "position_ids": torch.arange(ids.shape[1])[None]}
    batch["position_ids"] = batch["position_ids"].expand_as(ids)
    encoder, decoder, ops = cfg.encoders["drawn"], cfg.decoders["drawing"], plain()
    found = drawing.draw(
        params, cfg.foundation, batch, without, PIXELS,
        lambda drawn: encoder.module.encode(params, "encoders.drawn", {"codes": drawn}, encoder.cfg, ops),
        lambda hidden: decoder.module.logits(params, "decoders.drawing", hidden, decoder.cfg, ops),
        guidance=guidance, temperature=temperature, seed=seed,
    )  # fmt: skip
    return found.view(-1, 8, 8).numpy().astype(np.uint8)


def finish(run: Run) -> dict[str, float]:
    """Has the digits drawn, and a classifier say what they are: one that has learned from real digits alone."""
    from sklearn.svm import SVC

    params = {name: whole(t).float().cpu() for name, t in run.state.params.items()}
    labels = [label for label in range(10) for _ in range(DRAWN)]
    images = draw(params, run.job.model.cfg, labels, run.cfg.seed)
    train, heldout = digits.load()

    def flat(of: Sequence[digits.Digit]) -> tuple[np.ndarray, np.ndarray]:
        return np.stack([d.pixels.ravel() for d in of]).astype(float), np.array([d.label for d in of])

    classifier = SVC(C=10, gamma=0.001).fit(*flat(train))
    drawn, real, known = images.reshape(len(images), -1).astype(float), flat(heldout), flat(train)[0]
    named = classifier.predict(drawn)
    if run.first:
        write_grid(run.out / "digits.png", images.reshape(10, DRAWN, 8, 8), heldout)
        run.con.info(f"  drawn digits (left) and real ones are in {run.out / 'digits.png'}")
    missed = [f"{digits.NAMES[n]} {int((named == np.array(labels)).reshape(10, -1)[n].sum())}/{DRAWN}" for n in range(10)]
    run.con.info(f"  drawn digits named right: {', '.join(missed)}")
    return {
        "drawn_named_right": float((named == np.array(labels)).mean()),
        "real_named_right": float(classifier.score(*real)),
        # A drawing that is a copy of a training image would be at 0.
        "drawn_to_nearest_training_image": _nearest(drawn, known),
        "real_to_nearest_training_image": _nearest(real[0], known),
    }


def _nearest(images: np.ndarray, others: np.ndarray) -> float:
    """The mean distance to the nearest of the others."""
    squares = (images**2).sum(1)[:, None] - 2 * images @ others.T + (others**2).sum(1)
    return float(np.sqrt(squares.min(1).clip(0)).mean())


def write_grid(path: Path, images: np.ndarray, heldout: Sequence[digits.Digit], shown: int = 10, scale: int = 6) -> None:
    """A PNG: a line for each digit, drawn ones [10, n, 8, 8] on the left and real ones on the right."""
    from PIL import Image

    page = np.zeros((10 * 10, (2 * shown + 1) * 10), np.uint8)
    for label in range(10):
        real = [digit.pixels for digit in heldout if digit.label == label]
        for column, pixels in enumerate([*images[label, :shown], None, *real[:shown]]):
            if pixels is not None:
                grey = np.round(pixels * (255 / digits.MOST)).astype(np.uint8)
                page[10 * label + 1 : 10 * label + 9, 10 * column + 1 : 10 * column + 9] = grey
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(page).resize((page.shape[1] * scale, page.shape[0] * scale), Image.Resampling.NEAREST).save(path)

"""scikit-learn's 1,797 handwritten digits of 8 x 8 pixels (UCI, CC-BY), for the recipes that read and draw them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from .cache import content_hash
from .packaged import missing
from .tokenizer import train_or_load

NAMES = "zero one two three four five six seven eight nine".split()
MOST = 16  # the largest value of a pixel
HELDOUT = 5  # one in so many

# A language model of a size that learns ten words from nothing in minutes.
FOUNDATION = {
    "model_type": "qwen3", "vocab_size": 512, "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 24, "max_position_embeddings": 256,
    "tie_word_embeddings": True, "initializer_range": 0.05,
}  # fmt: skip


class Digit(NamedTuple):
    """pixels: uint8 [8, 8], 0 to MOST."""

    pixels: np.ndarray
    label: int


def load() -> tuple[list[Digit], list[Digit]]:
    """-> digits to train on, digits held out. Raises FileNotFoundError where scikit-learn is not installed."""
    if missing("sklearn"):
        raise FileNotFoundError("this recipe's digits are scikit-learn's, which is not installed: pip install scikit-learn")
    from sklearn.datasets import load_digits

    found = load_digits()
    all_ = [Digit(image.astype(np.uint8), int(label)) for image, label in zip(found.images, found.target, strict=True)]
    return [d for n, d in enumerate(all_) if n % HELDOUT], all_[::HELDOUT]


def shifted(digit: Digit, drawn: np.random.Generator) -> Digit:
    """Moved by up to a pixel, up or down and left or right; what leaves the image is gone."""
    down, right = drawn.integers(-1, 2, 2)
    wide = np.pad(digit.pixels, 1)
    return digit._replace(pixels=wide[1 - down : 9 - down, 1 - right : 9 - right])


def tokenizer_of(texts: Sequence[str], most: int) -> Tokenizer:
    """Of no more than `most` tokens, the texts' own words among them."""
    return train_or_load(list(texts), most)


def digest(*of: str) -> str:
    """Changes with the digits, and with `of`."""
    return content_hash(*of, *(digit.pixels.tobytes() + bytes([digit.label]) for side in load() for digit in side))

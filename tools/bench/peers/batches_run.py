"""Write the batches that all train on: batches_run.py FILE.npy VOCAB STEPS B S -> int64 [STEPS, B, S].

Each row counts upwards from a random token, by a random stride of 1 to 7, modulo the vocabulary, and one token of
twenty is a random one: something a small model begins to learn in a few steps, and does not learn wholly.
"""

import sys

import numpy as np


def draw(vocab: int, steps: int, rows: int, length: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    first, stride = generator.integers(vocab, size=(steps, rows, 1)), generator.integers(1, 8, size=(steps, rows, 1))
    ids = (first + stride * np.arange(length)) % vocab
    noise = generator.random(ids.shape) < 0.05
    return np.where(noise, generator.integers(vocab, size=ids.shape), ids)


if __name__ == "__main__":
    np.save(sys.argv[1], draw(*map(int, sys.argv[2:])))

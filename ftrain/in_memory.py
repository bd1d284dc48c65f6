"""Samples that are held in memory, as a run's data: packed into rows, shuffled by epoch, varied each time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from .data import Data, collate, epoch_order, in_one_row
from .samples import pack

Sample = TypeVar("Sample")


def data_of(
    train: Sequence[Sample], heldout: Sequence[Sample], row: Callable[[Sample, np.random.Generator | None], Mapping],
    seq_len: int, digest: str, describe: str, save: Callable[[Path], None] | None = None,
) -> Data:  # fmt: skip
    """row: a sample -> its batch of one row, as it is (None), or varied as the generator's numbers have it, and then
    no longer than it is. digest: changes with the samples and with `row`. describe: what the samples are.

    Raises ValueError for a sample that is longer than a row.
    """
    packed = [_packed(samples, row, seq_len) for samples in (train, heldout)]

    def batch(index: int, batch_size: int, seed: int) -> dict:
        rows = []
        for number in range(index, index + batch_size):
            epoch, at = divmod(number, len(packed[0]))
            numbers = packed[0][epoch_order(len(packed[0]), seed, epoch)[at]]
            drawn = np.random.default_rng([seed, number])
            rows.append(in_one_row([row(train[i], drawn) for i in numbers]))
        return collate(rows, seq_len)

    def of_heldout(batch_size: int, limit: int | None = None) -> Iterator[dict]:
        for n, first in enumerate(range(0, len(packed[1]), batch_size)):
            if n == limit:
                return
            rows = packed[1][first : first + batch_size]
            yield collate([in_one_row([row(heldout[i], None) for i in numbers]) for numbers in rows], seq_len)

    said = f"{len(train):,} {describe} in {len(packed[0]):,} rows, {len(heldout):,} held out"
    return Data(batch, of_heldout, digest, said, save)


def _packed(samples: Sequence[Sample], row: Callable, seq_len: int) -> list[list[int]]:
    lengths = np.array([row(sample, None)["segment_ids"].shape[1] for sample in samples], np.int64)
    if lengths.max(initial=0) > seq_len:
        raise ValueError(f"--seq-len {seq_len}: the longest sample has {lengths.max()} tokens")
    return pack(range(len(samples)), lengths, seq_len)

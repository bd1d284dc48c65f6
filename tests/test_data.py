"""Tokens to batches: nothing is lost, nothing crosses a document, every mesh reads the same data."""

import threading
from itertools import count, islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain import data

EOS = 1
quick = settings(max_examples=60, deadline=None)


@st.composite
def datasets(draw):
    """A dataset of random documents; tokens 2.. are all different, so that a misplaced one shows."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
    fresh = count(2)
    documents = [[*islice(fresh, n), EOS] for n in lengths]
    ends = np.cumsum([len(d) for d in documents])
    ids = np.array([i for d in documents for i in d], np.uint16)
    return documents, data.Dataset(ids, ends.astype(np.int64), draw(st.integers(1, 8)))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def joined(batches):
    return {n: torch.cat([b[n] for b in batches]) for n in batches[0]}


# Packing


@quick
@given(datasets())
def test_packing_loses_no_token_and_no_label(case):
    documents, dataset = case
    rows = data.rows_at(dataset, np.arange(dataset.rows))
    shape = (dataset.rows, dataset.seq_len)
    assert all(t.shape == shape and t.dtype == torch.int64 and t.is_contiguous() for t in rows.values())
    real = rows["segment_ids"] >= 0
    assert rows["input_ids"][real].tolist() == [i for d in documents for i in d]
    # Each token's label, told from the documents alone: the next token of its own document, if any.
    expected = [label for d in documents for label in [*d[1:], -100]]
    assert rows["labels"][real].tolist() == expected
    for name, value in data.PADDING.items():
        assert (rows[name][~real] == value).all()


@quick
@given(datasets())
def test_positions_and_segments_restart_with_each_document_and_row(case):
    documents, dataset = case
    rows = data.rows_at(dataset, np.arange(dataset.rows))
    owner = iter(n for n, d in enumerate(documents) for _ in d)
    for r in range(dataset.rows):
        seen, position = [], 0
        for t in range(dataset.seq_len):
            if (n := next(owner, None)) is None:
                assert rows["segment_ids"][r, t] == -1
                continue
            position = position + 1 if seen and seen[-1] == n else 0
            seen += [n] if n not in seen else []
            assert rows["position_ids"][r, t] == position
            assert rows["segment_ids"][r, t] == len(seen) - 1


# Order


@quick
@given(datasets(), st.integers(0, 40), st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 2**40))
def test_the_order_depends_on_the_position_alone(case, start, sizes, seed):
    """Batches of any sizes, started anywhere, are cuts of one sequence; each epoch has every row once."""
    _, dataset = case
    total = start + sum(sizes)
    undisturbed = data.batch_at(dataset, 0, total, seed)
    cuts = np.cumsum([0, start, *sizes])
    parts = [data.batch_at(dataset, int(a), int(b - a), seed) for a, b in pairwise(cuts) if b > a]
    assert equal(joined(parts), undisturbed)
    whole = data.rows_at(dataset, np.arange(dataset.rows))["input_ids"].tolist()
    for first in range(0, total - dataset.rows + 1, dataset.rows):
        epoch = undisturbed["input_ids"][first : first + dataset.rows].tolist()
        assert sorted(epoch) == sorted(whole)


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(data.epoch_order(100, seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len({*orders, tuple(range(100))}) == 4
    # Pinned: another order would silently break the resuming of older runs.
    assert data.epoch_order(8, 0, 0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]


# The cut for each rank


@quick
@given(datasets(), st.integers(1, 7), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_local_batches_of_any_mesh_reassemble(case, batch_size, batch_ranks, sp, accumulate):
    _, dataset = case
    batch = data.batch_at(dataset, 0, batch_size, 0)
    parts = {
        (r, s): data.local_batch(batch, r, batch_ranks, s, sp, accumulate)
        for r in range(batch_ranks)
        for s in range(sp)
    }
    everything = [t for part in parts.values() for micro in part for t in micro.values()]
    assert len({t.shape for t in everything}) == 1
    assert all(len(part) == accumulate for part in parts.values())
    assert all(t.dtype == torch.int64 and t.is_contiguous() for t in everything)
    for name in batch:
        rows = [
            torch.cat([parts[r, s][m][name] for s in range(sp)], dim=1)
            for m in range(accumulate)
            for r in range(batch_ranks)
        ]
        whole = torch.cat(rows)
        assert torch.equal(whole[:batch_size, : dataset.seq_len], batch[name])
        assert (whole[batch_size:] == data.PADDING[name]).all()
        assert (whole[:, dataset.seq_len :] == data.PADDING[name]).all()
        assert whole.shape[0] - batch_size < batch_ranks * accumulate
        assert whole.shape[1] - dataset.seq_len < sp


@quick
@given(datasets(), st.integers(1, 7))
def test_heldout_batches_are_all_rows_once_in_order(case, batch_size):
    _, dataset = case
    batches = list(data.heldout_batches(dataset, batch_size))
    assert all(t.shape == (batch_size, dataset.seq_len) for b in batches for t in b.values())
    rows = joined(batches)
    every = data.rows_at(dataset, np.arange(dataset.rows))
    assert equal({n: t[: dataset.rows] for n, t in rows.items()}, every)
    assert all((t[dataset.rows :] == data.PADDING[n]).all() for n, t in rows.items())
    assert len(rows["labels"]) - dataset.rows < batch_size
    assert len(list(data.heldout_batches(dataset, batch_size, limit=1))) == 1


# Prefetch


def test_prefetch_keeps_order_and_stays_at_most_depth_ahead():
    made = []
    items = data.prefetch((made.append(i) or i for i in range(50)), depth=3)
    for i, item in enumerate(items):
        assert item == i
        assert len(made) <= i + 1 + 3
    assert i == 49
    items = data.prefetch(iter(range(10**9)), depth=2)
    assert next(items) == 0  # endless input is fine, too


def test_prefetch_works_ahead():
    ahead = threading.Event()
    items = data.prefetch(i if i < 2 else ahead.set() for i in range(3))
    assert next(items) == 0
    assert ahead.wait(5)


def test_prefetch_raises_in_its_place_and_stops():
    def broken():
        yield 1
        raise ValueError("no second item")

    items = data.prefetch(broken())
    assert next(items) == 1
    with pytest.raises(ValueError, match="no second item"):
        next(items)
    alive = [t for t in threading.enumerate() if t.name == "prefetch"]
    items = data.prefetch(count())
    next(items)
    assert len([t for t in threading.enumerate() if t.name == "prefetch"]) == len(alive) + 1
    items.close()
    assert [t for t in threading.enumerate() if t.name == "prefetch"] == alive

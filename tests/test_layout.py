"""Pieces of a tensor, and the tensor that they make."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Shard
from torch.fx.experimental.proxy_tensor import make_fx

from ftrain.layout import Pieces, shard_slices


@st.composite
def cuts(draw):
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    dims = draw(st.lists(st.integers(0, len(shape) - 1), max_size=3))
    return shape, dims, [draw(st.integers(1, 4)) for _ in dims]


@settings(max_examples=300, deadline=None)
@given(cuts())
def test_pieces_make_the_tensor(case):
    shape, dims, sizes = case
    pieces = Pieces(shape, dims, sizes)
    whole = torch.arange(1, 1 + torch.Size(shape).numel()).view(shape)
    rows = pieces.take_apart(whole)
    places = list(product(*map(range, sizes)))
    for rank, at in enumerate(places):
        own = whole[shard_slices(shape, [Shard(dim) for dim in dims], sizes, at)]
        assert torch.equal(pieces.unpad(rows[rank], pieces.shape_of(rank)), own)
        assert torch.equal(rows[rank], pieces.pad(own)), "padding is zeros"
    assert torch.equal(pieces.assemble(rows), whole)


@pytest.mark.parametrize("dims, sizes", [([0], [512]), ([0, 0], [64, 8]), ([0, 0, 1], [64, 8, 2])])
def test_many_uneven_pieces_are_few_operators(dims, sizes):
    """A graph has as many of them as it takes to say how, not as there are ranks."""
    pieces = Pieces((1000, 3), dims, sizes)
    whole, rows = torch.zeros(1000, 3), torch.zeros(pieces.ranks, pieces.numel)
    assert len(make_fx(lambda x: pieces.take_apart(x))(whole).graph.nodes) < 40
    assert len(make_fx(lambda x: pieces.assemble(x))(rows).graph.nodes) < 40

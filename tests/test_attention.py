"""Both ways of attention against one another, and against documents attended to one by one."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.attention import (
    attention, attention_mask, document_attention, documents, packed_attention, packed_mask,
)  # fmt: skip
from ftrain.ops import fill_batch


def varlen(q, k, v, q_bounds, k_bounds, longest_q, longest_k, *, causal, window_size):
    """What flash-attn's varlen kernel does, document by document and query by query."""
    assert causal and torch.equal(q_bounds, k_bounds) and longest_q == longest_k
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    ends = q_bounds.tolist()
    assert ends[0] == 0 and ends[-1] == len(q) and max(b - a for a, b in zip(ends, ends[1:])) <= longest_q
    for start, end in zip(ends, ends[1:]):
        for at in range(start, end):
            first = start if window_size[0] < 0 else max(start, at - window_size[0])
            for head in range(q.shape[1]):
                keys, values = k[first : at + 1, head // group], v[first : at + 1, head // group]
                weight = (keys @ q[at, head] / q.shape[2] ** 0.5).softmax(0)
                out[at, head] = weight @ values
    return out


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_packed_and_masked_attention_agree(data):
    B, S, K, group, D = (data.draw(st.integers(1, n), label=name) for name, n in zip("BSKGD", (2, 9, 2, 3, 5)))
    window = data.draw(st.none() | st.integers(1, 9), label="window")
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    segments = (torch.rand(B, S) < 0.3).long().cumsum(1)
    if data.draw(st.booleans(), label="padded"):
        segments[:, S // 2 + 1 :] = -1
    q, k, v = torch.randn(B, S, K * group, D), torch.randn(B, S, K, D), torch.randn(B, S, K, D)
    masked = attention(q, k, v, attention_mask(segments, window))
    packed = packed_attention(varlen)(q, k, v, packed_mask(segments, window))
    torch.testing.assert_close(packed, masked, rtol=1e-5, atol=1e-6)


def test_bounds_of_documents():
    segments = torch.tensor([[0, 0, 1, 1], [1, 1, -1, -1]])
    mask = packed_mask(segments, 3)
    assert mask.bounds.tolist() == [0, 2, 4, 6, 8] and mask.bounds.dtype == torch.int32
    assert (mask.longest, mask.window) == (4, 3)


def test_the_number_of_documents_does_not_recompile(captures):
    from ftrain.graph import one_graph

    bounds = one_graph(lambda segments: {"sum": packed_mask(segments).bounds.sum()}, "aot_eager")
    for row, total in (([0, 0, 0, 0], 4), ([0, 1, 2, 3], 10), ([0, 0, 1, 1], 6)):
        assert int(bounds(torch.tensor([row]))["sum"]) == total
    assert len(captures) == 1


@pytest.mark.parametrize("window", [None, 2])
def test_a_query_sees_its_own_document_only(window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 6, 2, 4) for _ in range(3))
    whole = attention(q, k, v, attention_mask(torch.tensor([[0, 0, 0, 1, 1, 1]]), window))
    for part in (slice(0, 3), slice(3, 6)):
        alone = attention(q[:, part], k[:, part], v[:, part], attention_mask(torch.zeros(1, 3, dtype=torch.long), window))
        torch.testing.assert_close(whole[:, part], alone, rtol=1e-5, atol=1e-6)
    plain = F.scaled_dot_product_attention(*(t[:, :3].transpose(1, 2) for t in (q, k, v)), is_causal=True)
    if window is None:
        torch.testing.assert_close(whole[:, :3], plain.transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_a_mask_with_holes_is_one_document():
    """Tokens on both sides of padding in the middle see each other, as under the plain mask."""
    segments = fill_batch({"input_ids": torch.zeros(2, 300, dtype=torch.long), "attention_mask": HOLES})["segment_ids"]
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 300, n, 16) for n in (4, 2, 2))
    plain = attention(q, k, v, attention_mask(segments))
    found = document_attention(q, k, v, documents(segments))
    torch.testing.assert_close(found[segments >= 0], plain[segments >= 0], rtol=1e-5, atol=1e-6)


HOLES = torch.ones(2, 300, dtype=torch.long)
HOLES[0, 100:120] = 0

"""Grouped products and the sort around them, against one expert at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.experts import grouped_mm, grouped_mlp, grouped_outer, local_experts, permute, sort_by_expert

torch.set_num_threads(1)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def close(a, b):
    """Equal up to round-off relative to the largest element."""
    assert a.shape == b.shape and a.dtype == b.dtype
    scale = b.abs().max().item() if b.numel() else 0.0
    assert (a - b).abs().max().item() <= TOLERANCE[b.dtype] * scale if b.numel() else True


def one_by_one(x, weight, index, gate, up, down):
    """The definition: every token visits its experts in turn."""
    out = torch.zeros_like(x)
    for expert in range(gate.shape[0]):
        y = (torch.nn.functional.silu(x @ gate[expert].T) * (x @ up[expert].T)) @ down[expert].T
        out = out + y * ((index == expert) * weight).sum(-1, keepdim=True)
    return out


def draw(T, k, E, H, inner, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    index = torch.rand(T, E, generator=g).topk(k).indices
    shapes = dict(x=(T, H), weight=(T, k), gate=(E, inner, H), up=(E, inner, H), down=(E, H, inner))
    floats = {n: (torch.randn(s, generator=g, dtype=torch.float64) / 2).to(dtype) for n, s in shapes.items()}
    return {n: t.requires_grad_() for n, t in floats.items()}, index


def value_and_grads(f, floats, index):
    y = f(index=index, **floats)
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad(y, list(floats.values()), cotangent)]


@given(
    T=st.integers(0, 9), k=st.integers(1, 3), E=st.integers(3, 6), H=st.integers(1, 17),
    inner=st.sampled_from([1, 5, 8, 16]), dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_local_experts_equal_one_by_one(T, k, E, H, inner, dtype, seed):
    floats, index = draw(T, k, E, H, inner, dtype, seed)
    for ours, theirs in zip(value_and_grads(local_experts, floats, index), value_and_grads(one_by_one, floats, index)):
        close(ours, theirs)


@given(st.lists(st.integers(0, 4), max_size=40))
def test_sort_by_expert(index):
    index = torch.tensor(index, dtype=torch.long)
    order, inverse, counts = sort_by_expert(index, 5)
    assert counts.tolist() == torch.bincount(index, minlength=5).tolist()
    assert index[order].tolist() == sorted(index.tolist())
    assert torch.arange(len(index))[order][inverse].tolist() == list(range(len(index)))
    for expert in range(5):  # stable: an expert sees its tokens in their order
        rows = order[index[order] == expert]
        assert rows.tolist() == sorted(rows.tolist())


def test_permute_gradient_is_the_inverse_permutation():
    torch.manual_seed(0)
    order, inverse, _ = sort_by_expert(torch.tensor([[2, 0], [1, 2], [0, 1]]), 3)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(permute(x, order, inverse, 2), x.repeat_interleave(2, 0)[order])
    assert torch.autograd.gradcheck(lambda x: permute(x, order, inverse, 2), x)
    rows = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: permute(rows, order, inverse), rows)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_expert_without_tokens_gets_exact_zeros(dtype):
    floats, _ = draw(6, 1, 4, 16, 8, dtype, 0)
    index = torch.tensor([[0], [3], [3], [0], [3], [0]])
    grads = dict(zip(floats, value_and_grads(local_experts, floats, index)[1:]))
    for name in ("gate", "up", "down"):
        assert not grads[name][1:3].any()
        assert grads[name][0].any() and grads[name][3].any()


@pytest.mark.parametrize("shape", [(16, 32), (5, 7)], ids=["kernel", "fallback"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grouped_mm_is_a_lawful_operator(shape, dtype):
    K, N = shape
    offsets = torch.tensor([3, 3, 9, 11], dtype=torch.int32)
    x = torch.randn(11, K, dtype=dtype, requires_grad=True)
    w = torch.randn(4, N, K, dtype=dtype, requires_grad=True)
    torch.library.opcheck(grouped_mm, (x, w, offsets))
    torch.library.opcheck(grouped_outer, (torch.randn(11, N, dtype=dtype), x.detach(), offsets))
    # a gradient that arrives expanded (stride 0), as that of a sum does
    grouped_mm(x, w, offsets).sum().backward()
    close(x.grad, torch.cat([w[e].sum(0).expand(n, K) for e, n in enumerate((3, 0, 6, 2))]).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_in_one_graph_equals_eager(dtype):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(local_experts, fullgraph=True, backend=backend, dynamic=False)
    for seed in range(3):  # routing differs, the graph stays
        floats, index = draw(8, 2, 4, 16, 8, dtype, seed)
        for a, b in zip(value_and_grads(compiled, floats, index), value_and_grads(local_experts, floats, index)):
            close(a, b)
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_with_a_data_dependent_row_count(dtype):
    """As expert parallelism calls it: how many rows arrive is known only at run time."""

    def some_rows(x, counts, gate, up, down):
        rows = counts.sum().item()
        torch._check(rows >= 0)
        torch._check(rows <= x.shape[0])
        return grouped_mlp(x.narrow(0, 0, rows), counts, gate, up, down)

    floats, _ = draw(12, 1, 4, 16, 8, dtype, 0)
    del floats["weight"]
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(some_rows, fullgraph=True)
        for counts in ([3, 0, 5, 1], [0, 0, 0, 7], [1, 2, 3, 4]):
            args = [floats["x"], torch.tensor(counts), *list(floats.values())[1:]]
            ours, theirs = compiled(*args), some_rows(*args)
            close(ours, theirs)
            leaves = list(floats.values())
            for a, b in zip(torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(theirs.sum(), leaves)):
                close(a, b)


def test_same_bits_twice():
    floats, index = draw(64, 2, 4, 32, 16, torch.bfloat16, 1)
    first, second = (value_and_grads(local_experts, floats, index) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))

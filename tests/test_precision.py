"""Float8: every product and gradient against its definition, eager and compiled, and faults that must show."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ftrain import precision
from ftrain.experts import grouped_mm
from ftrain.graph import one_graph
from ftrain.precision import PRECISIONS, RECIPES, grouped_mm_for, linear_for, rowwise_grouped_mm
from ftrain.model import Model
from ftrain.specs import ParamSpec, normal

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# How far results may be apart for the order of their sums, in fp32 and rounded to bf16.
# Rounding to float8 itself costs 0.03 to 0.08.
FP32, BF16 = 2e-6, 4e-3


@pytest.fixture(autouse=True)
def settings():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def off(a, b):
    """Relative Frobenius error of a, as seen from b."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def furthest(a, b):
    """The largest relative error of any one row: small rows cannot hide behind large ones."""
    a, b = a.double(), b.double()
    return max(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-30)).flatten().tolist(), default=0.0)


def step(f):
    """A function's value and gradients at once, as the train step takes them."""

    def run(x, w, dy, *rest):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        y = f(x, w, *rest)
        return y.detach(), *torch.autograd.grad(y, (x, w), dy)

    return run


def spread(*shape, dtype=torch.bfloat16):
    """Normal values whose rows and columns differ in size by powers of ten: a scale along a wrong dimension shows."""
    x = torch.randn(shape)
    for dim in (-1, -2):
        x = x * 10 ** torch.empty([n if d == dim % len(shape) else 1 for d, n in enumerate(shape)]).uniform_(-3, 3)
    return x.to(dtype)


def rounded(x, dim, dtype=E4M3, power_of_two=True):
    """The definition: the vectors along `dim` (None: all of x) scaled to the top of float8, rounded, scaled back."""
    x = x.double()
    amax = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = torch.finfo(dtype).max / amax.clamp(min=1e-12)
    if power_of_two:
        scale = 2.0 ** scale.log2().floor()
    scale = scale.float().double()
    return (x * scale).float().to(dtype).double() / scale


def by_definition(recipe, x, w, dy):
    """y, dx and dw of one linear, from the recipe's words, in double precision."""
    if recipe == "fp8-tensorwise":
        x, w, dy = rounded(x, None, E4M3, False), rounded(w, None, E4M3, False), rounded(dy, None, E5M2, False)
        return x @ w.T, dy @ w, dy.T @ x
    y = rounded(x, 1) @ rounded(w, 1).T
    if recipe == "fp8-rowwise":
        return y, rounded(dy, 1) @ rounded(w, 0), rounded(dy, 0).T @ rounded(x, 0)
    return y, rounded(dy, 1) @ rounded(w, None), dy.double().T @ x.double()


@pytest.mark.parametrize("rows", [1, 7, 32])
@pytest.mark.parametrize("recipe", RECIPES)
def test_linear_is_what_the_recipe_says(recipe, rows):
    x, w, dy = spread(rows, 48), spread(64, 48), spread(rows, 64)
    for got, want in zip(step(linear_for(recipe))(x, w, dy), by_definition(recipe, x, w, dy)):
        assert got.dtype == torch.bfloat16
        assert furthest(got, want) < BF16


@pytest.mark.parametrize("recipe", RECIPES)
def test_linear_is_close_to_bf16_and_not_equal(recipe):
    x, w, dy = (torch.randn(s).bfloat16() for s in ((64, 96), (128, 96), (64, 128)))
    in_bf16 = step(F.linear)(x, w, dy)
    y, dx, dw = (off(a, b) for a, b in zip(step(linear_for(recipe))(x, w, dy), in_bf16))
    gradients = 0.07 if recipe == "fp8-tensorwise" else 0.042  # two mantissa bits or three
    assert 0.02 < y < 0.042
    assert 0.02 < dx < gradients
    assert dw == 0 if recipe == "fp8-rowwise-gw-hp" else 0.02 < dw < gradients


@pytest.mark.parametrize("recipe", RECIPES)
def test_linear_takes_leading_dimensions_and_bias(recipe):
    linear = linear_for(recipe)
    x, w, b, dy = (torch.randn(s).bfloat16() for s in ((2, 3, 48), (64, 48), (64,), (2, 3, 64)))
    flat = step(linear)(x.view(6, 48), w, dy.view(6, 64))
    y, dx, dw = step(linear)(x, w, dy)
    assert torch.equal(y.view(6, 64), flat[0]) and torch.equal(dx.view(6, 48), flat[1]) and torch.equal(dw, flat[2])
    b.requires_grad_()
    with_bias = linear(x, w, b)
    assert torch.equal(with_bias, y + b)
    (db,) = torch.autograd.grad(with_bias, b, dy)
    assert off(db, dy.double().sum((0, 1))) < BF16
    assert linear(x[0, 0], w).shape == (64,) and linear(x[:0], w).shape == (0, 3, 64)


@pytest.mark.parametrize("shape", [(64, 50), (50, 64), (8, 16)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_odd_dimensions_fall_back_to_bf16(recipe, shape):
    x, w, dy = (torch.randn(s).bfloat16() for s in ((5, shape[1]), shape, (5, shape[0])))
    for a, b in zip(step(linear_for(recipe))(x, w, dy), step(F.linear)(x, w, dy)):
        assert torch.equal(a, b)
    experts, offsets = w.expand(2, *shape).contiguous(), torch.tensor([2, 5], dtype=torch.int32)
    for a, b in zip(step(grouped_mm_for(recipe))(x, experts, dy, offsets), step(grouped_mm)(x, experts, dy, offsets)):
        assert torch.equal(a, b)


def operators(compiled, op):
    """The nodes of an ATen operator in a captured graph."""
    [program] = compiled.programs
    return [node for node in program.nodes if node.target is op]


@pytest.mark.parametrize("rows", [32, 7])
@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled_graph_holds_scaled_mm_as_gpus_want_it(recipe, rows):
    x, w, dy = spread(rows, 48), spread(64, 48), spread(rows, 64)
    compiled = one_graph(step(linear_for(recipe)), "aot_eager")
    compiled(x, w, dy)
    products = operators(compiled, torch.ops.aten._scaled_mm.default)
    plain = operators(compiled, torch.ops.aten.mm.default)
    assert (len(products), len(plain)) == ((2, 1) if recipe == "fp8-rowwise-gw-hp" else (3, 0))
    dtypes = set()
    for node in products:
        a, b = (arg.meta["val"] for arg in node.args[:2])
        assert a.stride(1) == 1 and b.stride(0) == 1, "row-major times column-major"
        assert a.shape[1] % 16 == 0 and b.shape[1] % 16 == 0
        dtypes |= {a.dtype, b.dtype}
    assert dtypes == ({E4M3, E5M2} if recipe == "fp8-tensorwise" else {E4M3})


@pytest.mark.parametrize("precision", PRECISIONS)
def test_linear_compiled_is_eager(precision):
    dtype = compute(precision)
    x, w, dy = spread(2, 7, 48, dtype=dtype), spread(64, 48, dtype=dtype), spread(2, 7, 64, dtype=dtype)
    run = step(linear_for(precision))
    for compiled, eager in zip(one_graph(run, "aot_eager")(x, w, dy), run(x, w, dy)):
        assert torch.equal(compiled, eager)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recomputed_in_backward(recipe):
    """Under activation checkpointing both products give the same, compiled, and are indeed computed twice."""
    linear, grouped = linear_for(recipe), grouped_mm_for(recipe)
    args = spread(7, 48), spread(48, 48), spread(7, 48), spread(3, 48, 48), torch.tensor([2, 2, 7], dtype=torch.int32)

    def block(x, w, experts, offsets):
        return linear(F.silu(grouped(F.silu(linear(x, w)), w * experts, offsets)), w)

    recomputing = step(lambda *inputs: checkpoint(block, *inputs, use_reentrant=False))
    compiled = one_graph(recomputing, "aot_eager")
    results = compiled(*args)
    assert all(torch.equal(a, b) for a, b in zip(results, step(block)(*args)))
    scaled, grouped = torch.ops.aten._scaled_mm.default, torch.ops.ftrain.grouped_mm.default
    count = [len(operators(compiled, op)) for op in (scaled, grouped)]
    # Forward, backward, and again all but the block's last product.
    assert count == [2 + (2 if recipe.endswith("hp") else 4) + 1, 1 + 1 + 1]


# ---- Experts

E, N, K = 4, 32, 48
COUNTS = [[3, 0, 20, 17], [0, 0, 0, 5], [16, 16, 16, 16], [1, 0, 0, 0], [0, 0, 0, 0]]


def experts(counts, dtype=torch.bfloat16):
    rows, offsets = sum(counts), torch.tensor(counts).cumsum(0).to(torch.int32)
    return spread(rows, K, dtype=dtype), spread(E, N, K, dtype=dtype), spread(rows, N, dtype=dtype), offsets


def scaled_mm(a, b):
    """a [M, K] @ b [N, K].T by torch's own float8 kernel, rowwise, in fp32."""
    operands, scales = [], []
    for t in (a, b):
        scale = 2.0 ** (448 / t.abs().amax(1, keepdim=True).clamp(min=1e-12)).log2().floor()
        operands.append((t.float() * scale).to(E4M3))
        scales.append(1 / scale)
    one = torch.ones(())
    out = torch._scaled_mm(operands[0], operands[1].t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
    return out * scales[0] * scales[1].t()


def expert_by_expert(x, w, dy, offsets):
    """y, dx and dw by one float8 kernel call for each expert and product."""
    y, dx, dw = torch.zeros(len(x), N), torch.zeros(len(x), K), torch.zeros(E, N, K)
    ends = offsets.tolist()
    for e, rows in enumerate(map(slice, [0, *ends], ends)):
        if rows.stop > rows.start:
            y[rows] = scaled_mm(x[rows], w[e])
            dx[rows] = scaled_mm(dy[rows], w[e].t())
            dw[e] = scaled_mm(dy[rows].t(), x[rows].t())
    return y, dx, dw


def worst(f, counts):
    """The largest error in y, dx and dw of a grouped product in fp32."""
    x, w, dy, offsets = experts(counts, torch.float32)
    got, want = step(f)(x, w, dy, offsets), expert_by_expert(x, w, dy, offsets)
    assert [t.shape for t in got] == [t.shape for t in want]
    return max(map(furthest, got, want))


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("recipe", ["fp8-tensorwise", "fp8-rowwise"])
def test_twin_is_scaled_mm_expert_by_expert(recipe, counts):
    assert worst(grouped_mm_for(recipe), counts) < FP32


@pytest.mark.parametrize("counts", COUNTS)
def test_twin_in_bf16(counts):
    x, w, dy, offsets = experts(counts)
    got = step(rowwise_grouped_mm)(x, w, dy, offsets)
    for a, b in zip(got, expert_by_expert(x, w, dy, offsets)):
        assert a.dtype == torch.bfloat16 and furthest(a, b) < BF16


@pytest.mark.parametrize("counts", COUNTS)
def test_gw_hp_keeps_the_weight_gradient(counts):
    x, w, dy, offsets = experts(counts)
    y, dx, dw = step(grouped_mm_for("fp8-rowwise-gw-hp"))(x, w, dy, offsets)
    twin, plain = step(rowwise_grouped_mm)(x, w, dy, offsets), step(grouped_mm)(x, w, dy, offsets)
    assert torch.equal(y, twin[0]) and torch.equal(dx, twin[1]) and torch.equal(dw, plain[2])
    if sum(counts):
        assert off(y, plain[0]) > 1e-3


@pytest.mark.parametrize("precision", PRECISIONS)
def test_grouped_compiled_is_eager_whatever_the_routing(precision, captures):
    """The row count is not known to the compiler, and one compilation serves every routing."""
    x, w, dy, _ = experts([16] * E, compute(precision))
    grouped = grouped_mm_for(precision)

    def routed(x, w, dy, counts):
        rows = counts.sum().item()
        torch._check(rows <= x.shape[0])
        return step(grouped)(x[:rows], w, dy[:rows], counts.cumsum(0).to(torch.int32))

    compiled = one_graph(routed, "aot_eager")
    for counts in map(torch.tensor, COUNTS):
        for a, b in zip(compiled(x, w, dy, counts), routed(x, w, dy, counts)):
            assert torch.equal(a, b)
    assert len(captures) == 1


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_inductor_is_eager(recipe):
    linear, grouped = linear_for(recipe), grouped_mm_for(recipe)
    x, w, dy, offsets = experts([3, 0, 20, 17])

    def both(x, w, dy, offsets):
        return *step(linear)(x, w[0], dy), *step(grouped)(x, w, dy, offsets)

    for a, b in zip(one_graph(both, "inductor")(x, w, dy, offsets), both(x, w, dy, offsets)):
        assert off(a, b) < 1e-3


@pytest.mark.parametrize("counts", COUNTS)
def test_groups_aligned_for_a_kernel_that_asks_for_it(counts):
    """The way to the GPU's kernel, with a strict stand-in for it that leaves garbage where the kernel does."""

    def strict(x, w, offsets):
        sizes = offsets.diff(prepend=offsets.new_zeros(1))
        assert offsets.dtype == torch.int32 and x.is_contiguous() and len(x) % 16 == 0 and offsets[-1] <= len(x)
        assert (sizes % 16 == 0).all() and (sizes > 0).all()
        y = rowwise_grouped_mm(x[: offsets[-1]], w, offsets)
        return torch.cat([y, torch.full((len(x) - len(y), N), torch.nan)])

    assert worst(precision.in_aligned_groups(strict), counts) < FP32


def test_aligned_groups_compile_once_for_any_row_count(captures):
    x, w, dy, _ = experts([16] * E)
    aligned = step(precision.in_aligned_groups(rowwise_kernel_of_padded_rows))

    def routed(x, w, dy, counts):
        rows = counts.sum().item()
        torch._check(rows <= x.shape[0])
        return aligned(x[:rows], w, dy[:rows], counts.cumsum(0).to(torch.int32))

    compiled = one_graph(routed, "aot_eager")
    for counts in COUNTS:
        rows, counts = sum(counts), torch.tensor(counts)
        want = step(rowwise_grouped_mm)(x[:rows], w, dy[:rows], counts.cumsum(0).int())
        for a, b in zip(compiled(x, w, dy, counts), want):
            assert furthest(a, b) < BF16
    assert len(captures) == 1


def rowwise_kernel_of_padded_rows(x, w, offsets):
    """A kernel as the GPU's, of shapes known to no one: the rows behind the last group go to it."""
    return rowwise_grouped_mm(x, w, torch.cat([offsets[:-1], offsets.new_full((1,), x.shape[0])]))


def test_torchao_grouped_product_takes_what_we_pass():
    from torchao.prototype.moe_training import _to_fp8_rowwise_then_scaled_grouped_mm as scaled

    inspect.signature(scaled).bind(None, None, None, torch.bfloat16, pad_token_groups_for_grouped_mm=False)


# ---- Faults, each of which the comparisons above must notice


def no_scale(x, amax=None):
    return x.to(E4M3).to(x.dtype)


def not_scaled_back(x, amax=None):
    amax = x.abs().amax(-1, keepdim=True) if amax is None else amax
    return (x * 448 / amax.clamp(min=1e-12)).to(E4M3).to(x.dtype)


def one_scale(x, amax=None):
    return ROUNDED(x, x.abs().amax().expand(*x.shape[:-1], 1))


def along_the_other_dimension(x, amax=None):
    return ROUNDED(x.mT).mT if amax is None else ROUNDED(x)


ROUNDED = precision._rounded
GROUP_AMAX = precision.group_amax
MUTANTS = {
    "scale dropped": ("_rounded", no_scale),
    "not scaled back": ("_rounded", not_scaled_back),
    "one scale for all": ("_rounded", one_scale),
    "wrong dimension": ("_rounded", along_the_other_dimension),
    "not rounded": ("_rounded", lambda x, amax=None: x),
    "scales of the next expert": ("group_amax", lambda x, offsets: GROUP_AMAX(x, offsets).roll(1, 0)),
    "one scale for all experts": ("_rounded_by_group", lambda x, offsets: ROUNDED(x, x.abs().amax(0, keepdim=True))),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_faulty_twins_are_noticed(mutant, monkeypatch):
    monkeypatch.setattr(precision, *MUTANTS[mutant])
    assert worst(rowwise_grouped_mm, COUNTS[0]) > 100 * FP32, f"{mutant} goes unseen"


@pytest.mark.parametrize("recipe", RECIPES)
def test_faulty_linears_are_noticed(recipe, monkeypatch):
    x, w, dy = spread(7, 48), spread(64, 48), spread(7, 64)
    want, real = by_definition(recipe, x, w, dy), torch._scaled_mm
    one = torch.ones(())
    faults = {
        "scale dropped": lambda a, b, scale_a, scale_b, **kw: real(a, b, scale_a=one, scale_b=one, **kw),
        "operand misplaced": lambda a, b, **kw: real(a.view(torch.uint8).roll(1, 0).view(a.dtype), b, **kw),
    }
    for fault in faults.values():
        monkeypatch.setattr(torch, "_scaled_mm", fault)
        y, dx, _ = step(linear_for(recipe))(x, w, dy)
        assert furthest(y, want[0]) > 10 * BF16
    monkeypatch.undo()
    for other in set(RECIPES) - {recipe}:
        got = step(linear_for(other))(x, w, dy)
        assert max(map(furthest, got, want)) > 2 * BF16, f"{other} passes for {recipe}"


# ---- What the run says


def compute(name):
    return precision.compute_dtype(name)


def test_compute_dtype_and_unknown_names():
    assert [compute(name) for name in PRECISIONS] == [torch.float32] + [torch.bfloat16] * 4
    for f in (compute, linear_for, grouped_mm_for):
        with pytest.raises(ValueError, match=r"^--precision fp8: must be one of fp32, bf16, fp8-tensorwise, .*gw-hp$"):
            f("fp8")
    assert linear_for("bf16") is F.linear and grouped_mm_for("fp32") is grouped_mm


def test_report_says_which_weights_are_quantised():
    shapes = {
        "embed.weight": (128, 32),
        "layers.0.norm.weight": (32,),
        "layers.0.wide.weight": (64, 32),
        "layers.0.odd.weight": (32, 60),
        "layers.0.router.weight": (4, 32),
        "layers.0.gate": (4, 48, 32),
        "layers.0.up": (4, 48, 32),
        "layers.0.down": (4, 32, 40),
    }
    specs = {name: ParamSpec(shape, normal(0.02)) for name, shape in shapes.items()}

    def forward(p, batch, ops):
        x = F.embedding(batch["input_ids"], p["embed.weight"])

        def block(q, x, layer):
            wide = ops.linear(x * q["norm.weight"], q["wide.weight"])
            x = x + ops.linear(wide[..., :60], q["odd.weight"])
            weight, index = (x.flatten(0, 1) @ q["router.weight"].T).topk(2)
            return ops.experts(x.flatten(0, 1), weight, index, q["gate"], q["up"], q["down"]).view_as(x), None

        x, _ = ops.scan(block, p, "layers", 1, x)
        return x @ p["embed.weight"].T

    report = precision.fp8_report(Model("toy", {}, None, specs, forward))
    assert report.quantised == ("layers.0.wide.weight", "layers.0.gate", "layers.0.up")
    assert report.fallback == ("layers.0.odd.weight", "layers.0.down")
    assert report.excluded == ("embed.weight", "layers.0.norm.weight", "layers.0.router.weight")
    assert precision.by_layer(("a.0.b", "a.17.b", "c")) == {"a.*.b": 2, "c": 1}


@pytest.mark.slow
def test_products_of_one_operand_compile():
    """As q, k and v have: with each taking the maxima itself, inductor's C++ for bf16 did not compile."""
    torch.manual_seed(0)
    linear = linear_for("fp8-rowwise")
    x = torch.randn(512, 256, dtype=torch.bfloat16)
    w = {name: torch.randn(n, 256, dtype=torch.bfloat16) / 16 for name, n in (("q", 256), ("k", 128), ("v", 128))}

    def run(x, w):
        leaves = [t.detach().requires_grad_() for t in (x, *w.values())]
        normed = leaves[0] * torch.rsqrt(leaves[0].float().square().mean(1, keepdim=True)).bfloat16()
        y = torch.cat([linear(normed, each) for each in leaves[1:]], 1)
        return y.detach(), torch.autograd.grad(y.float().square().sum(), leaves)

    for compiled, eager in zip(tree_leaves(one_graph(run, "inductor")(x, w)), tree_leaves(run(x, w)), strict=True):
        # An element at the edge of two float8 values may fall on either side: few do.
        assert (compiled - eager).float().norm() < 0.08 * eager.float().norm()

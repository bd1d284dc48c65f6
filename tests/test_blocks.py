"""What a layer's block may do, captured and not, and what is refused."""

import re

import pytest
import torch
import torch.nn.functional as F

from ftrain.experts import grouped_mm
from ftrain.graph import one_graph
from ftrain.ops import plain
from ftrain.parallel import Gathered, parallel_ops
from ftrain.remat import POLICIES
from ftrain.specs import ParamSpec, normal
from ftrain.state import initial

from layers import LAYERS, H, base, batches, gradients, of_blocks, sharding_of, specs_of, wrong

pytestmark = pytest.mark.usefixtures("one_thread", "one_rank")


# --- Writing into a slice of what the block made itself


def zeroes_a_row(y):
    y[:, 0] = 0.0
    return y


def fills_a_view(y):
    y[:, 0].fill_(0.5)
    return y


def doubles_a_part(y):
    y[..., :2] = y[..., :2] * 2
    return y


def turns_a_part(y):
    y[..., :2] = torch.stack([-y[..., 1], y[..., 0]], -1)
    return y


def multiplies_a_view(y):
    y[..., :2].mul_(2)
    return y


def adds_to_rows(y):
    y.index_add_(0, torch.tensor([0, 2]), torch.ones(2, H))
    return y


def fills_anew(y):
    new = torch.zeros_like(y)
    new[:, :2] = y[:, 2:]
    new[:, 2:] = y[:, :2].tanh()
    return new


WRITES = [zeroes_a_row, fills_a_view, doubles_a_part, turns_a_part, multiplies_a_view, adds_to_rows, fills_anew]


@pytest.mark.parametrize("remat", POLICIES)
@pytest.mark.parametrize("write", WRITES)
def test_slices_of_its_own_may_be_written(write, remat):
    first = of_blocks(lambda q, x, i, batch: (base(q, write(x * 1.0)), None))
    last = of_blocks(lambda q, x, i, batch: (write(base(q, x) + 0.5), x.sum()))
    for forward in (first, last):
        try:
            assert not wrong(forward, remat=remat)
        except ValueError as refused:  # what is kept may not change, and under `none` all is kept
            assert remat == "none" and "its result is changed in place" in str(refused)


def test_a_slice_of_a_gradient_may_be_written():
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            grad = grad.clone()
            grad[:, 1].mul_(3.0)
            grad[0].zero_()
            return grad

    assert not wrong(of_blocks(lambda q, x, i, batch: (base(q, Cut.apply(x)), None)))


# --- Random numbers


@pytest.mark.parametrize("mode", ["off", "aot_eager"])
@pytest.mark.parametrize("remat", POLICIES)
def test_random_numbers_are_drawn_once(remat, mode):
    """The gradient is that of the numbers that the forward saw: the output tells them."""

    def forward(p, batch, ops):
        def block(q, x, i):
            noise = torch.rand_like(x)
            return x * noise + 0 * (x @ q["a"] @ q["b"]), noise

        x, noises = ops.scan(block, p, "l", LAYERS, batch["x"] @ p["e"])
        return (x * torch.stack([n.detach() for n in noises]).prod(0)).sum()

    specs = specs_of(extra="e")
    params = {name: initial(name, spec, 0) for name, spec in specs.items()}
    [batch, _] = batches()
    found = one_graph(gradients(forward, specs, sharding_of(specs), remat), mode)(params, batch)
    # d loss / d e = x^T (prod of noises)^2, and the loss is the sum of (x e) (prod of noises)^2: <grad, e> is the loss.
    torch.testing.assert_close((found["e"] * params["e"]).sum(), found["loss"])
    assert float(found["loss"].abs()) > 1e-3


@pytest.mark.parametrize("remat", POLICIES)
def test_dropout_says_that_it_has_no_place(remat):
    with pytest.raises(ValueError, match=r"l\.0: .*test_blocks.py, line \d+ .*changed in place"):
        wrong(of_blocks(lambda q, x, i, batch: (base(q, F.dropout(x + q["a"][0], 0.5)), None)), remat=remat)


# --- Hooks, unread parameters, cut gradients


@pytest.mark.parametrize("mode", ["off", "aot_eager"])
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("of", ["input", "parameter", "outside", "leaf"])
def test_hooks_on_what_is_not_its_own_are_refused(of, remat, mode):
    def forward(p, batch, ops):
        start = batch["x"] @ p["e"]
        leaf = torch.zeros(H, requires_grad=True)

        def block(q, x, i):
            {"input": x, "parameter": q["a"], "outside": start, "leaf": leaf}[of].register_hook(lambda g: g * 2)
            return base(q, x) + leaf, None

        return ops.scan(block, p, "l", LAYERS, start)[0].sum()

    with pytest.raises(ValueError, match=r"l\.0: a hook on a tensor that the layer did not make"):
        wrong(forward, specs_of(extra="e"), remat=remat, mode=mode)


@pytest.mark.parametrize("mode", ["off", "aot_eager"])
def test_a_hook_on_its_own_is_part_of_it(mode):
    def block(q, x, i, batch):
        y = base(q, x)
        y.view(-1).register_hook(lambda g: g * (i + 2))
        z = y * 2
        z.register_hook(lambda g: g * (i + 2))
        return z, None

    for remat in POLICIES:
        assert not wrong(of_blocks(block), remat=remat, mode=mode)


@pytest.mark.parametrize("mode", ["off", "aot_eager"])
def test_a_parameter_that_no_block_reads_is_named(mode):
    specs = specs_of() | {f"l.{i}.idle": ParamSpec((H, H), normal(0.5)) for i in range(LAYERS)}
    with pytest.raises(ValueError, match="l: no block reads idle, which the model declares"):
        wrong(of_blocks(lambda q, x, i, batch: (base(q, x) + len(q) * ("idle" in q), None)), specs, mode=mode)


def test_a_gradient_that_ends_within_ends_before_too():
    """What comes before is not reached: no gradient, rather than one of zeros."""
    specs = specs_of(extra="e")

    def forward(p, batch, ops):
        x, _ = ops.scan(lambda q, x, i: (base(q, x.detach() if i == 1 else x), None), p, "l", LAYERS, batch["x"] @ p["e"])
        return x.sum()

    def run(params, batch):
        leaves = {name: t.detach().requires_grad_() for name, t in params.items()}
        ops = parallel_ops(plain(), sharding, "none", grouped_mm)
        loss = forward(Gathered(leaves, sharding.buckets), batch, ops)
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        reached.append({name for name, grad in zip(leaves, found) if grad is not None})
        return loss.detach()

    reached: list[set[str]] = []
    sharding = sharding_of(specs)
    params = {name: initial(name, spec, 0) for name, spec in specs.items()}
    one_graph(run, "aot_eager")(params, batches()[0])
    assert reached == [{"l.1.a", "l.1.b", "l.2.a", "l.2.b"}]
    assert not wrong(forward, specs)


# --- What a capture cannot know


def test_python_that_asks_for_values_is_named():
    def before(p, batch, ops):
        x = batch["x"] * 2 if batch["x"].sum() > 0 else batch["x"]
        return ops.scan(lambda q, x, i: (base(q, x), None), p, "l", LAYERS, x)[0].sum()

    within = of_blocks(lambda q, x, i, batch: (base(q, x) * (2.0 if x.detach().max() > 0 else 1.0), None))
    for forward in (before, within):
        with pytest.raises(ValueError, match=r"test_blocks.py, line \d+ .*asks for a tensor's values.*torch.where"):
            wrong(forward)


TABLE = torch.tensor([1.0, 2.0, -0.5])


def test_constants_of_a_module_may_be_read():
    assert not wrong(of_blocks(lambda q, x, i, batch: (base(q, x) * TABLE[i] + TABLE.sum(), None)))
    assert not wrong(of_blocks(lambda q, x, i, batch: (base(q, x), None), lambda x, ys: (x * TABLE[1]).sum()))


@pytest.mark.parametrize("where", ["before", "within"])
def test_what_is_kept_between_calls_is_named(where):
    kept: dict = {}

    def cached(like):
        if "ones" not in kept:
            kept["ones"] = torch.ones_like(like[0]) * 2
        return kept["ones"]

    def forward(p, batch, ops):
        start = batch["x"] * cached(batch["x"]) if where == "before" else batch["x"]
        return ops.scan(lambda q, x, i: (base(q, x * cached(x)), None), p, "l", LAYERS, start)[0].sum()

    specs = specs_of()
    params = {name: initial(name, spec, 0) for name, spec in specs.items()}
    captured = one_graph(gradients(forward, specs, sharding_of(specs)), "aot_eager")
    other = {**batches()[0], "x": torch.ones(5, H)}
    with pytest.raises(ValueError, match=re.escape("a tensor is kept from one call to another")):
        captured(params, batches()[0])
        captured(params, other)

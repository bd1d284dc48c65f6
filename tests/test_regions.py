"""Layers that look alike and are not: what is captured for one never serves another that differs in anything.

Each attack is a model of three layers, run plainly and captured; where a fault is put into the capture, one is seen.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from layers import LAYERS, H, base, batches, gradients, of_blocks, sharding_of, specs_of, wrong
from torch.distributed.tensor import Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from ftrain import graph, outline, parallel, region
from ftrain.graph import one_graph
from ftrain.loss import cross_entropy
from ftrain.mesh import Mesh
from ftrain.plan import find_plan
from ftrain.region import Region
from ftrain.remat import POLICIES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def ranks(request):
    """One of one; of two that are only said to be there, where a test asks for them."""
    world = getattr(request, "param", 1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    yield
    dist.destroy_process_group()


# --- Autograd functions and hooks


def scaled(factor):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * factor

    return Scaled


SCALED = [scaled(1.0), scaled(2.0), scaled(3.0)]


class Saves(torch.autograd.Function):
    """The same sum whatever it saves."""

    @staticmethod
    def forward(ctx, x, y, first):
        ctx.save_for_backward(x if first else y)
        return x + y

    @staticmethod
    def backward(ctx, grad):
        (saved,) = ctx.saved_tensors
        return grad * saved, grad, None


class Swaps(torch.autograd.Function):
    """The same sum whichever comes first; the gradients are not."""

    @staticmethod
    def forward(ctx, a, b, turned):
        return b + a if turned else a + b

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad, 3 * grad, None


def swapped(q, x, layer, batch):
    x = base(q, x)
    u, v = x * batch["c"], x * (batch["c"] + 1)
    return (Swaps.apply(v, u, True) if layer == 1 else Swaps.apply(u, v, False)), None


def hooked(q, x, layer, batch):
    x = base(q, x)
    if layer == 1:
        x.register_hook(lambda grad: grad * 3)
    return x * 1.5, None


def by_turns(q, x, layer, batch):
    with torch.set_grad_enabled(layer != 1):
        u = x @ q["a"]
    with torch.set_grad_enabled(layer == 1):
        v = x @ q["b"]
    return u.tanh() * v + x, None


ATTACKS = {
    "a float": lambda q, x, layer, batch: (base(q, x) * (1.0 + layer), None),
    "an int and a float": lambda q, x, layer, batch: (base(q, x) * (2, 2.0, 3)[layer], None),
    "minus zero": lambda q, x, layer, batch: (
        (base(q, x) / torch.full((), (0.0, -0.0, 0.0)[layer])).clamp(-1, 1) + base(q, x), None
    ),
    "a constant": lambda q, x, layer, batch: (base(q, x) * torch.tensor([1.0, 2.0, 3.0, layer]), None),
    "minus zero in a constant": lambda q, x, layer, batch: (
        torch.copysign(base(q, x), torch.tensor((0.0, -0.0, 0.0)[layer])), None
    ),
    "a function's class": lambda q, x, layer, batch: (SCALED[layer].apply(base(q, x)), None),
    "what a function saves": lambda q, x, layer, batch: (Saves.apply(base(q, x), x @ q["a"], layer == 1), None),
    "the order of a function's arguments": swapped,
    "a hook": hooked,
    "no_grad": by_turns,
    "detach": lambda q, x, layer, batch: (base(q, x.detach() if layer == 1 else x) + x, None),
    "an unused parameter": lambda q, x, layer, batch: (x @ q["a"] if layer == 1 else base(q, x), None),
    "no parameter used": lambda q, x, layer, batch: (x if layer == 1 else base(q, x), None),
    "views given back": lambda q, x, layer, batch: (x.view(-1).view(x.shape) if layer == 1 else base(q, x), x),
    "in place, on what is fresh": lambda q, x, layer, batch: (
        base(q, x) + torch.zeros(3, H).scatter_(1, torch.tensor([[layer, 3 - layer]] * 3), x.detach()[:, :2]), None
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_layers_that_differ_in(attack):
    assert not wrong(of_blocks(ATTACKS[attack]))


@pytest.mark.parametrize("remat", POLICIES)
def test_frozen_layers_and_policies(remat):
    frozen = ("l.0.a", "l.0.b", "l.1.a")
    forward = of_blocks(lambda q, x, layer, batch: (base(q, x) + x, x @ q["a"]), lambda x, ys: x.sum() + ys[2].sum())
    assert not wrong(forward, specs_of(frozen), remat=remat)


# --- What a layer gives


Y = {
    "none in some": lambda q, x, layer: (base(q, x), x @ q["a"] if layer != 1 else None),
    "the same tensor twice": lambda q, x, layer: (lambda t: (t, t))(base(q, x)),
    "what came in": lambda q, x, layer: (base(q, x), x),
    "numbers, in a structure": lambda q, x, layer: (base(q, x), {"y": x @ q["a"], "n": layer, "f": 0.5, "s": "t"}),
}


@pytest.mark.parametrize("gives", Y)
@pytest.mark.parametrize("last", [True, False])
def test_outputs(gives, last):
    def end(x, ys):
        of = [y["y"] * (y["n"] + y["f"] + len(y["s"])) if isinstance(y, dict) else y for y in ys]
        return (x.square().sum() if last else 0.0) + sum(y.square().sum() for y in of[1:] if y is not None)

    assert not wrong(of_blocks(lambda q, x, layer, batch: Y[gives](q, x, layer), end))


def times(q, x, layer, batch):
    return base(q, x) * batch["n"].tolist()[layer], None


def rows(q, x, layer, batch):
    n = batch["n"].tolist()[layer]
    torch._check(n >= 0)
    torch._check(n <= 3)
    return base(q, x), (x @ q["a"]).narrow(0, 0, n)


def by_size(x, ys):
    return x.sum() + sum(y.square().sum() * (1 + y.shape[0]) for y in ys) + torch.cat(ys).shape[0]


COUNTS = (torch.tensor([1, 2, 3]), torch.tensor([3, 0, 1]))


def positive(q, x, layer, batch):
    """The same code in each layer, but not the same size."""
    n = (x.detach() > 0).sum().item()
    torch._check(n >= 0)
    torch._check(n <= 3 * H)
    return base(q, x), (x @ q["a"]).flatten().narrow(0, 0, n)


@pytest.mark.parametrize("forward", [of_blocks(times), of_blocks(rows, by_size), of_blocks(positive, by_size)])
def test_numbers_that_depend_on_data(forward):
    assert not wrong(forward, data=batches(n=COUNTS))


def test_closures_of_sizes_that_depend_on_data():
    def forward(p, batch, ops):
        counts = batch["n"].tolist()
        for n in counts:
            torch._check(n >= 0)
            torch._check(n <= 3)
        parts = [(batch["x"] @ p["e"]).narrow(0, 0, n) for n in counts]
        x, ys = ops.scan(lambda q, x, i: (base(q, x) + parts[i].sum(), parts[i] @ q["a"]), p, "l", LAYERS, batch["x"])
        return by_size(x, ys)

    assert not wrong(forward, specs_of(extra="e"), batches(n=COUNTS))


# --- What a layer takes from around itself


def test_closures():
    """The same one twice in a layer, another, one that needs no gradient, what comes in as x."""

    def forward(p, batch, ops):
        c, d, e = batch["x"] @ p["e"], batch["x"] @ p["f"], batch["x"] * 2
        first, second = [c, d, c, e], [c, c, d, c]
        x, _ = ops.scan(lambda q, x, i: (base(q, x) * first[i] + second[i] + c, None), p, "l", LAYERS, c)
        x, _ = ops.scan(lambda q, x, i: (base(q, x) * first[i + 1] + c.t()[:, :3].sum(), None), p, "l", LAYERS, x)
        return x.square().sum()

    assert not wrong(forward, specs_of(extra="ef"))


@pytest.mark.parametrize("end", ["plain", "inner"])
def test_a_scan_without_gradients_beside_one_with(end):
    def forward(p, batch, ops):
        with torch.no_grad():
            still, _ = ops.scan(lambda q, x, i: (base(q, x), None), p, "l", LAYERS, batch["x"])
        x, _ = ops.scan(lambda q, x, i: (base(q, x), None), p, "l", LAYERS, batch["x"] if end == "plain" else still)
        return (x * still).sum()

    assert not wrong(forward)


def changes_a_closure(p, batch, ops):
    seen = torch.zeros(H)
    x, _ = ops.scan(lambda q, x, i: (base(q, x) + 0 * seen.add_(x.detach().sum(0)), None), p, "l", LAYERS, batch["x"])
    return (x * seen).sum()


def changes_x(p, batch, ops):
    return ops.scan(lambda q, x, i: (base(q, x.mul_(2)), None), p, "l", LAYERS, batch["x"] + 1)[0].sum()


def changes_an_output(p, batch, ops):
    return ops.scan(lambda q, x, i: (base(q, x).exp(), None), p, "l", LAYERS, batch["x"])[0].mul_(2).sum()


def changes_a_view_of_an_output(p, batch, ops):
    def block(q, x, i):
        x = base(q, x).exp()
        return x, x.view(-1)

    x, ys = ops.scan(block, p, "l", LAYERS, batch["x"])
    return x.sum() + ys[0].mul_(2).sum()


def changes_an_input(p, batch, ops):
    h = batch["x"] @ p["e"]
    x, _ = ops.scan(lambda q, x, i: (base(q, x) * h, None), p, "l", LAYERS, h)
    return x.sum() + h.mul_(2).sum()


def changes_a_closure_after(p, batch, ops):
    c = batch["x"] + 1
    x, _ = ops.scan(lambda q, x, i: (base(q, x) * c, None), p, "l", LAYERS, batch["x"])
    return x.sum() + c.mul_(2).sum()


CHANGES = [
    changes_a_closure, changes_x, changes_an_output, changes_a_view_of_an_output, changes_an_input,
    changes_a_closure_after,
]  # fmt: skip


@pytest.mark.parametrize("forward", CHANGES)
def test_what_the_backward_needs_is_not_changed_in_place(forward):
    with pytest.raises((RuntimeError, ValueError), match="modified by an inplace operation|is changed in place there"):
        wrong(forward, specs_of(extra="e"))


def test_what_it_does_not_need_may_be():
    def forward(p, batch, ops):
        x, ys = ops.scan(lambda q, x, i: (base(q, x) * 1.5, x @ q["a"] + 1), p, "l", LAYERS, batch["x"])
        return x.mul_(2).square().sum() + ys[0].add_(ys[1]).mul_(ys[2]).sum()

    assert not wrong(forward)


def test_gradients_of_gradients_are_refused():
    def forward(p, batch, ops):
        start = batch["x"].clone().requires_grad_()
        x, _ = ops.scan(lambda q, x, i: (base(q, x), None), p, "l", LAYERS, start)
        [grad] = torch.autograd.grad(x.square().sum(), [start], create_graph=True)
        return x.sum() + grad.square().sum()

    with pytest.raises(NotImplementedError, match="gradients of gradients, through l_forward"):
        wrong(forward)


def test_the_loss_has_no_second_gradient():
    hidden = torch.randn(2, 3, H).requires_grad_()
    loss = cross_entropy(hidden, torch.randn(5, H), torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(NotImplementedError, match="gradients of gradients"):
        torch.autograd.grad(loss, [hidden], create_graph=True)


# --- What is captured at one call serves another only where it may


def of_two(p, batch, ops):
    return ((batch["x"] @ p["l.0.a"]) * batch["z"]).sum()


def aliased():
    x, y, z = (torch.randn(3, H, generator=torch.Generator().manual_seed(i)) for i in range(3))
    return [{"x": x, "z": x}, {"x": y, "z": z}, {"x": z, "z": z}]


def test_one_tensor_as_two_arguments():
    assert not wrong(of_two, specs_of(), aliased())


def test_other_strides_and_dtypes():
    forward = of_blocks(lambda q, x, layer, batch: (base(q, x) + batch["x"].reshape(-1).sin().view(3, H), None))
    x = torch.randn(3, 2 * H)
    assert not wrong(forward, data=[{"x": x[:, :H].contiguous()}, {"x": x[:, :H]}, {"x": x.view(H, 6)[:, :3].t()}])
    ints = of_blocks(lambda q, x, layer, batch: (base(q, x.float()), None))
    assert not wrong(ints, data=[{"x": x[:, :H].contiguous()}, {"x": torch.arange(12).view(3, H)}])


# --- How a layer's parameters are cut


def alternating(name, shape, mesh):
    """Pieces of the same size, of other dimensions in the second layer."""
    return [Shard(1 if ".1." in name else 0), Replicate(), Replicate()]


def regions_of_two_ranks(forward, plan):
    """How many distinct regions the model is captured as."""
    of = specs_of()
    sharding = sharding_of(of, plan, Mesh(2, 1, 1))
    pieces = {n: torch.randn(H, 2) if sharding.placements[n][0] == Shard(1) else torch.randn(2, H) for n in of}
    captured = one_graph(gradients(forward, of, sharding), "aot_eager")
    captured(pieces, batches()[0])
    [program] = captured.programs
    return len({n.target.key for n in program.nodes if isinstance(n.target, Region)})


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_layers_that_are_cut_otherwise(monkeypatch):
    alike = of_blocks(lambda q, x, layer, batch: (base(q, x), None))
    assert regions_of_two_ranks(alike, find_plan("fsdp")) == 3  # the first layer's x needs no gradient
    assert regions_of_two_ranks(alike, alternating) == 5
    gathering = parallel.gathering
    monkeypatch.setattr(parallel, "gathering", lambda *args: gathering(*args)._replace(layout=()))
    assert regions_of_two_ranks(alike, alternating) == 4  # where the layout counts for nothing


# --- Faults in the capture itself


def gradients_not_noted(patch):
    real = outline.outline
    patch.setattr(region, "outline", lambda fn, inputs: real(fn, [t.detach() for t in inputs]))


def zero_has_no_sign(patch):
    patch.setattr(outline, "exact", lambda value: (type(value).__name__, value))


def constants_not_noted(patch):
    patch.setattr(outline, "constant", lambda t: (t.dtype, tuple(t.shape)))


def sizes_taken_for_one_another(patch):
    patch.setattr(region, "_sizes", lambda values: set())


def any_size_will_do(patch):
    patch.setattr(outline, "tree_leaves", lambda out: [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)])


def aliases_not_told_apart(patch):
    patch.setattr(graph, "layout", lambda tensors: tuple((t.shape, t.dtype) for t in tensors))


FAULTS = [
    (gradients_not_noted, of_blocks(ATTACKS["a function's class"]), batches, None),
    (zero_has_no_sign, of_blocks(ATTACKS["minus zero"]), batches, None),
    (constants_not_noted, of_blocks(ATTACKS["a constant"]), batches, None),
    (sizes_taken_for_one_another, of_blocks(positive, by_size), batches, "must match the size of tensor"),
    (any_size_will_do, of_blocks(times), lambda: batches(n=COUNTS), None),
    (aliases_not_told_apart, of_two, aliased, None),
]  # fmt: skip


@pytest.mark.parametrize("fault, forward, data, match", FAULTS, ids=lambda v: getattr(v, "__name__", None))
def test_a_fault_of_the_capture_is_seen(fault, forward, data, match, monkeypatch):
    assert not wrong(forward, data=data())
    fault(monkeypatch)
    with pytest.raises(RuntimeError, match=match) if match else nullcontext():  # which is to see it, too
        found = wrong(forward, data=data())
        assert found

"""Every order that a captured graph is put in computes what the graph did, whatever is changed in place on the way."""

import operator

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from torch import fx

from ftrain import schedule
from ftrain.nodes import is_start, is_wait, mutates
from ftrain.region import Region
from ftrain.schedule import base, gather_ahead, in_order, late_waits, live, one_by_one, overlap

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

INPUTS, SIZE = 3, 6


@pytest.fixture(autouse=True)
def ranks():
    """One alone, which gathers its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def layer(gives_its_input):
    """A region (x, w) -> (x + w, a view of x, or x + w again)."""
    inner = fx.Graph()
    x, w = inner.placeholder("x"), inner.placeholder("w")
    out = inner.call_function(aten.add.Tensor, (x, w))
    inner.output((out, inner.call_function(aten.view.default, (x if gives_its_input else out, [SIZE]))))
    return Region("layer", inner, torch.nn.Module())


LAYERS = [layer(False), layer(True)]
CHANGING = ["mul_", "add_", "foreach", "strided"]
KINDS = [
    "gathered", "reduced", "view", "clone", "add", "flip", "cat", "stack", "layer", "layer of an input", *CHANGING,
]  # fmt: skip


@st.composite
def graphs(draw, kinds=KINDS):
    """A graph of tensors of SIZE numbers, as a capture may leave it."""
    graph = fx.Graph()
    inputs = [graph.placeholder(f"p{i}") for i in range(INPUTS)]
    pool, group = list(inputs), dist.group.WORLD.group_name

    def call(op, *args):
        return graph.call_function(op, args)

    def gathered(of):
        return call(c10d.wait_tensor.default, call(c10d.all_gather_into_tensor.default, of, 1, group))

    for _ in range(draw(st.integers(1, 14))):
        a, b, kind = draw(st.sampled_from(pool)), draw(st.sampled_from(pool)), draw(st.sampled_from(kinds))
        if kind == "gathered":
            pool.append(gathered(a))
        elif kind == "reduced":
            pool.append(call(c10d.wait_tensor.default, call(c10d.all_reduce.default, a, "sum", group)))
        elif kind == "view":
            pool.append(call(aten.view.default, a, [SIZE]))
        elif kind == "clone":
            pool.append(call(aten.clone.default, a))
        elif kind == "add":
            pool.append(call(aten.add.Tensor, a, b))
        elif kind == "flip":
            pool.append(call(aten.flip.default, a, [0]))
        elif kind == "cat":
            pool.append(call(aten.slice.Tensor, call(aten.cat.default, [a, b]), 0, 2, 2 + SIZE))
        elif kind == "stack":
            pool.append(call(aten.select.int, call(aten.stack.default, [a, b]), 0, 1))
        elif kind.startswith("layer"):
            weight = gathered(call(aten.cat.default, [draw(st.sampled_from(inputs))]))
            outs = call(LAYERS[kind != "layer"], a, weight)
            pool += [call(operator.getitem, outs, i) for i in range(2)]
        elif kind == "mul_":
            pool.append(call(aten.mul_.Tensor, a, 2))
        elif kind == "add_":
            call(aten.add_.Tensor, a, 1)
        elif kind == "foreach":
            call(aten._foreach_mul_.Scalar, [a], 3)
        else:
            call(aten.mul_.Tensor, call(aten.as_strided.default, a, [SIZE], [1]), 5)
    graph.output((*draw(st.lists(st.sampled_from(pool), max_size=4)), *inputs))
    return graph


def ran(nodes):
    """The outputs, of which the inputs after it are some. Every node must come after what it takes."""
    graph, copied = fx.Graph(), {}
    for n in nodes:
        copied[n] = graph.node_copy(n, copied.__getitem__)
    inputs = sum(n.op == "placeholder" for n in nodes)
    run = Waiting(fx.GraphModule({}, graph))
    results = run.run(*(torch.arange(float(SIZE)) + i for i in range(inputs)))
    for t in run.begun:
        c10d.wait_tensor(t)
    return results


class Waiting(fx.Interpreter):
    """Knows what was begun. Not all graphs wait for it, and torch can abort where nobody ever does."""

    def __init__(self, module):
        super().__init__(module)
        self.begun = []

    def run_node(self, n):
        result = super().run_node(n)
        self.begun += [result] * is_start(n)
        return result


def many(n=200):
    """Not made smaller: that takes a minute for each fault below."""
    return settings(
        max_examples=n, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )  # fmt: skip


@pytest.mark.parametrize("order", [late_waits, gather_ahead, one_by_one, live, in_order])
@many()
@given(graph=graphs())
def test_an_order_computes_the_same(order, graph):
    expected = ran(graph.nodes)
    assert all(map(torch.equal, ran(order(list(graph.nodes))), expected))


def test_what_is_held_back_takes_what_it_would_have():
    """A collective after another's result, which is changed then: among random graphs these are too few."""
    graph, group = fx.Graph(), dist.group.WORLD.group_name
    x = graph.placeholder("x")
    for _ in range(2):
        first = x
        x = graph.call_function(c10d.all_gather_into_tensor.default, (x, 1, group))
        x = graph.call_function(c10d.wait_tensor.default, (x,))
    graph.call_function(aten.mul_.Tensor, (first, 2))
    graph.output((x,))
    assert torch.equal(ran(one_by_one(list(graph.nodes)))[0], ran(graph.nodes)[0])


def given_back(graph, x, w):
    return graph.call_function(operator.getitem, (graph.call_function(LAYERS[1], (x, w)), 1))


def viewed(graph, x, w):
    return graph.call_function(aten.view.default, (x, [SIZE]))


@pytest.mark.parametrize("alias", [given_back, viewed])
def test_a_copy_is_taken_in_time(alias):
    """Of what is an input, by a layer that gave it back or by a view; the input is changed then."""
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    copy = graph.call_function(aten.clone.default, (alias(graph, x, w),))
    graph.call_function(aten.mul_.Tensor, (x, 2))
    graph.output((copy,))
    assert torch.equal(ran(late_waits(list(graph.nodes)))[0], ran(graph.nodes)[0])


@many()
@given(graph=graphs(kinds=[kind for kind in KINDS if kind not in CHANGING]))
def test_overlap_computes_the_same(graph):
    """Of graphs without changes in place and what nothing uses, which is what it is given."""
    nodes = live(list(graph.nodes))
    order = overlap(nodes)
    assert set(order) == set(nodes) and len(order) == len(nodes)
    assert [n for n in order if is_start(n)] == [n for n in nodes if is_start(n)]  # on all ranks alike
    assert all(map(torch.equal, ran(order), ran(nodes)))


@many()
@given(graph=graphs())
def test_nothing_changes_under_a_collective(graph):
    """It reads its input until it is waited for."""
    order = late_waits(list(graph.nodes))
    assert set(live(order)) == set(live(list(graph.nodes)))
    for i, start in enumerate(order):
        if is_start(start):
            end = next((j for j, n in enumerate(order) if is_wait(n) and n.args[0] is start), None)
            assert end is None or end > i
            for n in order[i:end]:
                assert not mutates(n) or base(start.args[0]) not in map(base, n.all_input_nodes)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_two_layers_are_gathered_at_most(layers):
    """Forward and backward; and each begins while the layer before it runs."""
    graph, group = fx.Graph(), dist.group.WORLD.group_name
    params = [graph.placeholder(f"p{i}") for i in range(layers)]
    x = params[0]
    for param in (*params, *reversed(params)):
        start = graph.call_function(c10d.all_gather_into_tensor.default, (param, 1, group))
        outs = graph.call_function(LAYERS[0], (x, graph.call_function(c10d.wait_tensor.default, (start,))))
        x = graph.call_function(operator.getitem, (outs, 0))
    graph.output((x,))
    expected, order = ran(graph.nodes), in_order(list(graph.nodes))
    assert torch.equal(ran(order)[0], expected[0])
    starts = [i for i, n in enumerate(order) if is_start(n)]
    assert len(starts) == 2 * layers - 1  # what the last layer had is used again
    ends = [max(order.index(user) for wait in order[i].users for user in wait.users) for i in starts]
    regions = [i for i, n in enumerate(order) if isinstance(n.target, Region)]
    for at in regions:
        assert sum(start <= at <= end for start, end in zip(starts, ends)) <= 2
    for i, end in list(zip(starts, ends))[1:]:
        assert any(i < at < end for at in regions)


def test_parameters_are_gathered_as_they_are():
    """One gathering before an update, and one after it."""
    graph = fx.Graph()
    group = dist.group.WORLD.group_name
    param = graph.placeholder("p")
    x = graph.placeholder("x")
    for _ in range(2):
        start = graph.call_function(c10d.all_gather_into_tensor.default, (param, 1, group))
        outs = graph.call_function(LAYERS[0], (x, graph.call_function(c10d.wait_tensor.default, (start,))))
        x = graph.call_function(operator.getitem, (outs, 0))
        graph.call_function(aten.mul_.Tensor, (param, 2))
    graph.output((x, param))
    expected = ran(graph.nodes)
    assert all(map(torch.equal, ran(in_order(list(graph.nodes))), expected))


# --- Faults in the order


def changes_not_heeded(patch):
    patch.setattr(schedule, "changed", lambda node: set())


def views_not_seen(patch):
    patch.setattr(schedule, "base", lambda node: node)


def inputs_given_back_not_seen(patch):
    patch.setattr(schedule, "Region", ())  # which nothing is an instance of


def collectives_done_when_begun(patch):
    patch.setattr(schedule, "reads", lambda node: {schedule.base(n) for n in node.all_input_nodes})


def held_past_a_change(patch):
    patch.setattr(schedule, "mutates", lambda node: False)


FAULTS = [
    (changes_not_heeded, test_an_order_computes_the_same, late_waits),
    (changes_not_heeded, test_an_order_computes_the_same, in_order),
    (held_past_a_change, test_what_is_held_back_takes_what_it_would_have, None),
    (views_not_seen, test_a_copy_is_taken_in_time, viewed),
    (inputs_given_back_not_seen, test_a_copy_is_taken_in_time, given_back),
    (collectives_done_when_begun, test_nothing_changes_under_a_collective, None),
]


@pytest.mark.parametrize("fault, test, of", FAULTS, ids=lambda v: getattr(v, "__name__", None))
def test_a_fault_is_seen(fault, test, of, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        test(of) if of else test()

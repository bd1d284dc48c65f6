"""What a captured graph is run as: pieces, compiled or not, that compute what it did."""

import pytest
import torch
import torch.distributed as dist
from layers import H, base, batches, gradients, of_blocks, sharding_of, specs_of, wrong
from torch.testing._internal.distributed.fake_pg import FakeStore

from ftrain.graph import one_graph
from ftrain.region import Region, structure

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def ranks():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
def test_a_piece_that_takes_nothing(mode):
    """Factories alone, between two operators that no compiler takes."""

    def fn(x):
        x.mul_(2)
        x.add_(torch.arange(4.0) * 3 + torch.ones(4))
        return x

    captured, x = one_graph(fn, mode), torch.ones(4)
    names = [instruction.name for instruction in captured.program(x).instructions]
    assert names == ["mul_", "arange", "add_"]
    assert captured(x).tolist() == [3, 6, 9, 12]


def maxima(q, x, layer, batch):
    """Of a tensor, of the same once more, and after it was changed under a view of it."""
    x = base(q, x)
    h = x.detach() + 0
    v = h.view(-1)
    before, again = v.abs().amax(), v.abs().amax()
    h.add_(1)
    return x * (before + again + 2 * v.abs().amax()), None


def a_maximum_changed_itself(q, x, layer, batch):
    x = base(q, x)
    one, other = x.detach().abs().amax(), x.detach().abs().amax()
    one.mul_(2)
    return x * (one + 3 * other), None


@pytest.mark.parametrize("block", [maxima, a_maximum_changed_itself])
def test_maxima_are_shared_only_while_they_are_the_same(block):
    assert not wrong(of_blocks(block), remat="full")  # what another policy keeps may not be changed


def test_the_region_stays_as_its_key_says():
    """What is compiled in its place is another graph."""
    specs = specs_of()
    captured = one_graph(gradients(of_blocks(maxima), specs, sharding_of(specs), "full"), "aot_eager")
    program = captured.program({name: torch.randn(H, H) for name in specs}, batches()[0])
    regions = {n.target.key: n.target for n in program.nodes if isinstance(n.target, Region)}
    assert regions and all(structure(of.module) == key for key, of in regions.items())
    assert any(structure(program.pieces[key]) != key for key in regions)

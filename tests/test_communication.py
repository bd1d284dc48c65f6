"""What one rank of a mesh exchanges in the compiled step: how often, how many bytes, and how much of it hides."""

from collections import Counter

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ftrain.equivalence import RECIPE, random_batch, shrink
from ftrain.flops import flops_per_token, graph_flops
from ftrain.job import make_job
from ftrain.mesh import Mesh
from ftrain.model import find_model
from ftrain.nodes import computes
from ftrain.offload import arrived, to_device, to_host
from ftrain.plan import find_plan
from ftrain.region import Region
from ftrain.state import init_state
from ftrain.step import make_train_step

LAYERS = 4
KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
MODEL = find_model(shrink(find_model("qwen3-moe-tiny").hf) | {"num_hidden_layers": LAYERS})
DENSE = find_model(shrink(find_model("Qwen3-0.6B").hf) | {"num_hidden_layers": LAYERS})


@pytest.fixture
def ranks():
    """Processes that are not there: what is captured for one of them is never run."""

    def start(world):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)

    yield start
    dist.destroy_process_group()


def captured(plan, mesh, model=MODEL, remat="selective"):
    """The step's program, as the first rank would run it."""
    job = make_job(model, find_plan(plan), mesh, remat=remat)
    state = init_state(model.specs, job.placements, job.device_mesh, 0)
    step = make_train_step(model, job.sharding, job.ops, RECIPE, "aot_eager")
    return step.program(state, job.microbatches(random_batch(131, 8, 12, 0)))


# Of one rank on fsdp 2 x sp 2 x ep 2: (hidden, exposed). 4 layers, the table and the norm; experts are gathered apart
# from the rest of a layer where they stay on their ep rank. The last layer's gathering serves forward and backward.
# Exposed is what the step ends with (the table's gradient, the norm) and, of each layer, rows on their way to their
# experts when there is nothing else to do.
PINNED = {
    "ddp": {"all_gather": (1, 0), "all_reduce": (7, 2), "all_to_all": (28, 4)},
    "fsdp": {"all_gather": (10, 0), "reduce_scatter": (5, 1), "all_reduce": (6, 3), "all_to_all": (28, 4)},
    "fsdp_ep": {"all_gather": (17, 0), "reduce_scatter": (9, 1), "all_reduce": (9, 4), "all_to_all": (44, 8)},
    "fsdp_sp": {"all_gather": (10, 0), "reduce_scatter": (5, 1), "all_reduce": (6, 3), "all_to_all": (28, 4)},
    "fsdp_sp_ep": {"all_gather": (17, 0), "reduce_scatter": (9, 1), "all_reduce": (2, 1), "all_to_all": (44, 8)},
}


@pytest.mark.parametrize("plan", PINNED)
def test_collectives_and_what_hides_them(plan, ranks):
    ranks(8)
    found = Counter()
    for one in captured(plan, Mesh(2, 2, 2)).collectives():
        found[next(kind for kind in KINDS if one.kind.startswith(kind)), one.exposed] += 1
    kinds = {kind for kind, _ in found}
    assert {kind: (found[kind, False], found[kind, True]) for kind in kinds} == PINNED[plan]


def test_a_dense_layer_is_gathered_once_and_reduced_once_each_way(ranks):
    """One all-gather for a layer and direction, but for the last's; one reduce-scatter; all of its own bytes."""
    ranks(2)
    found = captured("fsdp", Mesh(2, 1, 1), DENSE).collectives()
    layer = sum(s.numel for n, s in DENSE.specs.items() if ".layers.0." in n)
    gathers = [one.bytes for one in found if one.kind.startswith("all_gather")]
    reductions = [one for one in found if one.kind.startswith("reduce_scatter")]
    assert gathers.count(4 * layer) == 2 * LAYERS - 1
    assert [one.bytes for one in reductions].count(4 * layer) == LAYERS
    assert not any(one.exposed for one in found if one.bytes == 4 * layer)


def test_queries_are_on_their_way_while_keys_are_computed(ranks):
    """Ulysses: of three all-to-alls before attention only the last has nothing left to hide behind."""
    ranks(2)
    found = [one for one in captured("ddp", Mesh(1, 2, 1), DENSE).collectives() if one.kind.startswith("all_to_all")]
    # Three on the way to attention and one back, and the same backward: what crossed is kept, not sent again.
    assert len(found) == 8 * LAYERS
    assert [one.exposed for one in found[:4]] == [False, False, True, True]


def test_one_rank_exchanges_nothing(ranks):
    ranks(1)
    assert not captured("fsdp_sp_ep", Mesh()).collectives()


def test_what_waits_on_the_host_comes_back_a_layer_early(ranks):
    """All that a layer leaves for its backward is copied out, and begins to come back while another layer computes."""
    ranks(2)
    nodes = captured("fsdp", Mesh(2, 1, 1), DENSE, "offload").nodes
    place = {node: i for i, node in enumerate(nodes)}
    busy = [i for i, node in enumerate(nodes) if computes(node)]
    out, back = ([n for n in nodes if n.target is fn] for fn in (to_host, to_device))
    assert len(out) == len(back) >= 5 * LAYERS
    for begun in back:
        [wait] = begun.users
        assert wait.target is arrived and any(place[begun] < i < place[wait] for i in busy)
    # Nothing of a layer stays behind: its backward reads what came back, gradients, weights and what all layers share.
    backwards = [n for n in nodes if isinstance(n.target, Region) and n.target.__name__.endswith("backward")]
    assert len(backwards) == LAYERS
    for region in backwards:
        assert not [n for n in region.all_input_nodes if n in out or "forward" in str(n.args[:1])]


@pytest.mark.parametrize("model", [MODEL, DENSE])
def test_flops_of_the_graph_are_the_models(model, ranks):
    """Counted from every product that the captured step runs, none of them recomputed, and by the formula."""
    ranks(1)
    program = captured("ddp", Mesh(), model)
    assert graph_flops(program.line()) == flops_per_token(model.specs, model.cfg, 12) * 8 * 12

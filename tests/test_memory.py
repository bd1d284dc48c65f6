"""What the step holds, and when: of the captured program, and measured as it runs."""

import weakref

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ftrain import loss, memory, schedule, step
from ftrain.equivalence import RECIPE, random_batch, values
from ftrain.graph import one_graph
from ftrain.job import make_job
from ftrain.mesh import Mesh
from ftrain.model import find_model
from ftrain.plan import find_plan
from ftrain.remat import POLICIES
from ftrain.state import make_state
from ftrain.step import make_train_step

LAYERS, HIDDEN, VOCAB = 6, 24, 509  # the vocabulary is prime: a multiple of it is logits, or a table
MODEL = {
    "model_type": "qwen3", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 40, "head_dim": 6,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    "rope_theta": 1e4, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
ROWS, LENGTH, CHUNK = 4, 10, 7
GATHER, SCATTER = schedule.c10d.all_gather_into_tensor.default, schedule.c10d.reduce_scatter_tensor.default

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_of_two():
    """The first of two ranks; what the other would send is never there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def started(mesh=Mesh(), remat="none", rows=ROWS, length=LENGTH, mode="aot_eager", **changes):
    """-> (step, state, microbatches), nothing run yet."""
    model = find_model(MODEL | changes)
    job = make_job(model, find_plan("fsdp"), mesh, remat=remat)
    state = make_state(model.specs, job.placements, job.device_mesh, lambda n, spec, at: values(n, spec)[at])
    batch = random_batch(model.cfg.vocab, rows, length, 0, packed=False)
    return make_train_step(model, job.sharding, job.ops, RECIPE, mode), state, job.microbatches(batch)


def captured(*args, **how):
    train_step, state, microbatches = started(*args, **how)
    train_step(state, microbatches)
    [found] = train_step.graph.programs
    return found


def measured(*args, **how):
    train_step, state, microbatches = started(*args, **how)
    return memory.measure(train_step, state, microbatches), state


def size(state):
    return sum(p.to_local().nbytes for p in state.params.values())


def alive(found):
    """Of each instruction, the nodes whose values lie in slots as it begins."""
    slots = {i for i in found.inputs}
    for instruction in found.instructions:
        yield instruction, {found.nodes[i] for i in slots}
        slots -= set(instruction.drops)
        slots |= {i for i in instruction.gives if i is not None}


# --- The measure


def test_what_a_known_function_holds():
    """[1000] becomes [50, 1000], the only thing that is allocated until the sum of it."""
    graph = one_graph(lambda params, batch: params.repeat(50, 1).sum() * batch, "aot_eager")
    params, batch = torch.ones(1000), torch.ones(())
    graph(params, batch)
    [found] = graph.programs
    [out], peak = memory.run(found, [params, batch], ["parameters", "batch"])
    assert out == 50_000
    assert peak.by["parameters"] == 4000 and peak.by["batch"] == 4
    assert 200_000 <= peak.by["temporary"] < 201_000
    assert sum(peak.by.values()) == peak.bytes and peak.at.endswith("1 of 1")
    assert peak.most["parameters"] == 4000


def test_categories_of_a_step(one_rank):
    peak, state = measured(remat="full", length=64, num_hidden_layers=2)
    assert set(peak.by) == set(memory.CATEGORIES) and sum(peak.by.values()) == peak.bytes
    assert peak.by["parameters"] == size(state) and peak.by["optimizer"] == 2 * size(state)
    assert peak.by["gathered weights"] == 0  # one rank has all it needs


def test_an_uncompiled_step_has_no_program(one_rank):
    train_step, state, microbatches = started(mode="off")
    with pytest.raises(ValueError, match="compile it, by inductor or aot_eager"):
        memory.measure(train_step, state, microbatches)
    with pytest.raises(ValueError, match="captures no graph: compile it, by inductor or aot_eager"):
        train_step.program(state, microbatches)


def test_roles_are_arguments_of_the_step(one_rank, monkeypatch):
    monkeypatch.setitem(memory.ROLES, "velocity", "optimizer")
    with pytest.raises(ValueError, match="the step has no argument velocity"):
        memory.measure(*started())


# --- What lives how long


def test_nothing_outlives_its_last_use(one_rank):
    """What an instruction is the last to take is its alone: where it lets go of it, it is gone."""
    train_step, state, microbatches = started(remat="full", num_hidden_layers=2)
    train_step(state, microbatches)
    [found] = train_step.graph.programs
    inputs, taken, kept = set(found.inputs), {}, []

    def watching(number, instruction):
        def call(operands):
            dropped = [t for i, t in zip(instruction.takes, operands) if i in instruction.drops and i not in inputs]
            last = [(weakref.ref(t), t.untyped_storage().data_ptr()) for t in dropped]
            result = instruction.call(list(operands))
            operands.clear(), dropped.clear()
            still = {t.untyped_storage().data_ptr() for t in result}  # in place, or a view
            kept.extend((number, instruction.name) for ref, at in last if ref() is not None and at not in still)
            taken[number] = len(last)
            return result

        return instruction._replace(call=call)

    found.instructions = [watching(i, instruction) for i, instruction in enumerate(found.instructions)]
    train_step(state, microbatches)
    assert sum(taken.values()) > 20 and not kept


def of_logits(nodes):
    """The rows of each [rows, VOCAB] among what nodes compute that is no table's size."""
    sizes = [n.meta["val"].numel() for n in nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    return [size // VOCAB for size in sizes if size % VOCAB == 0 and size != VOCAB * HIDDEN]


@pytest.mark.parametrize("chunk, rows", [(CHUNK, CHUNK), (1024, ROWS * LENGTH)])
def test_logits_are_never_whole(one_rank, monkeypatch, chunk, rows):
    """And where a chunk is everything, they are seen."""
    monkeypatch.setattr(loss, "CHUNK", chunk)
    found = captured(num_hidden_layers=1)
    within = [n for module in found.pieces.values() for n in module.graph.nodes]
    assert max(of_logits([*found.nodes, *within])) == rows
    assert max(sum(of_logits(nodes)) for _, nodes in alive(found)) == rows  # one chunk's at a time


def copying_update(*args):
    """An update that keeps what was there before, to choose later."""
    adam, lr, specs, params, grads, mu, nu, step_, norm, apply = args
    before = {name: [of[name].clone() for of in (params, mu, nu)] for name in grads}
    UPDATE(*args)
    for name, old in before.items():
        for of, was in zip((params, mu, nu), old):
            of[name].copy_(torch.where(apply, of[name], was))


UPDATE = step.update_


@pytest.mark.parametrize("update, holds", [(UPDATE, True), (copying_update, False)])
def test_there_is_no_second_copy_of_the_state(one_rank, monkeypatch, update, holds):
    """Parameters, two moments and gradients, and of everything else less than one more of these."""
    monkeypatch.setattr(step, "update_", update)
    train_step, state, microbatches = started(num_hidden_layers=4, hidden_size=96, vocab_size=64, intermediate_size=200)
    kinds = state.params, state.mu, state.nu
    storage = [t.to_local().untyped_storage().data_ptr() for of in kinds for t in of.values()]
    peak = memory.measure(train_step, state, microbatches)
    assert [t.to_local().untyped_storage().data_ptr() for of in kinds for t in of.values()] == storage
    assert (peak.bytes < 5 * size(state)) is holds


def of_layer(starts):
    """What is on its way, or has arrived, for layers: by far the largest of what is gathered here."""
    sizes = {n: n.meta["val"].numel() for n in starts}
    layers = max(sizes.values())
    return {n for n, numel in sizes.items() if numel == layers}


def origin(node):
    """The collective that a value is, or is a view of."""
    while schedule.is_wait(node) or schedule.is_light(node) and len(node.all_input_nodes) == 1:
        [node] = node.all_input_nodes
    return node


def most_gathered(found):
    """-> the most layers whose weights are gathered at once, and of how many gatherings."""
    layers = of_layer([n for n in found.nodes if n.target is GATHER])
    return max(len({origin(n) for n in nodes} & layers) for _, nodes in alive(found)), len(layers)


def everything_at_once(nodes):
    """Gatherings before all else, as a compiler that merges them would have it."""
    first = [n for n in nodes if n.op == "placeholder"]
    for n in nodes:
        chain = schedule._from_parameters(n) if n.target is GATHER else None
        if chain is not None:
            first += [m for m in nodes if m in chain and m not in first] + [n]
    return first + [n for n in nodes if n not in set(first)]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_at_most_two_layers_are_gathered(one_of_two, monkeypatch, remat):
    wide = {"vocab_size": 64}  # tables are smaller than layers
    most, of = most_gathered(captured(Mesh(fsdp=2), remat, **wide))
    assert (most, of) == (2, 2 * LAYERS - 1)  # the last layer's serve its backward too
    monkeypatch.setattr(schedule, "gather_ahead", everything_at_once)
    assert most_gathered(captured(Mesh(fsdp=2), remat, **wide))[0] >= LAYERS


def most_reduced(found):
    """-> the most layers whose whole gradients are there at once: computed, or on their way and not waited for."""
    flying, most, total = set(), 0, 0
    for instruction, _ in alive(found):
        for node in (found.nodes[i] for i in instruction.gives if i is not None):
            if node.target is SCATTER and node.meta["val"].numel() * 2 > HIDDEN * HIDDEN:
                flying.add(node)
                total += 1
                most = max(most, len(flying))
            flying -= {node.args[0]} if schedule.is_wait(node) else set()
    return most, total


def test_whole_gradients_of_at_most_two_layers_are_kept(one_of_two, monkeypatch):
    """A reduction's input is held until it is waited for. And without the rule, all of them are."""
    most, of = most_reduced(captured(Mesh(fsdp=2)))
    assert most <= 2 and of == LAYERS + 2
    monkeypatch.setattr(schedule, "is_region", lambda node: False)
    assert most_reduced(captured(Mesh(fsdp=2)))[0] >= LAYERS


# --- What recomputation is for


def test_recomputing_more_holds_less(one_rank):
    runs = (measured(remat=policy, length=256, vocab_size=64, num_hidden_layers=3)[0] for policy in POLICIES)
    none, selective, full, _ = (peak.bytes for peak in runs)
    assert full < selective < none


def test_full_recomputation_holds_the_inputs_of_layers(one_rank):
    """Of each token: the input of each layer, what the last one returns, and the angles; beside these, numbers. And
    nothing goes with the square of the length, wherever the peak is."""
    layers, lengths = 3, (512, 1024)
    runs = [measured(remat="full", rows=1, length=S, num_hidden_layers=layers)[0] for S in lengths]
    for peak, S in zip(runs, lengths):
        expected = S * 4 * ((layers + 1) * HIDDEN + MODEL["head_dim"])
        assert expected <= peak.most["activations"] <= expected + 64
    short, long = (peak.by["temporary"] for peak in runs)
    assert long < 2.1 * short

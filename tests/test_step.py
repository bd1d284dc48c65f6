"""The train step: one graph, its updates in place, its schedule, its optimizer, its collectives."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from ftrain.equivalence import RECIPE, Run, differences, random_batch, run_mesh, run_plain, run_rank, shrink, values
from ftrain.graph import one_graph
from ftrain.job import make_job
from ftrain.mesh import Mesh
from ftrain.model import find_model
from ftrain.ops import Output
from ftrain.optim import AdamW, Schedule, update_
from ftrain.plan import find_plan
from ftrain.ranks import run_ranks
from ftrain.remat import POLICIES
from ftrain.specs import ParamSpec, ones
from ftrain.state import make_state
from ftrain.step import make_eval_step, make_gradients, make_train_step

SMALL = shrink(find_model("qwen3-moe-tiny").hf)
MODEL = find_model(SMALL)
ONE_LAYER = find_model(SMALL | {"num_hidden_layers": 1})  # where it is compiled, and a layer does


pytestmark = pytest.mark.usefixtures("one_thread")


def batches(n, rows=4, length=10):
    return [random_batch(131, rows, length, seed) for seed in range(n)]


def started(remat="none", mode="off", accumulate=1, model=MODEL):
    """-> (job, state, step) on one rank."""
    job = make_job(model, find_plan("fsdp_sp_ep"), Mesh(), remat=remat)
    state = make_state(model.specs, job.placements, job.device_mesh, lambda n, spec, at: values(n, spec)[at])
    return job, state, make_train_step(model, job.sharding, job.ops, RECIPE, mode, accumulate)


def tensors(state):
    """A copy of everything in the state."""
    kinds = {"params": state.params, "mu": state.mu, "nu": state.nu}
    found = {(kind, n): t.to_local().clone() for kind, of_kind in kinds.items() for n, t in of_kind.items()}
    return {**found, "step": state.step.clone()}


# --- One graph


@pytest.mark.parametrize("remat", POLICIES)
def test_one_graph_and_no_recompilation(one_rank, remat, captures):
    """Twenty steps, the routing another in each; the losses of the same steps without a compiler.

    Of the later ones less exactly: what rounding adds in one step the next ones start from.
    """
    job, state, step = started(remat, "aot_eager")
    _, plain_state, plain_step = started()
    storage = {name: p.to_local().data_ptr() for name, p in state.params.items()}
    routed, so_far = set(), None
    for i, batch in enumerate(batches(20)):
        state, metrics = step(state, job.microbatches(batch), so_far)
        so_far = metrics["finite"]
        plain_state, expected = plain_step(plain_state, job.microbatches(batch))
        for name, value in expected.items():
            torch.testing.assert_close(metrics[name], value, rtol=1e-5 if i < 3 else 1e-3, atol=0, msg=name)
        if i == 2:
            after = tensors(plain_state)
            for key, tensor in tensors(state).items():
                torch.testing.assert_close(tensor, after[key], rtol=1e-4, atol=2e-7)
        routed.add(tuple(metrics["expert_counts"].flatten().tolist()))
    assert len(captures) == 1
    assert len(routed) == 20 and int(state.step) == 20
    assert {name: p.to_local().data_ptr() for name, p in state.params.items()} == storage  # updated in place


def test_microbatches_share_one_graph(one_rank, captures):
    job, state, step = started(mode="aot_eager", model=ONE_LAYER, accumulate=2)
    for batch in batches(3):
        state, _ = step(state, job.microbatches(batch, 2))
    assert len(step.graph.programs) == 1 and len(captures) == 2  # and one that counts what experts get


def test_another_shape_is_another_graph(one_rank, captures):
    job, state, step = started(mode="aot_eager", model=ONE_LAYER)
    for length in (10, 12, 10, 12):
        state, metrics = step(state, job.microbatches(random_batch(131, 4, length, 0)))
        assert metrics["finite"]
    assert len(captures) == 2


def compiled_rank(rank, folder):
    """One of two processes; see below."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    for plan, mesh, how in COMPILED:
        run = run_rank(MODEL, find_plan(plan), mesh, batches(3), mode="aot_eager", **how)
        torch.save(run._asdict(), f"{folder}/{plan}-{rank}.pt")
    dist.destroy_process_group()


COMPILED = [("fsdp_ep", Mesh(1, 1, 2), {}), ("fsdp_sp", Mesh(1, 2, 1), {"remat": "full", "accumulate": 2})]


@pytest.mark.slow
def test_compiled_ranks_are_one_device(tmp_path):
    """Two processes with gloo, the step of each captured and compiled, tokens sent as the routing goes."""
    torch.multiprocessing.spawn(compiled_rank, (str(tmp_path),), nprocs=2)
    expected = run_plain(MODEL, batches(3))
    for plan, *_ in COMPILED:
        runs = [Run(**torch.load(tmp_path / f"{plan}-{rank}.pt")) for rank in range(2)]
        assert not [str(d) for d in differences(runs, expected, MODEL)][:3], plan


# --- Recomputation and accumulation


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(1, 2, 2)])
def test_recomputation_changes_no_bit(mesh):
    """The same operations on the same numbers, only twice."""
    data = batches(1)
    none, *others = (run_mesh(MODEL, find_plan("fsdp_sp_ep"), mesh, data, remat=policy)[0] for policy in POLICIES)
    for other in others:
        for kind in ("gradients", "params"):
            for name, tensor in getattr(none, kind).items():
                assert torch.equal(getattr(other, kind)[name], tensor), name


@pytest.mark.parametrize("remat", POLICIES)
def test_experts_are_chosen_once(one_rank, remat):
    """Compiled in bf16, a recomputed router rounds otherwise: its choice would not be the one that rows were sent by."""
    chosen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            chosen.extend([op] * (op is torch.ops.aten.topk.default))
            return op(*args, **(kwargs or {}))

    job, state, step = started(remat)
    with Watch():
        step(state, job.microbatches(batches(1)[0]))
    assert len(chosen) == MODEL.cfg.layers


@pytest.mark.parametrize("mesh, accumulate", [(Mesh(), 4), (Mesh(2, 1, 1), 4), (Mesh(1, 2, 1), 3)])
def test_accumulation_is_one_large_batch(mesh, accumulate):
    """The loss is a mean over all labels, the balance loss a product of means over all tokens: not means of means."""
    data = batches(2, rows=7)
    runs = run_mesh(MODEL, find_plan("fsdp"), mesh, data, accumulate=accumulate)
    assert not [str(d) for d in differences(runs, run_plain(MODEL, data), MODEL)][:3]


def test_microbatches_without_a_balance_loss(one_rank):
    """What is then shown of the experts is the whole batch's, or is not shown."""
    job, state, _ = started()
    batch, recipe = batches(1)[0], replace(RECIPE, router_aux=0.0)
    expected = make_eval_step(MODEL, job.sharding, job.ops, "off")(state, job.microbatches(batch)[0])
    step = make_train_step(MODEL, job.sharding, job.ops, recipe, "off", accumulate=2)
    _, metrics = step(state, job.microbatches(batch, 2))
    assert torch.equal(metrics["expert_counts"], expected["expert_counts"])
    assert "router_aux_loss" not in metrics


def test_a_dense_model_accumulates():
    """With a coefficient for the router's losses, though it has no router."""
    model = find_model(shrink(find_model("Qwen3-0.6B").hf))
    data = batches(1)
    runs = run_mesh(model, find_plan("ddp"), Mesh(), data, accumulate=2)
    assert not differences(runs, run_plain(model, data), model)


def test_the_number_of_microbatches_is_checked(one_rank):
    job, state, step = started(accumulate=2)
    with pytest.raises(ValueError, match="made for 2 microbatches, but was given 1"):
        step(state, job.microbatches(batches(1)[0]))


# --- What is not finite


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_changes_nothing(one_rank, bad, accumulate):
    job, state, step = started(accumulate=accumulate)
    first, second = (job.microbatches(batch, accumulate) for batch in batches(2))
    state, metrics = step(state, first)
    assert float(metrics["finite"]) == 1
    weight = state.params["model.layers.1.self_attn.v_proj.weight"].to_local()
    kept = float(weight[0, 0])
    weight[0, 0] = bad
    before = tensors(state)
    state, metrics = step(state, second)
    assert float(metrics["finite"]) == 0
    for key, tensor in tensors(state).items():
        assert torch.equal(tensor.nan_to_num(nan=7.0), before[key].nan_to_num(nan=7.0)), key

    # Nor does a step that follows on it, though nothing is wrong there.
    weight[0, 0] = kept
    before = tensors(state)
    state, metrics = step(state, second, metrics["finite"])
    assert float(metrics["finite"]) == 0 and math.isfinite(metrics["loss"])
    for key, tensor in tensors(state).items():
        assert torch.equal(tensor, before[key]), key

    # And it leaves nothing behind: the step after is as if it had not been.
    _, other, clean = started(accumulate=accumulate)
    other, _ = clean(other, first)
    state, metrics = step(state, second)
    other, expected = clean(other, second)
    assert float(metrics["finite"]) == 1 and torch.equal(metrics["loss"], expected["loss"])
    after = tensors(other)
    for key, tensor in tensors(state).items():
        assert torch.equal(tensor, after[key]), key


def test_one_bad_rank_stops_all():
    """The rank that holds no bad number must not go on alone."""

    def rank_main(rank):
        job = make_job(MODEL, find_plan("ddp"), Mesh(2, 1, 1))
        state = make_state(MODEL.specs, job.placements, job.device_mesh, lambda n, spec, at: values(n, spec)[at])
        if rank == 1:
            state.params["model.norm.weight"].to_local()[0] = math.nan
        before = tensors(state)
        step = make_train_step(MODEL, job.sharding, job.ops, RECIPE, "off")
        state, metrics = step(state, job.microbatches(batches(1)[0]))
        after = tensors(state)
        same = all(torch.equal(after[k].nan_to_num(nan=7.0), t.nan_to_num(nan=7.0)) for k, t in before.items())
        return float(metrics["finite"]), same

    assert run_ranks(2, rank_main) == [(0.0, True), (0.0, True)]


# --- Gradients and evaluation, to be looked at


def test_gradients_do_not_touch_the_state(one_rank):
    job, state, _ = started()
    before = tensors(state)
    grads = make_gradients(MODEL, job.sharding, job.ops, RECIPE)(state, job.microbatches(batches(1)[0])[0])
    assert list(grads) == list(state.params)
    assert all(torch.equal(t, before[key]) for key, t in tensors(state).items())


@pytest.mark.parametrize("mode", ["off", "aot_eager"])
def test_evaluation_is_the_loss_of_the_step(one_rank, mode):
    job, state, step = started()
    part = job.microbatches(batches(1)[0])
    found = make_eval_step(MODEL, job.sharding, job.ops, mode)(state, part[0])
    assert int(found["loss_targets"]) == int((part[0]["labels"] != -100).sum())
    _, metrics = step(state, part)
    assert float(found["loss_sum"] / found["loss_targets"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    assert torch.equal(found["expert_counts"], metrics["expert_counts"])


# --- Collectives

# Of one rank and step, on fsdp 2 x sp 2 x ep 2: of the 2 layers and 3 tensors outside them (table, norm, head
# or two where tied), layers are gathered again in the backward, and reduced once.
PINNED = {
    "ddp": {"all_gather": 1, "all_reduce": 7, "all_to_all": 16},
    "fsdp": {"all_gather": 7, "reduce_scatter": 4, "all_reduce": 7, "all_to_all": 16},
    "fsdp_ep": {"all_gather": 11, "reduce_scatter": 6, "all_reduce": 9, "all_to_all": 26},
    "fsdp_sp": {"all_gather": 7, "reduce_scatter": 4, "all_reduce": 7, "all_to_all": 16},
    "fsdp_sp_ep": {"all_gather": 11, "reduce_scatter": 6, "all_reduce": 3, "all_to_all": 26},
}


@pytest.mark.parametrize("plan", PINNED)
def test_collectives_are_pinned(plan):
    runs = run_mesh(MODEL, find_plan(plan), Mesh(2, 2, 2), batches(1))
    assert {kind: count for kind, (count, _) in runs[0].traffic.items()} == PINNED[plan]
    assert all(run.traffic.keys() == runs[0].traffic.keys() for run in runs)


def test_bytes_of_gathering_are_the_model_twice():
    """fsdp 2: each layer whole in the forward and again in the backward, all else once, in fp32, and padding."""
    [run, _] = run_mesh(MODEL, find_plan("fsdp"), Mesh(2, 1, 1), batches(1))
    layers = sum(s.numel for n, s in MODEL.specs.items() if ".layers." in n)
    outside = sum(s.numel for n, s in MODEL.specs.items() if ".layers." not in n)
    padding = MODEL.specs["model.embed_tokens.weight"].shape[1]  # 131 rows are cut in 66 and 65
    assert run.traffic["all_gather"][1] == 4 * (2 * layers + outside + padding)
    assert run.traffic["reduce_scatter"][1] == 4 * (layers + outside + padding)


def test_one_rank_sends_nothing():
    [run] = run_mesh(MODEL, find_plan("fsdp_sp_ep"), Mesh(), batches(1), accumulate=2)
    assert run.traffic == {}


# --- Optimizer and schedule


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("clip", [1e9, 0.7])
def test_adamw_is_torchs(decay, clip):
    """Ten updates of a matrix, of an uneven shard's strided gradient, and of an empty shard."""
    torch.manual_seed(0)
    adam = AdamW(lr=0.01, weight_decay=0.3, clip=clip)
    shapes = {"matrix": (5, 7), "strided": (3, 4, 2), "empty": (0, 4)}
    params = {name: torch.randn(shape) for name, shape in shapes.items()}
    theirs = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer = torch.optim.AdamW(
        theirs.values(), lr=adam.lr, betas=(adam.beta1, adam.beta2), eps=adam.eps,
        weight_decay=adam.weight_decay if decay else 0.0, foreach=False,
    )  # fmt: skip
    mu, nu = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))
    specs = {name: ParamSpec(tuple(p.shape), ones, decay=decay) for name, p in params.items()}
    for i in range(10):
        grads = {name: torch.randn(shape) for name, shape in shapes.items()}
        grads["strided"] = torch.randn(3, 5, 2)[:, :4]
        for name, p in theirs.items():
            p.grad = grads[name].clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
        optimizer.step()
        lr, step, apply = torch.tensor(adam.lr), torch.tensor(i), torch.tensor(True)
        update_(adam, lr, specs, params, grads, mu, nu, step, norm, apply)
    for name, p in theirs.items():
        torch.testing.assert_close(params[name], p.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(mu[name], optimizer.state[p]["exp_avg"], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(nu[name], optimizer.state[p]["exp_avg_sq"], rtol=1e-6, atol=1e-9)


def closed_form(kind, step, steps, warmup, floor, decay):
    warm = min(1.0, (step + 1) / warmup) if warmup else 1.0
    end = max(steps, warmup + 1)
    start = warmup if kind != "wsd" else max(warmup, end - math.ceil(decay * end))
    done = min(1.0, max(0.0, (step - start) / (end - start)))
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}.get(kind, 1 - done)
    return warm * (floor + (1 - floor) * left)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("steps, warmup", [(40, 0), (40, 7), (5, 10), (1, 0)])
def test_schedules(kind, steps, warmup):
    schedule = Schedule(steps, kind, warmup, floor=0.2, decay=0.3)
    for step in range(steps + 3):
        expected = closed_form(kind, step, steps, warmup, 0.2, 0.3)
        assert float(schedule(torch.tensor(step))) == pytest.approx(expected, rel=2e-6), step


def test_schedules_at_their_corners():
    """Numbers that can be read off the definition."""
    kinds = ("cosine", "linear", "wsd", "constant")
    at = {kind: lambda i, kind=kind: float(Schedule(100, kind, 10, 0.1, 0.2)(torch.tensor(i))) for kind in kinds}
    for factor in at.values():
        assert factor(0) == pytest.approx(0.1) and factor(4) == pytest.approx(0.5)  # a tenth, half of the warm-up
        assert factor(10) == pytest.approx(1.0)
    assert all(at[kind](55) == pytest.approx(0.55) for kind in ("cosine", "linear"))  # half way down to a tenth
    assert at["wsd"](80) == pytest.approx(1.0) and at["wsd"](90) == pytest.approx(0.55)
    assert at["constant"](100) == pytest.approx(1.0)
    assert all(at[kind](100) == pytest.approx(0.1) for kind in ("cosine", "linear", "wsd"))
    with pytest.raises(ValueError, match="--schedule cosin: valid schedules are"):
        Schedule(10, "cosin")(torch.tensor(0))


def test_one_gradient_for_two_parameters_is_scaled_once():
    """The terms of a sum have one gradient, and autograd may give one tensor for both."""
    adam = AdamW(lr=0.1, eps=1e-3, weight_decay=0.0, clip=0.5)
    shared = torch.tensor([3.0, 4.0])
    params, mu, nu = ({name: torch.full((2,), start) for name in "ab"} for start in (1.0, 0.0, 0.0))
    norm = torch.tensor(50.0).sqrt()
    update_(
        adam, torch.tensor(0.1), {name: ParamSpec((2,), ones, decay=name == "a") for name in "ab"}, params, {"a": shared, "b": shared}, mu, nu,
        torch.tensor(0), norm, torch.tensor(True),
    )  # fmt: skip
    for name in "ab":
        torch.testing.assert_close(mu[name], 0.1 * torch.tensor([3.0, 4.0]) * 0.5 / norm, rtol=1e-5, atol=0)
    assert torch.equal(params["a"], params["b"])


def test_a_parameter_without_effect_is_named(one_rank):
    spare = {"model.spare.weight": ParamSpec((3,), ones)}
    job, state, step = started(model=replace(MODEL, specs=MODEL.specs | spare))
    with pytest.raises(ValueError, match="the loss does not depend on model.spare.weight, which the model declares"):
        step(state, job.microbatches(batches(1)[0]))


@pytest.mark.slow
def test_gradients_of_a_table_are_the_same_bits_each_time():
    """Many tokens share a row of the embedding: added by several threads as they come, no two runs would agree."""
    torch.manual_seed(0)
    table, ids, weight = torch.randn(7, 64), torch.randint(0, 7, (4096,)), torch.randn(4096, 64)

    def gradient(table, ids, weight):
        leaf = table.detach().requires_grad_()
        return torch.autograd.grad((torch.nn.functional.embedding(ids, leaf) * weight).sum(), [leaf])

    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        compiled = one_graph(gradient, "inductor")
        seen = [compiled(table, ids, weight)[0] for _ in range(20)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(grad, seen[0]) for grad in seen)
    torch.testing.assert_close(seen[0], gradient(table, ids, weight)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["off", "aot_eager"])
def test_a_block_reads_its_own_parameters_only(one_rank, mode):
    job, state, _ = started()

    def forward(p, batch, ops):
        def block(q, x, layer):
            return x * p["model.norm.weight"], None

        x, _ = ops.scan(block, p, "model.layers", MODEL.cfg.layers, torch.ones(1, 2, MODEL.cfg.hidden))
        return Output(losses={"loss": x.sum()})

    model = replace(MODEL, forward=forward)
    grads = make_gradients(model, job.sharding, job.ops, RECIPE, mode)
    with pytest.raises(ValueError, match="model.norm.weight is read within model.layers.0, but a block is given"):
        grads(state, job.microbatches(batches(1)[0])[0])

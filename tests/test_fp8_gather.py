"""Weights gathered as float8: the run of the same recipe that gathers them in bf16, bit for bit, in fewer bytes."""

import json
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from torch.distributed.tensor import Replicate, Shard

from ftrain import graph, precision
from ftrain.collectives import Group
from ftrain.config import TrainConfig, from_json, parse, to_json
from ftrain.equivalence import Run, random_batch, run_mesh, run_rank
from ftrain.groups import regrouped
from ftrain.job import make_job
from ftrain.mesh import Mesh
from ftrain.model import Model, find_model
from ftrain.plan import find_plan
from ftrain.precision import PRECISIONS, linear_for, pack, sent_in_float8, unpack
from ftrain.program import Program
from ftrain.region import Region
from ftrain.specs import ParamSpec, normal

# A dense layer and one with experts. 16 divides every matrix, 3 no dimension but the dense layer's inner one.
CONFIG = {
    "model_type": "qwen3_moe", "vocab_size": 131, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 16, "intermediate_size": 48, "num_experts": 4,
    "num_experts_per_tok": 2, "norm_topk_prob": True, "mlp_only_layers": [0], "tie_word_embeddings": False,
}  # fmt: skip
MODEL = find_model(CONFIG)
DENSE = find_model(CONFIG | {"model_type": "qwen3"})
FLOAT8 = {"precision": "fp8-tensorwise", "fp8_all_gather": True}

pytestmark = pytest.mark.usefixtures("one_thread")


def batches(n=2):
    return [random_batch(131, 5, 11, seed) for seed in range(n)]


def both(model, plan, mesh, **how):
    """The runs of rank 0: gathered in bf16, in float8."""
    plan = find_plan(plan) if isinstance(plan, str) else plan
    return [run_mesh(model, plan, mesh, batches(), **how, **FLOAT8 | {"fp8_all_gather": of})[0] for of in (False, True)]


def unequal(a: Run, b: Run) -> list[str]:
    found = [name for name in a.metrics if a.metrics[name] != b.metrics[name]]
    for kind in ("gradients", "params", "mu", "nu"):
        ours, theirs = getattr(a, kind), getattr(b, kind)
        assert ours.keys() == theirs.keys()
        found += [f"{kind} {name}" for name in ours if not torch.equal(ours[name], theirs[name])]
    return found


# --- The bits


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(st.integers(0, 10**6), st.floats(-9, 9), st.floats(0, 6), st.sampled_from([(16, 16), (32, 48), (48, 16)]))
def test_linear_quantises_to_the_same_bits_and_scale(seed, size, spread, shape):
    """Of weights of any size, outliers among them: what is not the same bit for bit was not the same float8."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = size - spread * torch.rand(shape, generator=generator)
    w = (torch.randn(shape, generator=generator) * 10**magnitude).bfloat16()
    x = torch.randn(7, shape[1], generator=generator).bfloat16()
    bias = torch.randn(5, generator=generator).bfloat16()
    flags = (False, True)
    rows = pack([bias, w.flatten()], flags, Group("", 1, 0))[None]
    back = unpack(rows, [5, w.numel()], flags, torch.bfloat16)
    assert torch.equal(back[0], bias[None])
    found = back[1].reshape(shape)
    assert found.dtype == w.dtype and not torch.equal(found, w)  # else nothing was rounded
    linear = linear_for("fp8-tensorwise")

    def results(w):
        x_, w_ = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = linear(x_, w_)
        return y, *torch.autograd.grad(y.float().square().sum(), (x_, w_))

    for a, b in zip(results(found), results(w)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lengths", [[3], [3, 5], [1, 2, 7]])
@pytest.mark.parametrize("wide", [0, 1, 3])
def test_parts_of_any_length_come_back_in_their_order(lengths, wide):
    """Odd numbers of bytes, none in bf16, zeros."""
    flags = [i >= wide for i in range(wide + len(lengths))]
    parts = [torch.randint(-8, 9, (n,)).bfloat16() for n in [4, 1, 9][:wide] + lengths]
    parts[-1].zero_()
    order = torch.randperm(len(parts)).tolist()
    parts, flags = [parts[i] for i in order], [flags[i] for i in order]
    rows = torch.stack([pack(parts, flags, Group("", 1, 0))] * 2)
    assert rows.dtype == torch.uint8 and rows.shape[1] % 4 == 0
    for part, back in zip(parts, unpack(rows, [len(p) for p in parts], flags, torch.bfloat16)):
        assert torch.allclose(back, part.expand(2, -1), atol=0, rtol=2**-4)


# --- Runs


PLAN = "fsdp_sp_ep"


def mixed(name, shape, mesh):
    """Along other dimensions, some matrices over two of them, some nowhere."""
    if len(shape) == 1 or "k_proj" in name:
        return [Replicate()] * 3
    if "experts" in name:
        return [Shard(2), Replicate(), Shard(0)]
    return [Shard(1), Replicate(), Shard(1 if "q_proj" in name else 0)]


@pytest.mark.parametrize("how", [{}, {"remat": "full", "accumulate": 2}, {"remat": "selective"}])
@pytest.mark.parametrize("plan, mesh", [
    (PLAN, Mesh(2, 1, 1)), (PLAN, Mesh(3, 1, 1)), (PLAN, Mesh(1, 1, 2)), (PLAN, Mesh(2, 1, 2)), (mixed, Mesh(3, 1, 2)),
])  # fmt: skip
def test_a_run_is_the_one_that_gathers_in_bf16(plan, mesh, how):
    if how and mesh.size > 3:
        pytest.skip("how a layer is recomputed has nothing to do with the mesh")
    wide, narrow = both(MODEL, plan, mesh, **how)
    assert not unequal(narrow, wide)
    assert narrow.traffic["all_gather"][1] < wide.traffic["all_gather"][1]


def test_frozen_parameters_too():
    model = replace(MODEL, specs=regrouped(MODEL.specs, ["*.q_proj.weight", "model.layers.0.mlp"], []))
    wide, narrow = both(model, PLAN, Mesh(2, 1, 1))
    assert "model.layers.0.mlp.up_proj.weight" not in narrow.gradients and not unequal(narrow, wide)


def test_one_rank_sends_nothing():
    wide, narrow = both(MODEL, PLAN, Mesh())
    assert narrow.traffic == {} and not unequal(narrow, wide)


def test_bytes():
    """A layer is one all-gather still; each matrix costs a byte an element, and 4 for its maximum, on each rank."""
    wide, narrow = both(DENSE, "fsdp", Mesh(2, 1, 1))
    names = sent_in_float8(DENSE, "fp8-tensorwise")
    assert len(names) == 2 * 7 and not [n for n in names if "norm" in n or "embed" in n or "lm_head" in n]
    elements = sum(DENSE.specs[name].numel for name in names)
    (count, before), (same, after) = wide.traffic["all_gather"], narrow.traffic["all_gather"]
    assert count == same
    # Each layer in the forward and in the backward.
    assert before - after == 2 * (2 * elements - elements - 2 * 4 * len(names))
    assert narrow.traffic["reduce_scatter"] == wide.traffic["reduce_scatter"]
    # One more all-reduce for each layer; without a compiler the backward has its result kept.
    (count, before), (more, after) = wide.traffic["all_reduce"], narrow.traffic["all_reduce"]
    assert more - count == 2 and after - before == 4 * len(names)


def of_one_rank(x, group, op="sum"):
    return x if op == "max" else REDUCE(x, group, op)


REDUCE, E4M3 = precision.all_reduce, precision._e4m3


FAULTS = {
    "not agreed on": ("all_reduce", of_one_rank),
    "of another matrix": ("_e4m3", lambda amax: E4M3(amax.roll(1))),
    "too large": ("_e4m3", lambda amax: E4M3(amax * 0.5)),
    "too small": ("_e4m3", lambda amax: E4M3(amax * 1.01)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_scales_are_noticed(fault, monkeypatch):
    def run(of):
        return run_mesh(DENSE, find_plan("fsdp"), Mesh(2, 1, 1), batches(1), **FLOAT8 | {"fp8_all_gather": of})[0]

    wide = run(False)
    monkeypatch.setattr(precision, *FAULTS[fault])
    assert "gradients model.layers.0.self_attn.q_proj.weight" in unequal(run(True), wide)


# --- Captured


def behind_a_layer(nodes, start):
    """Whether a layer runs between a collective's start and its wait."""
    [wait] = start.users
    return any(isinstance(n.target, Region) for n in nodes[nodes.index(start) : nodes.index(wait)])


def captured_rank(rank, folder):
    torch.set_num_threads(1)
    programs = []
    graph.Program = lambda *args: programs.append(Program(*args)) or programs[-1]
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    found = {}
    for family, model, plan, mesh in CAPTURED:
        plan, data = find_plan(plan), batches(1)
        runs = [run_rank(model, plan, mesh, data, mode=mode, **FLOAT8) for mode in ("off", "aot_eager")]
        nodes = programs[-1].nodes  # of the step
        gathers = [n for n in nodes if n.target is c10d.all_gather_into_tensor.default]
        gathers = [n for n in gathers if n.meta["val"].dtype == torch.uint8]
        agreements = [n for n in nodes if n.target is c10d.all_reduce.default and n.args[1] == "max"]
        hidden = [[behind_a_layer(nodes, n) for n in starts] for starts in (agreements, gathers)]
        found[family] = hidden, [run._asdict() for run in runs]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


c10d = torch.ops._c10d_functional
CAPTURED = [
    ("qwen3", find_model(DENSE.hf | {"num_hidden_layers": 3}), "fsdp", Mesh(2, 1, 1)),
    ("qwen3_moe", find_model(CONFIG | {"num_hidden_layers": 1, "mlp_only_layers": []}), "fsdp_ep", Mesh(1, 1, 2)),
]


@pytest.mark.slow
def test_captured_is_eager(tmp_path):
    """Two processes with gloo; a layer is gathered by the graph around it, and its weights scaled back inside."""
    torch.multiprocessing.spawn(captured_rank, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for family, (_, runs) in found.items():
            eager, captured = (Run(**run) for run in runs)
            assert not unequal(captured, eager), family
        # Three layers forward, two backward: the last one's are at hand. The first have nothing to hide behind.
        assert found["qwen3"][0] == [[False, False, True, True, True], [False, True, True, True, True]]


# --- Which weights, and errors


def test_only_what_linear_alone_reads():
    """A weight that is read otherwise too must be whole: tied, transposed, an expert's."""
    shapes = {"tied": (128, 32), "odd": (32, 40), "both": (4, 32, 32)}
    shapes |= dict.fromkeys(("a", "turned", "cast"), (32, 32))
    specs = {name: ParamSpec(shape, normal(0.02)) for name, shape in shapes.items()}

    def forward(p, batch, ops):
        x = F.embedding(batch["input_ids"], p["tied"])
        for name in ("a", "turned", "cast", "tied"):
            x = ops.linear(x, p[name])[..., :32]
        ops.linear(x, p["both"][0]), ops.linear(ops.linear(x, p["odd"].mT), p["odd"])
        return x @ p["turned"] + p["cast"].float().sum()

    assert sent_in_float8(Model("toy", {}, None, specs, forward), "fp8-tensorwise") == {"a"}


def test_an_unembedding_is_not_sent_though_linear_reads_it():
    def forward(p, batch, ops):
        out = MODEL.forward(p, batch, ops)
        return out._replace(hidden=out.hidden + ops.linear(out.hidden, p["lm_head.weight"])[..., :32])

    wider = find_model(CONFIG | {"vocab_size": 128})
    assert "lm_head.weight" not in sent_in_float8(replace(wider, forward=forward), "fp8-tensorwise")


@pytest.mark.parametrize("other", sorted(set(PRECISIONS) - {"fp8-tensorwise"}))
def test_other_precisions_are_refused(other, one_rank):
    why = ": it scales a weight by rows and by columns, .*" if other.startswith("fp8") else ""
    with pytest.raises(ValueError, match=rf"^--fp8-all-gather .* --precision {other}{why}; valid is fp8-tensorwise$"):
        make_job(MODEL, find_plan(PLAN), Mesh(), **FLOAT8 | {"precision": other})


def test_the_flag():
    assert not parse([]).fp8_all_gather and parse(["--fp8-all-gather"]).fp8_all_gather
    for on in (False, True):
        cfg = TrainConfig(fp8_all_gather=on)
        assert from_json(to_json(cfg)) == cfg
    for key, value in {"fp8_all_gather": "maybe", "steps": True}.items():
        with pytest.raises(SystemExit):
            from_json(json.dumps({key: value}))

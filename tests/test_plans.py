"""Every plan on every model, and plans that nobody would write: always the training run of one device."""

import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.distributed.tensor import Partial, Replicate, Shard
from twins import first_preset

from ftrain import check
from ftrain.equivalence import (
    deviations, differences, mixed_batch, random_batch, random_batches, run_mesh, run_plain, small_model,
)  # fmt: skip
from ftrain.mesh import AXES, Mesh
from ftrain.model import families, find_model
from ftrain.parallel import kv_repeats
from ftrain.plan import ask, find_plan, plan_names

MULTIMODAL = [family for family, module in families().items() if hasattr(module, "examples")]
PAIRS = [(plan, family) for plan in plan_names() for family in families()]


pytestmark = pytest.mark.usefixtures("one_thread")


def small(family="qwen3_moe", **other):
    """The small model that a family is trained as; `other` fields of a config of text alone."""
    model = small_model(find_model(first_preset(family)))
    return find_model(model.hf | other) if other else model


def batches(n=1, rows=5, length=11, **other):
    return [random_batch(131, rows, length, seed, **other) for seed in range(n)]


def held(model, plan, mesh, data, **how):
    """The runs of the mesh, which must be the plain run; -> the largest deviation."""
    plan = find_plan(plan) if isinstance(plan, str) else plan
    expected, runs = run_plain(model, data), run_mesh(model, plan, mesh, data, **how)
    assert not [str(d) for d in differences(runs, expected, model)][:3]
    return max(d.error for d in deviations(runs, expected, model))


# --- By discovery


@pytest.mark.parametrize("plan, family", PAIRS)
def test_every_plan_on_every_model_by_arithmetic(plan, family):
    text = {} if find_model(first_preset(family)).examples else {"num_hidden_layers": 3}
    model, plan = find_model(first_preset(family) | text), find_plan(plan)
    for invariant in (check.total, check.well_formed, check.pure):
        invariant(plan, model)


@pytest.mark.parametrize("plan, family", PAIRS)
def test_every_plan_trains_every_model_as_one_device_does(plan, family):
    model = small(family)
    held(model, plan, Mesh(2, 2, 2), random_batches(model, 1))


@pytest.mark.parametrize("family", MULTIMODAL)
@pytest.mark.parametrize("mesh, how", [(Mesh(1, 2, 1), {}), (Mesh(3, 1, 1), {"accumulate": 2}), (Mesh(1, 1, 2), {"replica": 2})])
def test_each_kind_of_sample_alone_and_mixed(family, mesh, how):
    """Text alone, an image on one rank only, ...: ranks without items take part, and nothing is lost or counted twice."""
    model = small(family)
    kinds = range(len(model.examples(torch.Generator().manual_seed(0))))
    data = [mixed_batch(model, 3, seed=kind, kinds=[kind]) for kind in kinds] + [mixed_batch(model, 4, 9, list(kinds))]
    for batch in data:
        held(model, "fsdp_sp_ep", mesh, [batch], **how)


@pytest.mark.parametrize("plan", plan_names())
def test_uneven_and_replicated_meshes(plan):
    held(small(), plan, Mesh(3, 1, 1), batches(2))
    held(small(), plan, Mesh(1, 1, 2), batches(2), replica=2)


# --- Plans that nobody would write


@st.composite
def plans(draw, model, mesh):
    """Any placements for any parameter, layers alike; experts on `ep` all together or not at all."""
    kind_of = {}
    # Along dimension 0 of experts, where tokens are sent: the same for all three, so that they meet.
    sent = draw(st.booleans())
    cut_experts = draw(st.sets(st.sampled_from(["fsdp", "sp"]))) if sent else set()
    for name, spec in model.specs.items():
        key = re.sub(r"\.\d+\.", ".*.", name)
        if key in kind_of:
            continue
        if spec.experts and sent:
            inner = [Replicate(), Shard(1), Shard(2)]
            kind_of[key] = [Shard(0) if a in cut_experts else draw(st.sampled_from(inner)) for a in ("fsdp", "sp")]
            kind_of[key].append(Shard(0))
        else:
            dims = range(-1, len(spec.shape))
            kinds = [Replicate(), *(Shard(d) for d in dims)]
            kind_of[key] = [draw(st.sampled_from(kinds)) for _ in AXES]
            if spec.experts and kind_of[key][2] == Shard(0):
                kind_of[key][2] = Shard(1)
    return lambda name, shape, mesh: kind_of[re.sub(r"\.\d+\.", ".*.", name)]


SIZES = [
    (mesh, replica) for mesh in check.meshes(8) for replica in (1, 2)
    if 1 < mesh.size * replica <= 8 and mesh.sp in (1, 2, 4) and mesh.ep in (1, 2, 4)
]  # fmt: skip


@settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_plan_is_one_device(data):
    mesh, replica = data.draw(st.sampled_from(SIZES), "mesh, replica")
    other = dict(
        num_key_value_heads=data.draw(st.sampled_from([1, 2, 4]), "kv heads"),
        tie_word_embeddings=data.draw(st.booleans(), "tied"),
        mlp_only_layers=data.draw(st.sampled_from([[], [0]]), "dense layers"),
        num_experts=mesh.size if mesh.size in (4, 8) else 12,  # divisible however its experts are cut
        hidden_size=data.draw(st.sampled_from([10, 24]), "hidden"),
    )
    model = small(**other)
    plan = data.draw(plans(model, mesh), "plan")
    rows, length = data.draw(st.integers(1, 9), "rows"), data.draw(st.integers(3, 14), "length")
    how = dict(
        remat=data.draw(st.sampled_from(["none", "selective", "full"]), "remat"),
        accumulate=data.draw(st.sampled_from([1, 1, 2, 3]), "accumulate"),
    )
    packed = data.draw(st.booleans(), "packed")
    if 12 % mesh.size and mesh.size not in (4, 8):  # 5 or 7 ranks
        plan = find_plan("fsdp")
    held(model, plan, mesh, batches(1, rows, length, packed=packed), replica=replica, **how)


# --- Corners


@pytest.mark.parametrize("heads, kv_heads, sp", [(4, 1, 4), (8, 2, 4), (8, 2, 8), (8, 1, 8), (6, 3, 2), (12, 3, 4)])
def test_key_value_heads_are_repeated_as_needed(heads, kv_heads, sp):
    model = small("qwen3", num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=1)
    held(model, "fsdp_sp", Mesh(1, sp, 1), batches(1, rows=2))
    repeats = kv_repeats(heads, kv_heads, sp)
    assert kv_heads * repeats % sp == 0 and heads % (kv_heads * repeats) == 0
    assert not any(kv_heads * fewer % sp == 0 and heads % (kv_heads * fewer) == 0 for fewer in range(1, repeats))


def test_heads_that_sp_does_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"4 attention heads are not divisible by sp 3: .*\[1, 2, 4\]"):
        run_mesh(small(), find_plan("fsdp"), Mesh(1, 3, 1), batches())


def test_experts_that_ep_does_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"4 experts are not divisible by ep 3 \(.*experts.*\[1, 2, 4\]"):
        run_mesh(small(), find_plan("fsdp_ep"), Mesh(1, 1, 3), batches())


def test_experts_in_different_places_are_refused():
    def plan(name, shape, mesh):
        return [Replicate(), Replicate(), Shard(0) if "experts.up_proj" in name else Replicate()]

    with pytest.raises(ValueError, match="places experts differently .*gate_proj.* and .*up_proj"):
        run_mesh(small(), plan, Mesh(1, 1, 2), batches())


@pytest.mark.parametrize("mesh", [Mesh(8, 1, 1), Mesh(1, 1, 4), Mesh(2, 4, 1)])
def test_ranks_with_nothing_but_padding(mesh):
    """One row of five tokens: most ranks have none."""
    held(small(), "fsdp_sp_ep", mesh, batches(2, rows=1, length=5))


def test_a_batch_without_labels_on_some_rows():
    data = batches(2, rows=4)
    for batch in data:
        batch["labels"][:2] = -100
    held(small(), "fsdp_sp_ep", Mesh(2, 1, 2), data)


@pytest.mark.parametrize("mesh", [Mesh(1, 1, 4), Mesh(1, 2, 2)])
def test_all_tokens_to_one_expert(mesh, monkeypatch):
    """Other ep ranks then compute on no rows at all."""
    from ftrain.models import moe

    route = moe.route

    def to_the_last(x, gate, top_k, normalise):
        weight, index, prob, logits = route(x, gate, top_k, normalise)
        last = torch.full_like(index, gate.shape[0] - 1)
        return prob.gather(1, last), last, prob, logits

    monkeypatch.setattr(moe, "route", to_the_last)
    held(small(num_experts_per_tok=1), "fsdp_sp_ep", mesh, batches(1))


def test_rotary_embeddings_that_know_the_longest_position():
    """Only one row reaches beyond the model's length: ranks without it must turn by the same angles."""
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    model = small("llama", max_position_embeddings=6, rope_scaling=scaling)
    [batch] = batches(1, rows=4, length=12)
    batch["position_ids"][1:] %= 4
    batch["position_ids"][0] = torch.arange(12)
    held(model, "fsdp_sp", Mesh(2, 2, 1), [batch])
    held(model, "fsdp_sp", Mesh(1, 2, 1), [batch], accumulate=2)


def test_experts_cut_by_two_dimensions_alternate():
    def plan(name, shape, mesh):
        return [Shard(0), Replicate(), Shard(0)]

    held(small(num_experts=8), plan, Mesh(2, 1, 2), batches(1))
    held(small(num_experts=8), plan, Mesh(2, 1, 2), batches(1), replica=2)


# --- The command



BAD = {
    "crashes": (lambda name, mesh: 1 // 0, "1  total", "ZeroDivisionError"),
    "nothing": (lambda name, mesh: None, "1  total", "None for model.embed_tokens.weight"),
    "too few": (lambda name, mesh: [Shard(0)] * 2, "1  total", "it must return 3 placements"),
    "partial": (lambda name, mesh: [Partial()] * 3, "1  total", r"Partial\(sum\)"),
    "text": (lambda name, mesh: ["Shard(0)", Replicate(), Replicate()], "1  total", "a placement is"),
    "out of range": (lambda name, mesh: [Shard(1)] + [Replicate()] * 2, "1  total", r"q_norm.*shape \(32,\)"),
    "unknown name": (
        lambda name, mesh: [Replicate()] * 3 if name.startswith(("model.", "lm_head")) else None, "1  total", "no.such",
    ),
    "experts apart": (
        lambda name, mesh: [Replicate()] * 2 + [Shard(0) if "up_proj" in name else Replicate()],
        "2  well-formed", "ep 2: .*differently",
    ),
    "by layer": (
        lambda name, mesh: [Shard(0) if ".3." in name else Replicate()] + [Replicate()] * 2,
        "3  pure", r"layers\.3\.self_attn.*as of model\.layers\.0\.self_attn",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", BAD)
def test_check_finds_the_smallest_counterexample(why, monkeypatch, capsys):
    answer, where, what = BAD[why]
    monkeypatch.setattr(check, "find_plan", lambda which: lambda name, shape, mesh: answer(name, mesh))
    assert check.check("mine", "qwen3-moe-tiny") is False
    lines = capsys.readouterr().out.splitlines()
    [failed] = [line for line in lines if "FAILS" in line]
    assert failed.startswith(where) and re.search(what, failed)
    assert lines[-1] == "the plan mine does not hold"


def test_check_sees_an_impure_plan(monkeypatch, capsys):
    asked = []

    def plan(name, shape, mesh):
        asked.append(name)
        return [Shard(0) if len(asked) > 20_000 and len(shape) > 2 else Replicate()] + [Replicate()] * 2

    monkeypatch.setattr(check, "find_plan", lambda which: plan)
    assert check.check("mine", "qwen3-moe-tiny") is False
    assert re.search("3  pure +FAILS .* again, found", capsys.readouterr().out)


def test_check_sees_pieces_that_do_not_tile(monkeypatch):
    exact = check.shard_slices

    def off_by_one(shape, placements, sizes, at):
        return tuple(slice(s.start + (s.start > 0), s.stop) for s in exact(shape, placements, sizes, at))

    monkeypatch.setattr(check, "shard_slices", off_by_one)
    with pytest.raises(check.Broken, match="fsdp 2: model.embed_tokens.weight .*expected a piece .* start at 2048"):
        check.well_formed(find_plan("fsdp"), find_model("qwen3-moe-tiny"))


def test_check_reports_an_error_inside_a_run(monkeypatch, capsys):
    def explode(*args):
        raise RuntimeError("a fault in a run")

    monkeypatch.setattr("ftrain.parallel.all_gather", explode)
    assert check.check("fsdp", "SmolLM2-135M") is False
    assert "FAILS  fsdp 2: RuntimeError: a fault in a run" in capsys.readouterr().out


@pytest.mark.slow
def test_check_holds(capsys):
    assert check.check("fsdp_sp_ep", "qwen3-moe-tiny") is True
    out = capsys.readouterr().out
    assert out.count(" holds ") == 9 and "FAILS" not in out


def test_a_plan_is_asked_about_whole_shapes():
    seen = {}
    ask(lambda name, shape, mesh: seen.setdefault(name, shape) and [Replicate()] * 3, small().specs, Mesh(2, 1, 1))
    assert seen == {name: spec.shape for name, spec in small().specs.items()}

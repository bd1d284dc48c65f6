"""What `plan` foresees, beside what the step is seen to do."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ftrain import config
from ftrain.__main__ import main as command_line
from ftrain.config import MeshConfig
from ftrain.equivalence import random_batch
from ftrain.flops import graph_flops
from ftrain.forecast import Work, a_batch, pretended, trace
from ftrain.graph import one_graph
from ftrain.job import make_job
from ftrain.memory import measure
from ftrain.mesh import Mesh
from ftrain.model import find_model
from ftrain.plan import find_plan
from ftrain.planning import Asked, PlanConfig, as_json, asked, forecast
from ftrain.program import DECOMPOSED
from ftrain.roofline import find_hardware, predict
from ftrain.search import candidates, command, estimate, explore, lines, of_depth
from ftrain.state import init_state
from ftrain.step import Recipe, make_train_step

pytestmark = pytest.mark.usefixtures("one_thread")
TOOL = Path(__file__).parents[1] / "tools" / "forecast_accuracy.py"
MODEL = "qwen3-moe-tiny"
H100 = find_hardware("h100-80gb")


def foreseen(**flags):
    cfg = PlanConfig(MODEL, seq_len=64, batch_size=8, mesh=MeshConfig(2, 1, 2), remat="full", **flags)
    return forecast(cfg, Asked(find_model(MODEL), find_plan(cfg.plan), H100))


@pytest.mark.parametrize(
    "remat, mode",
    [
        ("none", "aot_eager"), ("selective", "aot_eager"), ("full", "aot_eager"), ("offload", "aot_eager"),
        pytest.param("full", "inductor", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_memory_is_what_is_measured(remat, mode, one_rank):
    """To a hundredth, operator by operator and compiled; what the allocator rounds is the rest."""
    model = find_model(dict(find_model(MODEL).hf, num_hidden_layers=2))
    job = make_job(model, find_plan("fsdp_sp_ep"), Mesh(), remat=remat)
    batch = random_batch(model.cfg.vocab, 2, 128, seed=0, packed=False)
    batch["segment_ids"] = batch["segment_ids"] * 0
    state = init_state(model.specs, job.placements, job.device_mesh, 0)
    seen = measure(make_train_step(model, job.sharding, job.ops, Recipe(), mode), state, job.microbatches(batch))
    dist.destroy_process_group()
    as_run = {"aot_eager": "aot_eager", "inductor": DECOMPOSED}[mode]
    traced = trace(model, find_plan("fsdp_sp_ep"), Mesh(), Work(2, 128, "fp32", remat), mode=as_run)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # the fixture ends it
    peak = traced.timeline(on_a_cpu=True, fuse=mode == "inductor").peak()
    assert peak.bytes == pytest.approx(seen.bytes, rel=0.01)
    assert peak.at == seen.at
    for kind in ("parameters", "optimizer", "gradients", "activations"):
        assert peak.by[kind] == pytest.approx(seen.by[kind], rel=0.01), kind


@pytest.mark.parametrize("model", ["qwen2-vl-tiny", "qwen3-omni-moe-tiny"])
def test_memory_with_images_and_sounds_is_what_is_measured(model, one_rank):
    """Of the batch that a forecast assumes, taken by a real step."""
    model, work = find_model(model), Work(2, 512, "fp32", "full")
    job = make_job(model, find_plan("fsdp_sp_ep"), Mesh(), remat="full")
    state = init_state(model.specs, job.placements, job.device_mesh, 0)
    step = make_train_step(model, job.sharding, job.ops, Recipe(), "aot_eager")
    seen = measure(step, state, job.microbatches(a_batch(model, 2, work)))
    dist.destroy_process_group()
    peak = trace(model, find_plan("fsdp_sp_ep"), Mesh(), work, mode="aot_eager").timeline(on_a_cpu=True, fuse=False).peak()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # the fixture ends it
    assert peak.bytes == pytest.approx(seen.bytes, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("case", [2, 3])
def test_two_ranks_do_what_was_foreseen(case, tmp_path):
    found = []
    for how in (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], []):
        out = tmp_path / f"{len(found)}.json"
        more = [] if how else ["--foresee"]
        subprocess.run([sys.executable, *how, TOOL, "--case", str(case), "--out", out, *more], check=True)
        found.append(json.loads(out.read_text()))
    real, seen = found
    assert seen["sent"] == real["sent"] and real["sent"]
    assert seen["flops"] == real["flops"] > 0
    assert seen["peak"] == pytest.approx(real["peak"], rel=0.05)


def test_what_is_printed_says_all():
    found = foreseen()
    said = as_json(found, H100)
    asked = "world_size fits peak_bytes categories collectives flops_per_rank step_time_s tokens_per_s_per_rank mfu"
    assert {*asked.split(), "bottleneck"} <= said.keys() and json.loads(json.dumps(said))
    assert said["world_size"] == 4 and said["fits"] and sum(said["categories"].values()) == said["peak_bytes"]
    assert {"ep", "fsdp", "fsdp+ep"} <= said["collectives"].keys()
    assert 0 < said["mfu"] < 1 and 0 < said["step_time_s"]


def test_busier_experts_hold_and_take_more():
    calm, busy = foreseen(), foreseen(expert_imbalance=2.0)
    assert busy.peak.bytes > calm.peak.bytes and busy.flops > calm.flops and busy.times.step > calm.times.step


def test_slower_links_make_a_step_wait():
    found = foreseen()
    with pretended(1):
        pass  # may be asked for again
    slow = replace(H100, link=H100.link / 1e3, network=H100.network / 1e3)
    traced = trace(find_model(MODEL), find_plan("fsdp_sp_ep"), Mesh(2, 1, 2), Work(8, 64, remat="full"))
    waits = predict(traced, traced.timeline().pieces, slow)
    assert waits.step > found.times.step and sum(waits.exposed.values()) > sum(found.times.exposed.values())
    assert waits.busy == pytest.approx(found.times.busy)


def test_what_is_kept_of_an_exchange_is_there():
    """Under selective recomputation a backward waits once more for what the forward had sent."""
    traced = trace(find_model(MODEL), find_plan("fsdp_sp_ep"), Mesh(1, 2, 2), Work(8, 64, remat="selective"))
    times = predict(traced, traced.timeline().pieces, H100)
    assert {"sp", "ep"} <= times.sent.keys() and times.step >= sum(times.busy.values())


def test_recomputation_costs_and_saves():
    model, plan = find_model(MODEL), find_plan("fsdp_sp_ep")
    none, full = (trace(model, plan, Mesh(2, 1, 1), Work(8, 512, remat=remat)) for remat in ("none", "full"))
    assert full.flops() > none.flops()
    assert full.timeline().peak().bytes < none.timeline().peak().bytes


@pytest.mark.parametrize("mesh, replica", [(Mesh(2, 2, 8), 32), (Mesh(128, 2, 8), 1)])
def test_groups_of_thousands_of_ranks(mesh, replica):
    """Copies, and tensors that do not divide by the ranks that cut them."""
    world = mesh.size * replica
    found = trace(find_model(MODEL), find_plan("fsdp_sp_ep"), mesh, Work(world // 2, 64), replica=replica)
    assert {len(span.ranks) for span in found.groups.values()} >= {mesh.sp, mesh.ep, world}
    assert all(found.groups[c.group].axes for c in found.program.collectives())


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--hardware tpu", "--hardware tpu: known are a100-80gb, h100-80gb"),
        ("--mesh.fsdp 2 --mesh.sp 3", "8 attention heads are not divisible by sp 3|heads are not divisible by sp 3"),
        ("--mesh.fsdp 1 --mesh.ep 3", "experts"),
        ("--world-size 6 --mesh.fsdp 4", "mesh fsdp 4 x sp 1 x ep 1 = 4 ranks, but the world size is 6"),
        ("--mesh.sp 2", "--world-size"),
        ("--seq-len 0 --mesh.fsdp 1", "--seq-len 0: must be at least 1"),
        ("--expert-imbalance 0 --mesh.fsdp 1", "--expert-imbalance 0"),
        ("--plan fsdb --mesh.fsdp 1", "fsdb"),
        ("--media 2 --mesh.fsdp 1", "--media 2.0: must be a part of a row"),
        ("--model qwen2-vl-tiny --mesh.fsdp 1 --seq-len 8", "a row has 8: give a larger --seq-len"),
    ],
)
def test_bad_flags_are_named(flags, message, capsys, monkeypatch):
    monkeypatch.setattr("ftrain.forecast.make_train_step", None)  # nothing is traced
    assert command_line(["plan", *f"--model {MODEL} {flags}".split()]) != 0
    assert re.search(message, capsys.readouterr().err)


def test_hardware_of_ones_own(tmp_path):
    mine = tmp_path / "mine.json"
    known = {key: value for key, value in vars(H100).items() if key != "name"}
    mine.write_text(json.dumps(known | {"memory": 1e6}))
    assert find_hardware(str(mine)).memory == 1e6
    assert not foreseen().fits(find_hardware(str(mine)))
    mine.write_text(json.dumps({"memory": 1e6}))
    with pytest.raises(ValueError, match="must have the fields attention, bandwidth"):
        find_hardware(str(mine))


def test_search_runs_what_it_finds():
    tried = list(candidates(PlanConfig(MODEL), 4, experts=True))
    assert {one.mesh.sp for one in candidates(PlanConfig(MODEL, batch_size=2), 4, experts=False)} == {2, 4}
    assert all(one.mesh.ep == 1 for one in candidates(PlanConfig(MODEL), 4, experts=False))
    assert len({one.mesh for one in tried}) == len(tried) == 6
    found = foreseen()
    flags = command(found).split()[3:]
    cfg = config.parse(flags)
    assert (cfg.mesh.fsdp, cfg.mesh.ep, cfg.remat, cfg.batch_size) == (2, 2, "full", 8)


@pytest.mark.slow
def test_search_finds_the_fastest_that_fits(tmp_path):
    """In processes of its own; what does not fit, or is refused, is said."""
    hf = dict(find_model(MODEL).hf, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    cfg = PlanConfig(str(tmp_path), seq_len=512, batch_size=8, world_size=4)
    meshes = [one for one in candidates(cfg, 4, experts=False) if one.mesh.fsdp != 2]
    peak = forecast(replace(meshes[0], remat="none"), asked(cfg)).peak.bytes
    machine = {k: v for k, v in asdict(H100).items() if k != "name"} | {"memory": peak - 1}
    (tmp_path / "small.json").write_text(json.dumps(machine))
    said = []
    found, tried = explore([replace(c, hardware=str(tmp_path / "small.json")) for c in meshes], said.append)
    assert [one.cfg.mesh.fsdp for one in found] == [4] and found[0].cfg.remat in ("selective", "full")
    assert found[0].full["fits"] and found[0].full["peak_bytes"] < peak
    shown = "\n".join(lines(found, tried, asked(cfg)))
    assert found[0].full["command"] in shown and "remat none" in shown and "too much" in shown
    assert "2 attention heads are not divisible by sp 4" in shown and len(said) == len(meshes) + len(found)


def test_shallow_models_stand_for_deep_ones():
    """The line through two of them is where the deep one is, in all that repeats."""
    deep = find_model(dict(find_model(MODEL).hf, num_hidden_layers=12))
    cfg = PlanConfig(MODEL, seq_len=256, batch_size=8, mesh=MeshConfig(2, 1, 2), remat="selective")
    of = Asked(deep, find_plan(cfg.plan), H100)
    full, seen = forecast(cfg, of), estimate(cfg, of)
    assert seen.peak == pytest.approx(full.peak.bytes, rel=1e-3) and seen.peak <= full.peak.bytes * (1 + 1e-9)
    assert seen.speed == pytest.approx(full.tokens_per_s, rel=1e-2)
    assert of_depth(deep, 3).specs.keys() < deep.specs.keys()


def test_layers_that_are_not_alike_are_not_extended():
    kinds = ["full_attention"] * 8 + ["sliding_attention"] * 8
    hf = dict(find_model("Qwen2-7B").hf, num_hidden_layers=16, layer_types=kinds, use_sliding_window=True)
    assert of_depth(find_model(dict(hf, sliding_window=8)), 3) is None
    assert of_depth(find_model(dict(find_model(MODEL).hf, num_hidden_layers=8, mlp_only_layers=[7])), 3) is None


@pytest.mark.parametrize("model", ["qwen2-vl-tiny", "qwen3-omni-moe-tiny"])
def test_models_that_take_more_than_text(model):
    cfg = PlanConfig(model, seq_len=1024, batch_size=4, mesh=MeshConfig(2, 2, 1))
    of = Asked(find_model(model), find_plan(cfg.plan), H100)
    half, little = forecast(cfg, of), forecast(replace(cfg, media=0.1), of)
    assert half.flops > little.flops and half.peak.bytes > little.peak.bytes
    assert half.mfu is None and "fsdp+sp" in half.collectives  # items go to any rank
    assert "all_to_all_single" in half.collectives["fsdp+sp"]


def test_what_waits_on_the_host_is_not_on_the_device():
    def of(remat, on_a_cpu=False):
        traced = trace(find_model(MODEL), find_plan("fsdp_sp_ep"), Mesh(2, 1, 1), Work(8, 512, remat=remat))
        return traced.timeline(on_a_cpu).peak(), predict(traced, traced.timeline().pieces, H100)

    (kept, _), (away, times), (on_cpu, _) = of("selective"), of("offload"), of("offload", on_a_cpu=True)
    assert away.most["activations"] < kept.most["activations"] < on_cpu.most["activations"] * 1.5
    assert away.bytes < kept.bytes and times.sent["host"] > 0


@pytest.mark.slow
def test_peaks_beside_the_papers(capsys):
    """Each row that VeOmni's paper measured: ftrain needs no more memory, and where one of theirs does not fit, a mesh
    for the same tokens does."""
    command = [sys.executable, TOOL.with_name("forecast_paper.py"), "--shallow"]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    with capsys.disabled():
        print(f"\n{table}")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert len(rows) == 20
    for model, tokens, _, theirs, _, ours, _, _, speed, _ in rows:
        if theirs == "OOM":
            assert min(float(row[5]) for row in rows if row[:2] == [model, tokens]) < 80.0
        else:
            assert float(ours) <= float(theirs) and float(speed) > 0


def test_flops_are_the_programs(one_rank):
    with_step = one_graph(lambda x, w: (x @ w).sum(), "aot_eager")
    assert graph_flops(with_step.program(torch.ones(3, 4), torch.ones(4, 5)).line()) == 2 * 3 * 4 * 5

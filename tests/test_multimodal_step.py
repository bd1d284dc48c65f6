"""The train step of models that take more than text: few graphs, frozen parts, low precision, checkpoints."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from ftrain.checkpoint import restore, save
from ftrain.data import collate
from ftrain.equivalence import RECIPE, mixed_batch, run_mesh, run_plain, values
from ftrain.items import bucket
from ftrain.job import make_job
from ftrain.mesh import Mesh
from ftrain.model import families, find_model
from ftrain.models.omni import PRESETS
from ftrain.plan import find_plan
from ftrain.precision import fp8_report
from ftrain.remat import POLICIES
from ftrain.state import make_state, whole
from ftrain.step import make_train_step

OMNI = find_model("omni-tiny")
FAMILIES = {
    family: find_model(next(iter(module.PRESETS.values())))
    for family, module in families().items()
    if hasattr(module, "examples")
}

pytestmark = pytest.mark.usefixtures("one_thread")


def started(model, mode="off", **how):
    job = make_job(model, find_plan("fsdp_sp_ep"), Mesh(), **how)
    state = make_state(model.specs, job.placements, job.device_mesh, lambda n, spec, at: values(n, spec)[at])
    return job, state, make_train_step(model, job.sharding, job.ops, RECIPE, mode)


def test_few_graphs_for_images_of_all_sizes(one_rank, captures):
    """A graph for each size that packs are filled up to, whatever the images; and few sizes."""
    job, state, step = started(OMNI, "aot_eager")
    batches = [collate([mixed_batch(OMNI, 4, seed)], 40) for seed in range(60)]
    packed = [job.shares(batch)[1]["image"][0] for batch in batches]
    units, sizes = {p.units for p in packed}, {p.padded for p in packed}
    assert len(units) > 1.5 * len(sizes) and sizes <= {bucket(n) for n in range(1, max(units) + 1)}
    few = [size for size, _ in Counter(p.padded for p in packed).most_common(2)]
    chosen = [batch for batch, p in zip(batches, packed, strict=True) if p.padded in few][:6]
    for batch in chosen:
        state, metrics = step(state, job.microbatches(batch))
        assert metrics["finite"]
    assert len(captures) == 2 < len(chosen)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_is_the_step_without_a_compiler(family, one_rank):
    model = FAMILIES[family]
    batch = mixed_batch(model, 3, 0)
    (job, state, step), (_, other, plain) = started(model, "aot_eager"), started(model)
    state, metrics = step(state, job.microbatches(batch))
    other, expected = plain(other, job.microbatches(batch))
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-5, atol=1e-6, msg=name)
    for name, p in state.params.items():
        torch.testing.assert_close(p.to_local(), other.params[name].to_local(), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputation_changes_nothing(family, one_rank):
    model = FAMILIES[family]
    batch = mixed_batch(model, 3, 1)
    found = []
    for remat in POLICIES:
        job, state, step = started(model, remat=remat)
        state, metrics = step(state, job.microbatches(batch))
        found.append([metrics["loss"], metrics["grad_norm"], *(p.to_local() for p in state.params.values())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["bf16", "fp8-tensorwise"])
def test_low_precision_stays_near(family, precision, one_rank):
    model = FAMILIES[family]
    batch = mixed_batch(model, 3, 2)
    _, state, step = started(model, precision=precision)
    job, exact, plain = started(model)
    found, expected = step(state, job.microbatches(batch))[1], plain(exact, job.microbatches(batch))[1]
    assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=0.06)
    assert float(found["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=0.15)


def test_projections_of_encoders_are_quantised():
    for family, part in {"qwen2_vl": "visual.", "qwen3_vl": "model.visual."}.items():
        report = fp8_report(FAMILIES[family])
        assert [name for name in report.quantised if name.startswith(part) and ".weight" in name]


def test_frozen_parts_have_nothing_and_stay(one_rank, tmp_path):
    frozen = PRESETS["omni-tiny"]["encoders"]["image"] | {"lr": 0.0}
    model = find_model(PRESETS["omni-tiny"] | {"encoders": {"image": frozen}})
    job, state, step = started(model)
    still = {n: p.to_local().clone() for n, p in state.params.items() if n.startswith("encoders.")}
    for seed in range(3):
        state, _ = step(state, job.microbatches(mixed_batch(model, 4, seed)))
    assert still and all(torch.equal(state.params[n].to_local(), t) for n, t in still.items())
    assert not [n for n in (*state.mu, *state.nu) if n in still] and "projectors.image.0.weight" in state.mu
    directory = save(tmp_path, state, model, {})
    back, _ = restore(directory, model.specs, job.placements, job.device_mesh)
    for kind in ("params", "mu", "nu"):
        saved, read = getattr(state, kind), getattr(back, kind)
        assert saved.keys() == read.keys() and all(torch.equal(whole(saved[n]), whole(read[n])) for n in saved)


def test_a_frozen_encoder_costs_no_reduction():
    """Its parameters are gathered, but no gradient of theirs is sent."""
    config = PRESETS["omni-tiny"]
    frozen = {"encoders": {"image": config["encoders"]["image"] | {"lr": 0.0}}}
    batch, counts = [mixed_batch(OMNI, 4, 0)], []
    for hf in (config, config | frozen):
        runs = run_mesh(find_model(hf), find_plan("fsdp"), Mesh(2, 1, 1), batch)
        counts.append(runs[0].traffic["reduce_scatter"][0])
    groups = {name.split(".weight")[0].split(".bias")[0] for name in OMNI.specs if name.startswith("encoders.")}
    assert counts[1] < counts[0] and groups


def test_everything_frozen_is_an_error(one_rank):
    model = replace(OMNI, specs={name: replace(spec, lr=0.0) for name, spec in OMNI.specs.items()})
    with pytest.raises(ValueError, match="every parameter is frozen: there is nothing to train"):
        started(model)


def test_a_learning_rate_factor_scales_the_update():
    """Adam's first step is the learning rate times a direction: half the factor, half the way."""
    batch = [mixed_batch(OMNI, 4, 0, kinds=[1])]
    full, halved = (
        replace(OMNI, specs={
            n: replace(spec, decay=False, lr=factor if n.startswith("encoders.") else 1.0)
            for n, spec in OMNI.specs.items()
        })
        for factor in (1.0, 0.5)
    )  # fmt: skip
    one, other = run_plain(full, batch), run_mesh(halved, find_plan("fsdp"), Mesh(2, 1, 1), batch)[0]
    for name, spec in OMNI.specs.items():
        start, share = values(name, spec), 0.5 if name.startswith("encoders.") else 1.0
        moved, expected = other.params[name] - start, share * (one.params[name] - start)
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)
        assert expected.any()

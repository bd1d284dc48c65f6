"""optax in the train step: as AdamW, on any mesh, from checkpoint to checkpoint, or refused by name."""

import collections
import subprocess

import optax
import pytest
import torch
from jax_devices import jax
from runs import command, environment, steps, write_model, write_text

from ftrain import checkpoint
from ftrain.config import TrainConfig
from ftrain.equivalence import random_batch, shrink, values
from ftrain.interop import from_optax
from ftrain.interop.optimizer import find_optimizer
from ftrain.job import make_job
from ftrain.mesh import Mesh
from ftrain.model import find_model
from ftrain.optim import AdamW, Schedule
from ftrain.plan import find_plan
from ftrain.ranks import run_ranks
from ftrain.state import make_state, whole
from ftrain.step import Recipe, make_train_step

jnp = jax.numpy
MODEL = find_model(shrink(find_model("qwen3-moe-tiny").hf))
SIZES = collections.defaultdict(lambda: jnp.ones(()) * 2, {1: jnp.ones(()), 4: jnp.ones(())})
ADAM = AdamW(lr=0.1, eps=0.003, clip=0.5)
SCHEDULE = Schedule(steps=10, warmup=2)
DECAYS = {name: spec.decay for name, spec in MODEL.specs.items()}
BATCHES = [random_batch(MODEL.cfg.vocab, 5, 11, seed) for seed in range(3)]


def adamw():
    return optax.adamw(1.0, ADAM.beta1, ADAM.beta2, ADAM.eps, weight_decay=ADAM.weight_decay, mask=DECAYS)


def trained(transform, mesh=Mesh(), plan="fsdp_sp_ep", mode="off", accumulate=1, model=MODEL, batches=BATCHES):
    """After a step on each batch, on this rank: (parameters, moments by kind, metrics), whole."""
    kept = "fp32" if transform is None else from_optax(transform)
    job = make_job(model, find_plan(plan), mesh)
    state = make_state(
        model.specs, job.placements, job.device_mesh, lambda n, spec, at: values(n, spec)[at], kept
    )  # fmt: skip
    recipe = Recipe(ADAM, SCHEDULE, optimizer=None if transform is None else kept)
    step = make_train_step(model, job.sharding, job.ops, recipe, mode, accumulate)
    for batch in batches:
        state, metrics = step(state, job.microbatches(batch, accumulate))
    moments = {"mu": state.mu, "nu": state.nu} if state.mu else state.extra
    return (
        {name: whole(t) for name, t in state.params.items()},
        {kind: {name: whole(t) for name, t in of.items()} for kind, of in moments.items()},
        metrics,
    )


def alone(*args, **how):
    [found] = run_ranks(1, lambda rank: trained(*args, **how))
    return found


def close(found, expected, tolerance=3e-5):
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        error = (found[name].float() - t.float()).abs().max() / t.float().abs().max().clamp(min=1e-30)
        assert error < tolerance, (name, float(error))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_its_adamw_is_ours_step_for_step(accumulate):
    ours, optaxs = (alone(of, accumulate=accumulate, batches=[
        {k: v[:4] for k, v in b.items()} for b in BATCHES
    ]) for of in (None, adamw()))  # fmt: skip
    close(optaxs[0], ours[0])
    for kind, of in (("optax.0.mu", "mu"), ("optax.0.nu", "nu")):
        close(optaxs[1][kind], ours[1][of])
    assert optaxs[1]["optax"]["optax.0.count"].item() == len(BATCHES)
    assert optaxs[2].keys() == ours[2].keys() and torch.equal(optaxs[2]["lr"], ours[2]["lr"])


TRANSFORMS = {
    "adamw": adamw,
    "lion": lambda: optax.lion(1.0, mask=DECAYS),
    "momentum": lambda: optax.sgd(1.0, momentum=0.9, nesterov=True),
    "clipped": lambda: optax.chain(optax.clip(0.01), optax.scale_by_rms(eps=0.003), optax.scale(-1.0)),
    "two kinds": lambda: optax.partition(
        {True: optax.adam(1.0, eps=0.003), False: optax.sgd(1.0, momentum=0.5)}, DECAYS
    ),
    "some steps": lambda: optax.MultiSteps(optax.sgd(1.0, momentum=0.9), 2).gradient_transformation(),
}  # fmt: skip


@pytest.mark.parametrize("mesh", [Mesh(1, 2, 2), Mesh(3, 1, 1)], ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.usefixtures("one_thread")
def test_shards_are_updated_as_the_whole(name, mesh):
    """Parameters and all that is kept; uneven shards too."""
    expected = alone(TRANSFORMS[name]())
    for params, moments, _ in run_ranks(mesh.size, lambda rank: trained(TRANSFORMS[name](), mesh)):
        # What takes a sign forgets how small a gradient is: then round-off is an update of another sign.
        close(params, expected[0], 0.5 if name == "lion" else 3e-5)
        for kind, of in expected[1].items():
            close(moments[kind], of)


@pytest.mark.parametrize(
    "make, who",
    [
        (lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), "clip_by_global_norm"),
        (lambda: optax.lamb(1.0), "scale_by_trust_ratio"),
        (lambda: optax.adafactor(1.0, min_dim_size_to_factor=2), r"the optimizer keeps|scale_by_factored_rms"),
        (lambda: optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(1.0)), r"keeps optax, optax\.0\.\w+, as key"),
        (lambda: optax.adaptive_grad_clip(0.1), "adaptive_grad_clip"),
        (lambda: optax.apply_if_finite(optax.sgd(1.0), 3), "apply_if_finite"),
        (lambda: optax.chain(optax.centralize(), optax.sgd(1.0)), "centralize"),
        (lambda: optax.adamw(1.0, mask=lambda p: jax.tree.map(lambda x: x.size > 300, p)), "by its size or shape"),
        (lambda: optax.stateless(lambda g, p: jax.tree.map(lambda x: x / x.size**0.5, g)), "by its size or shape"),
        (lambda: optax.stateless(lambda g, p: jax.tree.map(lambda x: x * jnp.asarray(SIZES[x.size]), g)), "size|mul"),
        (lambda: optax.stateless(lambda g, p: jax.tree.map(lambda x: x / jnp.ones(x.shape).sum(), g)), "reduce_sum|div|size"),
        (lambda: optax.GradientTransformation(
            lambda p: jax.tree.map(lambda x: jnp.full(x.shape, 1 / x.shape[0]), p), lambda g, s, p=None: (g, s)
        ), "by its size or shape"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("one_thread")
def test_what_needs_more_than_a_shard_is_refused_by_name(make, who):
    with pytest.raises(ValueError, match=who):
        run_ranks(2, lambda rank: trained(make(), Mesh(2, 1, 1)))


def test_what_is_whole_is_not_refused():
    """On one rank, and of a plan that shards nothing, everything goes."""
    make = lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.lamb(1.0))  # noqa: E731
    expected = alone(make())
    for params, _, _ in run_ranks(2, lambda rank: trained(make(), Mesh(2, 1, 1), plan="ddp")):
        close(params, expected[0], 1e-3)


def test_a_step_that_is_not_finite_changes_nothing():
    def run(rank):
        job, kept = make_job(MODEL, find_plan("fsdp"), Mesh()), from_optax(adamw())
        state = make_state(MODEL.specs, job.placements, job.device_mesh, lambda n, s, at: values(n, s)[at] * 1e30, kept)
        before = {name: t.to_local().clone() for name, t in state.params.items()}
        step = make_train_step(MODEL, job.sharding, job.ops, Recipe(ADAM, SCHEDULE, optimizer=kept), "off")
        state, metrics = step(state, job.microbatches(BATCHES[0]))
        assert not metrics["finite"] and int(state.extra["optax"]["optax.0.count"].to_local()) == 0
        assert all(torch.equal(state.params[n].to_local(), t) for n, t in before.items())

    run_ranks(1, run)


@pytest.mark.parametrize("mode", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_is_an_operator_of_the_one_graph(mode, one_rank):
    found = trained(adamw(), mode=mode)
    close(found[0], trained(None)[0])


def test_labels_are_told_apart():
    """Punctuation too."""
    labels = {name: "+" if decays else "-" for name, decays in DECAYS.items()}

    def of(rate):
        return optax.inject_hyperparams(optax.sgd)(rate)

    kinds = from_optax(optax.partition({"+": of(1.0), "-": of(0.0)}, labels)).kinds(MODEL.specs)
    assert len(kinds["optax"]) == 4  # of each a count and a rate


def test_a_number_for_each_parameter_is_a_number():
    each = optax.GradientTransformation(
        lambda p: jax.tree.map(lambda x: jnp.zeros(()), p), lambda g, s, p=None: (g, jax.tree.map(lambda x: x + 1, s))
    )
    kinds = from_optax(each).kinds(MODEL.specs)
    assert list(kinds) == ["optax"] and all(spec.shape == (1,) for spec in kinds["optax"].values())
    assert not kinds["optax"].keys() & MODEL.specs.keys()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("make", [lambda: optax.sgd(1.0), adamw], ids=["nothing", "moments"])
def test_what_it_keeps_is_saved_for_any_mesh(make, tmp_path):
    opt = from_optax(make())

    def state_on(mesh, read=None):
        job = make_job(MODEL, find_plan("fsdp_sp_ep"), mesh)
        if read:
            return checkpoint.restore(read, MODEL.specs, job.placements, job.device_mesh, opt)[0]
        made = make_state(MODEL.specs, job.placements, job.device_mesh, lambda n, s, at: values(n, s)[at], opt)
        step = make_train_step(MODEL, job.sharding, job.ops, Recipe(ADAM, SCHEDULE, optimizer=opt), "off")
        return step(made, job.microbatches(BATCHES[0]))[0]

    def wholes(state):
        return {kind: {n: whole(t) for n, t in of.items()} for kind, of in {"p": state.params, **state.extra}.items()}

    def save(rank):
        state = state_on(Mesh(2, 1, 2))
        return checkpoint.save(tmp_path, state, MODEL, {}), wholes(state)

    path, expected = run_ranks(4, save)[0]
    for found in run_ranks(3, lambda rank: wholes(state_on(Mesh(3, 1, 1), path))):
        for kind, of in expected.items():
            assert all(torch.equal(found[kind][name], t) for name, t in of.items()), kind

    def as_adamw(rank):
        job = make_job(MODEL, find_plan("fsdp"), Mesh())
        checkpoint.restore(path, MODEL.specs, job.placements, job.device_mesh)

    with pytest.raises(ValueError, match="of its optimizer, not mu, nu: another --optimizer wrote it"):
        run_ranks(1, as_adamw)


# --- The flag


def test_names_are_looked_up_with_what_they_take(tmp_path):
    cfg = TrainConfig(optimizer="optax:lion", weight_decay=0.3)
    optimizer, words = find_optimizer(cfg, MODEL.specs)
    assert words == "optax.lion(b1=0.9, b2=0.95, weight_decay=0.3)"
    assert list(optimizer.kinds(MODEL.specs)) == ["optax", "optax.0.mu"]
    mine = tmp_path / "mine.py"
    mine.write_text("import optax\ndef make(specs):\n    return optax.sgd(1.0)\ndef no(specs):\n    return 3\n")
    assert find_optimizer(TrainConfig(optimizer=f"optax:{mine}:make"), MODEL.specs)[0].kinds(MODEL.specs) == {}
    for which, message in (
        ("adamx", "did you mean adam"), ("fromage", "under our learning rate"), (f"{mine}:mak", "no function 'mak'"),
        (f"{mine}:no", "no GradientTransformation"), ("novograd", "--weight-decay 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            find_optimizer(TrainConfig(optimizer=f"optax:{which}"), MODEL.specs)
    with pytest.raises(ValueError, match="--optimizer-state 8bit: of AdamW alone"):
        find_optimizer(TrainConfig(optimizer="optax:lion", optimizer_state="8bit"), MODEL.specs)


@pytest.mark.slow
def test_runs_train_and_go_on_by_it(tmp_path):
    """From the command line, on two ranks: as AdamW's, and resumed as if never stopped."""
    flags = {"model": write_model(tmp_path / "m"), "data": write_text(tmp_path / "t.jsonl"), "steps": 4, "eval_every": 0}
    flags |= {"seq_len": 64, "batch_size": 4, "compile": "aot_eager", "nproc": 2, "mesh_ep": 2, "save_every": 2}

    def run(**flags):
        done = subprocess.run(command(**flags), env=environment(tmp_path), capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr

    run(out=tmp_path / "adamw", **flags)
    run(out=tmp_path / "optax", optimizer="optax:adamw", **flags)
    ours, optaxs = ([s["loss"] for s in steps(tmp_path / name)] for name in ("adamw", "optax"))
    assert optaxs == pytest.approx(ours, rel=1e-5)
    path = sorted((tmp_path / "optax" / "checkpoints").iterdir())[0]
    run(out=tmp_path / "resumed", optimizer="optax:adamw", resume=path, **flags)
    assert [s["loss"] for s in steps(tmp_path / "resumed")] == optaxs[2:]

"""The configuration: defaults, JSON, and what is refused with which words."""

import dataclasses
import json

import pytest

from ftrain import config
from ftrain.config import MeshConfig, TrainConfig
from ftrain.mesh import Mesh, resolve


def test_default_is_valid_on_one_process():
    cfg = TrainConfig()
    config.validate(cfg)
    assert resolve(**dataclasses.asdict(cfg.mesh), world=1) == Mesh(1, 1, 1)


def test_every_field_is_in_exactly_one_group():
    in_groups = [f.name for name, group in config.GROUPS.items() if name != "mesh" for f in dataclasses.fields(group)]
    assert sorted(in_groups + ["mesh"]) == sorted(f.name for f in dataclasses.fields(TrainConfig))


def test_parse_sets_what_the_flags_say_and_nothing_else():
    flags = "--mesh.fsdp 2 --mesh.ep -1 --seq-len 64 --precision fp8-rowwise-gw-hp --lr 2e-4 --overwrite --clip inf"
    cfg = config.parse(flags.split())
    assert cfg == TrainConfig(
        mesh=MeshConfig(fsdp=2, ep=-1), seq_len=64, precision="fp8-rowwise-gw-hp", lr=2e-4, overwrite=True,
        clip=float("inf"),
    )  # fmt: skip


def test_json_round_trip_and_override():
    cfg = TrainConfig(mesh=MeshConfig(2, 1, -1, 2), data="a b.txt", lr=3e-4, router_aux_loss=0.02, track="wandb",
                      clip=float("inf"), resume="runs/a/checkpoints/step-3", freeze=("visual", "*.bias"),
                      lr_factor=("a.b=0.1",))  # fmt: skip
    assert config.from_json(config.to_json(cfg)) == cfg
    assert config.parse(["--steps", "7"], config.from_json(config.to_json(cfg))) == dataclasses.replace(cfg, steps=7)


def test_overwrite_is_not_recorded():
    assert config.from_json(config.to_json(TrainConfig(overwrite=True))).overwrite is False
    # and so a recorded run can be started over
    again = config.parse(["--overwrite"], config.from_json(config.to_json(TrainConfig())))
    config.validate(again)
    assert again.overwrite


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "x.json is not valid JSON"),
        ("[1]", "x.json must hold a JSON object"),
        ('{"mesh": 2}', "x.json must hold a JSON object"),
        ('{"stepz": 2}', "x.json has an unknown key 'stepz'; did you mean steps?"),
        ('{"mesh": {"fdsp": 2}}', "x.json has an unknown key 'mesh.fdsp'; did you mean mesh.fsdp?"),
    ],
)
def test_malformed_json(text, words):
    with pytest.raises(ValueError, match="^" + words.replace(".", r"\.").replace("?", r"\?")):
        config.from_json(text, "x.json")


def test_json_values_are_held_to_the_types():
    with pytest.raises(SystemExit) as exit:
        config.from_json('{"steps": "many"}')
    assert exit.value.code == 2


@pytest.mark.parametrize(
    "change, words",
    [
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"seq_len": -1}, "--seq-len -1: must be at least 1"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"accumulate": 0}, "--accumulate 0: must be at least 1"),
        ({"nproc": 0}, "--nproc 0: must be at least 1"),
        ({"save_every": -5}, "--save-every -5: must be 0 or more"),
        ({"eval_every": -5}, "--eval-every -5: must be 0 or more"),
        ({"seed": -1}, "--seed -1: must be 0 or more"),
        ({"lr": 0.0}, "--lr 0.0: must be positive and finite"),
        ({"lr": float("nan")}, "--lr nan: must be positive and finite"),
        ({"beta1": 1.0}, "--beta1 1.0: must be at least 0 and less than 1"),
        ({"min_lr_ratio": 1.5}, "--min-lr-ratio 1.5: must be between 0 and 1"),
        ({"router_aux_loss": -0.1}, "--router-aux-loss -0.1: must be 0 or more, and finite"),
        ({"lr_factor": ("a=0.5", "b")}, "--lr-factor b: must be NAME=FACTOR, the factor 0 or more, as encoders.image=0.1"),
        ({"lr_factor": ("a=-1",)}, "--lr-factor a=-1: must be NAME=FACTOR, the factor 0 or more, as encoders.image=0.1"),
        ({"accumulate": 3}, "--batch-size 8: must be a multiple of --accumulate 3"),
    ],
)
def test_refused_values_name_flag_value_and_the_valid_ones(change, words):
    with pytest.raises(ValueError) as error:
        config.validate(TrainConfig(**change))
    assert str(error.value) == words


def test_resume_directory_must_exist_and_excludes_overwrite(tmp_path):
    with pytest.raises(FileNotFoundError, match="--resume nowhere: must be auto, never, or the directory"):
        config.validate(TrainConfig(resume="nowhere"))
    config.validate(TrainConfig(resume=str(tmp_path)))
    with pytest.raises(ValueError, match="--overwrite excludes --resume"):
        config.validate(TrainConfig(resume=str(tmp_path), overwrite=True))


def test_missing_wandb_is_said_before_training(tmp_path, monkeypatch):
    # A directory named wandb, which wandb itself leaves behind, is not the package.
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(ValueError, match="--track wandb: the package wandb is not installed"):
        config.validate(TrainConfig(track="wandb"))


def test_a_recipe_gives_defaults_that_flags_override(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import no_such_module\nDEFAULTS = {'steps': 7, 'mesh.sp': 2, 'lr_factor': ('a=0.5',)}\n")
    cfg = config.with_recipe(TrainConfig(), str(path))
    assert (cfg.steps, cfg.mesh.sp, cfg.lr_factor, cfg.recipe) == (7, 2, ("a=0.5",), str(path))
    assert config.parse(["--steps", "9"], cfg) == dataclasses.replace(cfg, steps=9)
    assert config.from_json(config.to_json(cfg)) == cfg
    assert config.resolved(cfg, False).out == "runs/mine"
    for text, words in [
        ("{'stepz': 7}", "DEFAULTS has an unknown key 'stepz'; did you mean steps?"),
        ("{'mesh.fdsp': 7}", "DEFAULTS has an unknown key 'fdsp'; did you mean fsdp?"),
        ("{'steps': int('7')}", "DEFAULTS must be a literal"),
    ]:
        path.write_text(f"DEFAULTS = {text}\n")
        with pytest.raises(ValueError) as error:
            config.with_recipe(TrainConfig(), str(path))
        assert words in str(error.value)
    with pytest.raises(FileNotFoundError, match="--recipe no.py: there is no such file"):
        config.with_recipe(TrainConfig(), "no.py")
    with pytest.raises(ValueError, match="--recipe no: the recipes are"):
        config.validate(TrainConfig(recipe="no"))


def test_names_choose_parameters():
    import torch

    from ftrain.groups import regrouped
    from ftrain.specs import ParamSpec

    names = ["visual.blocks.0.weight", "visual.blocks.0.bias", "visualise.weight", "model.norm.weight"]
    specs = {name: ParamSpec((2,), torch.zeros, lr=0.5) for name in names}

    def rates(freeze=(), factors=()):
        return [spec.lr for spec in regrouped(specs, freeze, factors).values()]

    assert rates() == [0.5] * 4
    assert rates(["visual"]) == rates(["visual."]) == [0, 0, 0.5, 0.5]
    assert rates(["*.bias", "model.norm.weight"]) == [0.5, 0, 0.5, 0]
    assert rates(factors=[("*", 0.1), ("visual", 2.0)]) == [2.0, 2.0, 0.1, 0.1]
    assert rates(["visual.blocks.0.bias"], [("visual", 2.0)]) == [2.0, 0, 0.5, 0.5]
    with pytest.raises(ValueError, match=r"--freeze visuals: no parameter is called so; near are visual"):
        rates(["visuals"])
    with pytest.raises(ValueError, match=r"--lr-factor zzz: no parameter is called so; names begin with visual, visualise"):
        rates(factors=[("zzz", 1.0)])


def test_resolved_fills_in_precision_and_run_directory(tmp_path):
    assert config.resolved(TrainConfig(), accelerated=False).precision == "fp32"
    assert config.resolved(TrainConfig(), accelerated=True).precision == "bf16"
    assert config.resolved(TrainConfig(precision="fp32"), accelerated=True).precision == "fp32"
    assert config.resolved(TrainConfig(), accelerated=False).out == "runs/qwen3-moe-tiny"
    assert config.resolved(TrainConfig(model=str(tmp_path) + "/"), accelerated=False).out == f"runs/{tmp_path.name}"
    assert config.resolved(TrainConfig(out="there"), accelerated=False).out == "there"
    assert json.loads(config.to_json(config.resolved(TrainConfig(), False)))["mesh"]["fsdp"] == -1


def test_choices_are_those_of_the_modules_that_know_them():
    """The flags name them again, since the help may not import torch."""
    from typing import get_args, get_type_hints

    from ftrain import graph, optim, precision, remat

    hints = get_type_hints(TrainConfig, include_extras=False)

    def choices(name: str) -> tuple:
        options = get_args(hints[name])
        return get_args(options[0]) if type(None) in options else options

    assert choices("precision") == precision.PRECISIONS
    assert choices("compile") == graph.MODES
    assert choices("remat") == remat.POLICIES
    assert choices("schedule") == optim.SCHEDULES

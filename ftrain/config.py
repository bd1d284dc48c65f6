"""The run's configuration: every flag, its default and its meaning, and what values it may have.

Each group is a small dataclass, shown as one box of `--help`; `TrainConfig` is their sum, so the
program reads `cfg.steps` and `cfg.lr`, whatever the group.
"""

import dataclasses
import difflib
import importlib.util
import json
import math
import os
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from . import recipes

PROGRAM = "python -m ftrain"

T = TypeVar("T")
# The group's name stands in the help, not in the flag: --steps, not --task.steps.
Flat = Annotated[T, tyro.conf.arg(prefix_name=False)]
EitherOr = tyro.conf.create_mutex_group(required=False, title="resume or overwrite")


def _plan_metavar() -> str:
    # find_spec, not import: listing the plans must not import torch.
    folders = importlib.util.find_spec("ftrain.plans").submodule_search_locations
    return "|".join([*sorted(module.name for module in pkgutil.iter_modules(folders)), "FILE.py:FUNCTION"])


def _recipe_metavar() -> str:
    return "|".join([*recipes.names(), "FILE.py"])


@dataclass(frozen=True)
class Task:
    """What is trained, on what, for how long."""

    recipe: Annotated[str | None, tyro.conf.arg(prefix_name=False, metavar=_recipe_metavar())] = None
    """A whole run by name: its model, its data, and defaults of its own for all flags."""
    model: Flat[str] = "qwen3-moe-tiny"
    """A preset's name, a directory with a Hugging Face config.json (and weights, if present), or a YAML or JSON
    file that composes one."""
    init: Flat[str | None] = None
    """Directory with Hugging Face weights (safetensors) to start from; None: the weights in --model's
    directory if there are any, else random ones."""
    data: Flat[str | None] = None
    """Text to train on, or JSONL with "text" or with "messages" (and "images", "audios", "videos") on each line;
    None: the source of Python's standard library."""
    tokenizer: Flat[str | None] = None
    """Directory with the tokenizer (and the processor of images, ...); None: the one with the weights, else one is
    trained on the text."""
    steps: Flat[int] = 200
    """Optimizer steps of the whole run, those before a resume included."""
    seq_len: Flat[int] = 256
    """Tokens a sequence. Documents are packed into sequences and do not see each other."""
    batch_size: Flat[int] = 8
    """Sequences per optimizer step, of the whole job."""
    accumulate: Flat[int] = 1
    """Parts that an optimizer step's batch is taken in, one after the other, to save memory."""
    seed: Flat[int] = 0
    """Seed of the initial weights and of the order of the data."""


@dataclass(frozen=True)
class Parallel:
    """How the work is spread over ranks."""

    plan: Annotated[str, tyro.conf.arg(prefix_name=False, metavar=_plan_metavar())] = "fsdp_sp_ep"
    """The sharding plan: a name in plans/, or a function in a file of your own."""
    nproc: Flat[int | None] = None
    """Ranks to start on this machine; None: one for each GPU, or one on CPU. Under torchrun and
    Slurm's srun, which start the ranks themselves, it is not looked at."""


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh; their product is the number of ranks. At most one may be -1: inferred."""

    fsdp: int = -1
    """Splits the batch, and the parameters of the fsdp plans."""
    sp: int = 1
    """Splits the sequence (Ulysses)."""
    ep: int = 1
    """Splits the batch, and the experts."""
    replica: int = 1
    """Copies of the mesh (HSDP): each takes its part of the batch."""


Precision = Literal["fp32", "bf16", "fp8-tensorwise", "fp8-rowwise", "fp8-rowwise-gw-hp"]


@dataclass(frozen=True)
class Compute:
    """How a step is computed."""

    precision: Flat[Precision | None] = None
    """Of matrix products; weights stay in fp32. None: bf16 on GPU, fp32 on CPU."""
    fp8_all_gather: Flat[bool] = False
    """Gather the dense projections' weights as float8, in half of bf16's bytes: with --precision fp8-tensorwise."""
    compile: Flat[Literal["inductor", "aot_eager", "off"]] = "inductor"
    """The compiler's backend for the train step; off runs it operation by operation."""
    remat: Flat[Literal["none", "selective", "full", "offload"]] = "selective"
    """What backward recomputes: nothing; all but products and attention (compiled, that is faster than to read it from
    memory); whole layers; or as selective, with what is kept waiting in the host's memory."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW or another, and the weights of the losses beside the language model's."""

    optimizer: Annotated[str, tyro.conf.arg(prefix_name=False, metavar="adamw|optax:NAME|optax:FILE.py:FUNCTION")] = "adamw"
    """adamw; or a transformation of JAX's optax, by its name there or from a function (specs -> transformation) in a file
    (pip install 'ftrain[jax]'). The learning rate and the clipping are ours all the same."""
    lr: Flat[float] = 1e-3
    """Peak learning rate."""
    beta1: Flat[float] = 0.9
    """Decay of the first moment."""
    beta2: Flat[float] = 0.95
    """Decay of the second moment."""
    eps: Flat[float] = 1e-8
    """Added to the denominator."""
    weight_decay: Flat[float] = 0.1
    """Decoupled decay of matrices; norms and biases have none."""
    clip: Flat[float] = 1.0
    """Largest global gradient norm; inf: no clipping."""
    optimizer_state: Flat[Literal["fp32", "bf16", "8bit"]] = "fp32"
    """How AdamW's two moments are kept between steps, which compute in fp32: 8, 4 or 2.03 bytes a parameter."""
    freeze: Flat[tuple[str, ...]] = ()
    """Parameters that stay as they are: their names, or how these begin, or patterns with * (model.visual *.bias)."""
    lr_factor: Annotated[tuple[str, ...], tyro.conf.arg(prefix_name=False, metavar="NAME=FACTOR")] = ()
    """Factors on the learning rate of parameters named in that way (encoders.image=0.1); the last that fits holds."""
    router_aux_loss: Flat[float | None] = None
    """Coefficient of the experts' load-balancing loss; None: the one in the model's config."""
    router_z_loss: Flat[float] = 0.0
    """Coefficient of the router z-loss."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the steps."""

    schedule: Flat[Literal["cosine", "linear", "wsd", "constant"]] = "cosine"
    """The shape after warm-up; wsd is warm-up, stable, decay."""
    warmup: Flat[int] = 20
    """Steps of linear warm-up."""
    min_lr_ratio: Flat[float] = 0.1
    """The last learning rate, as a fraction of the peak."""
    decay: Flat[float] = 0.2
    """The last part of the steps in which wsd decays, as a fraction."""


@dataclass(frozen=True)
class Saving:
    """The run directory and its checkpoints."""

    out: Flat[str | None] = None
    """Run directory; None: runs/ and the model's name."""
    save_every: Flat[int] = 100
    """Steps between checkpoints, under OUT/checkpoints/step-N; 0: only after the last step."""
    keep: Flat[int] = 0
    """Newest checkpoints kept; 0: all."""
    resume: Annotated[str, tyro.conf.arg(prefix_name=False, metavar="auto|never|STEP-DIR"), EitherOr] = "auto"
    """Go on from OUT's newest whole checkpoint if there is one (auto), from none (never: an error if
    there is one), or from the checkpoint in a directory."""
    overwrite: Annotated[bool, tyro.conf.arg(prefix_name=False), EitherOr] = False
    """Delete what an earlier run left in OUT, and start at step 0."""


@dataclass(frozen=True)
class Watching:
    """What is measured and where it goes."""

    eval_every: Flat[int] = 100
    """Steps between measurements of the held-out loss; 0: only before the first step and after the last."""
    eval_batches: Flat[int] = 8
    """Batches in a measurement of the held-out loss."""
    log_every: Flat[int] = 1
    """Steps between lines on the console; metrics.jsonl has every step."""
    track: Flat[Literal["wandb"] | None] = None
    """Also send the metrics to this service."""


@dataclass(frozen=True)
class TrainConfig(Task, Parallel, Compute, Optimizer, Schedule, Saving, Watching):
    """The configuration of a run."""

    mesh: MeshConfig = MeshConfig()
    """Sizes of the mesh."""


# The same fields, a level deeper: what tyro shows, one box a group.
GROUPS = {"task": Task, "parallel": Parallel, "mesh": MeshConfig, "compute": Compute, "optimizer": Optimizer,
          "schedule": Schedule, "saving": Saving, "watching": Watching}  # fmt: skip
_Flags = make_dataclass(
    "_Flags", [(name, group, field(default_factory=group)) for name, group in GROUPS.items()], frozen=True
)


def _group(cfg: TrainConfig, name: str):
    group = GROUPS[name]
    return cfg.mesh if group is MeshConfig else group(**{f.name: getattr(cfg, f.name) for f in fields(group)})


def parse(argv: Sequence[str], default: TrainConfig = TrainConfig(), description: str = "") -> TrainConfig:
    """The configuration that these flags say, from `default`. Exits with tyro's explanation (and
    suggestion) when a flag is not known or its value is of the wrong type; see `validate` for the rest."""
    flags = tyro.cli(
        _Flags, prog=PROGRAM, description=description, args=list(argv),
        default=_Flags(**{name: _group(default, name) for name in GROUPS}),
        console_outputs=os.environ.get("RANK", "0") == "0",
    )  # fmt: skip
    values = {}
    for name, group in GROUPS.items():
        values |= {"mesh": flags.mesh} if group is MeshConfig else vars(getattr(flags, name))
    return TrainConfig(**values)


def to_json(cfg: TrainConfig) -> str:
    """The configuration as JSON, in the order of the help. `overwrite` is left out: it is something
    done once, and not to be done again to the run it made."""
    values = {}
    for name, group in GROUPS.items():
        part = dataclasses.asdict(_group(cfg, name))
        values |= {"mesh": part} if group is MeshConfig else part
    del values["overwrite"]
    return json.dumps(values, indent=2) + "\n"


def from_json(text: str, where: str = "config") -> TrainConfig:
    """The configuration that `to_json` wrote; absent keys have their defaults.

    Raises ValueError, naming `where`, for what is not a JSON object and for unknown keys.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("mesh", {}), dict):
        raise ValueError(f"{where} must hold a JSON object of flags, with an object under mesh")
    mesh = values.pop("mesh", {})
    named = values | {f"mesh.{key}": value for key, value in mesh.items()}
    known = [f.name for f in fields(TrainConfig) if f.name not in ("mesh", "overwrite")]
    known += [f"mesh.{f.name}" for f in fields(MeshConfig)]
    for key in named:
        if key not in known:
            raise ValueError(f"{where} has an unknown key {key!r}{did_you_mean(key, known)}")
    # Through the flags, so that a file's values are held to the same types.
    return parse([part for key, value in named.items() for part in _words(key, value)])


def _words(name: str, value) -> list[str]:
    """A field as it would be typed."""
    if isinstance(value, bool) and isinstance(getattr(TrainConfig, name, None), bool):
        return [flag(name if value else f"no_{name}")]
    return [flag(name), *map(str, value if isinstance(value, list) else [value])]


def load(path: str) -> TrainConfig:
    """The configuration in a run's run.json. Raises FileNotFoundError and ValueError, naming the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config {path}: there is no such file; a run directory holds it as run.json")
    return from_json(Path(path).read_text(), f"--config {path}")


def resolved(cfg: TrainConfig, accelerated: bool) -> TrainConfig:
    """`cfg` with the defaults filled in that depend on the machine and the model."""
    precision = cfg.precision or ("bf16" if accelerated else "fp32")
    path = Path(cfg.recipe or cfg.model).resolve()
    out = cfg.out or str(Path("runs") / (path.stem if path.suffix in (".yaml", ".yml", ".json", ".py") else path.name))
    return dataclasses.replace(cfg, precision=precision, out=out)


def with_recipe(cfg: TrainConfig, name: str) -> TrainConfig:
    """`cfg` with a recipe and its defaults. Raises ValueError and FileNotFoundError, naming it."""
    values = recipes.defaults(name)
    mesh = {key.removeprefix("mesh."): values.pop(key) for key in list(values) if key.startswith("mesh.")}
    known = [f.name for f in fields(TrainConfig) if f.name not in ("mesh", "overwrite", "recipe")]
    known_mesh = [f.name for f in fields(MeshConfig)]
    for key, names in [*((key, known) for key in values), *((key, known_mesh) for key in mesh)]:
        if key not in names:
            raise ValueError(f"--recipe {name}: DEFAULTS has an unknown key {key!r}{did_you_mean(key, names)}")
    return dataclasses.replace(cfg, recipe=name, mesh=dataclasses.replace(cfg.mesh, **mesh), **values)


def flag(name: str) -> str:
    """The flag of a field: seq_len -> --seq-len."""
    return "--" + name.replace("_", "-")


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """'; did you mean X?', or nothing when no known name is near, whatever the case of its letters."""
    lowered = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f"; did you mean {lowered[near[0]]}?" if near else ""


def factors(pairs: Sequence[str]) -> list[tuple[str, float]]:
    """NAME=FACTOR, ... -> (name, factor), ... Raises ValueError for what is no such pair."""
    out = []
    for pair in pairs:
        name, _, value = pair.rpartition("=")
        try:
            factor = float(value)
        except ValueError:
            factor = -1.0
        if not name or not 0 <= factor < math.inf:
            raise ValueError(f"--lr-factor {pair}: must be NAME=FACTOR, the factor 0 or more, as encoders.image=0.1")
        out.append((name, factor))
    return out


# Which fields -> (what holds of a valid value, in words). None, where a field may be None, is valid.
_RULES: list[tuple[str, Callable[[float], bool], str]] = [
    ("steps seq_len batch_size accumulate nproc eval_batches log_every", lambda v: v >= 1, "at least 1"),
    ("save_every keep eval_every warmup seed", lambda v: v >= 0, "0 or more"),
    ("lr eps", lambda v: 0 < v < math.inf, "positive and finite"),
    ("clip", lambda v: v > 0, "positive (inf: no clipping)"),
    ("beta1 beta2", lambda v: 0 <= v < 1, "at least 0 and less than 1"),
    ("weight_decay router_aux_loss router_z_loss", lambda v: 0 <= v < math.inf, "0 or more, and finite"),
    ("min_lr_ratio decay", lambda v: 0 <= v <= 1, "between 0 and 1"),
]


def validate(cfg: TrainConfig) -> None:
    """Raises ValueError, naming the flag, its value and the valid ones. The mesh has `mesh.resolve`."""
    for names, valid, words in _RULES:
        for name in names.split():
            value = getattr(cfg, name)
            if value is not None and not valid(value):
                raise ValueError(f"{flag(name)} {value}: must be {words}")
    if cfg.batch_size % cfg.accumulate:
        raise ValueError(f"--batch-size {cfg.batch_size}: must be a multiple of --accumulate {cfg.accumulate}")
    if cfg.overwrite and cfg.resume not in ("auto", "never"):
        raise ValueError(f"--overwrite excludes --resume {cfg.resume}: give one of the two")
    if cfg.init is not None and not Path(cfg.init).is_dir():
        raise FileNotFoundError(f"--init {cfg.init}: must be a directory with Hugging Face weights")
    if cfg.tokenizer is not None and not Path(cfg.tokenizer).is_dir():
        raise FileNotFoundError(f"--tokenizer {cfg.tokenizer}: must be a directory with a tokenizer")
    if cfg.recipe is not None:
        recipes.file(cfg.recipe)
    factors(cfg.lr_factor)
    if cfg.optimizer != "adamw" and not cfg.optimizer.startswith("optax:"):
        raise ValueError(f"--optimizer {cfg.optimizer}: must be adamw, optax:NAME or optax:FILE.py:FUNCTION")
    if cfg.optimizer != "adamw" and importlib.util.find_spec("optax") is None:
        raise ValueError(f"--optimizer {cfg.optimizer}: needs JAX and optax (pip install 'ftrain[jax]')")
    if cfg.resume not in ("auto", "never") and not Path(cfg.resume).is_dir():
        raise FileNotFoundError(f"--resume {cfg.resume}: must be auto, never, or the directory of a checkpoint")
    if cfg.track == "wandb":
        found = importlib.util.find_spec("wandb")
        # wandb leaves a directory of its own name, which Python takes for an empty package.
        if found is None or found.origin is None:
            raise ValueError("--track wandb: the package wandb is not installed (pip install wandb)")

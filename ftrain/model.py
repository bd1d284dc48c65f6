"""Finding a model: by preset name, by directory, or by its Hugging Face config."""

import importlib
import os
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import models
from .config import did_you_mean
from .disk import instead_of, read_json
from .items import Item, on_one_device
from .loss import IGNORE
from .ops import Output, fill_batch, plain
from .specs import Specs


@dataclass(frozen=True)
class Model:
    """family: the config's `model_type`; hf: the config as read; cfg: as the family reads it;
    specs: every parameter; forward: (p, batch, ops) -> Output.

    prepare: Hugging Face's inputs -> the global batch: tensors [B, S, ...], `row_...` ones [B, ...] and, under
        "items", the `Item`s of each encoder.
    blanks: for each encoder, the item that packs are filled up with.
    targets: a batch -> how many targets each loss has in it, 0-dim int64; a loss is the mean over them.
    weights: of the losses, where not 1.
    sources: of parameters that start with weights from elsewhere: the directory, and the name there.
    examples: generator -> random inputs, such as `prepare` takes, one for each kind of sample; None: text alone.
    ignored: what the names of a checkpoint's tensors begin with that are of parts which the family leaves out.
    """

    family: str
    hf: dict
    cfg: Any
    specs: Specs
    forward: Callable[..., Output]
    prepare: Callable[[Mapping], dict] = fill_batch
    blanks: Mapping[str, Item] = field(default_factory=dict)
    targets: Callable[[Mapping], dict[str, Tensor]] = lambda batch: {"loss": (batch["labels"] != IGNORE).sum()}
    weights: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    examples: Callable[..., list[dict]] | None = None
    ignored: tuple[str, ...] = ()


FAMILY = ("PRESETS", "config", "specs", "forward")  # what a family's module has
# What it may have besides, when it takes or gives more than text: of (inputs, cfg), of (cfg, ...), of cfg alone.
OF_INPUTS, OF_GENERATOR, OF_CFG = ("prepare", "targets"), ("examples",), ("blanks", "weights", "sources")
# And: ALIASES, other `model_type`s that are this family's; CLASS_NAME, what diffusers' configs have in its place;
# IGNORED, see Model.ignored.


def families() -> dict[str, Any]:
    """The family modules in the models folder, by `model_type`: those that have PRESETS or a config.

    Raises ValueError naming a file that has the one but lacks others of the four.
    """
    found = {n: m for n, m in _modules().items() if hasattr(m, "PRESETS") or hasattr(m, "config")}
    for module in found.values():
        _check_family(module)
    return found


def _modules() -> dict[str, Any]:
    """All modules in the models folder: the families, and what they share."""
    names = [module.name for module in pkgutil.iter_modules(models.__path__)]
    return {name: importlib.import_module(f"{models.__name__}.{name}") for name in names}


def _check_family(module: Any) -> None:
    if lacking := [name for name in FAMILY if not hasattr(module, name)]:
        raise ValueError(f"{module.__file__} lacks {', '.join(lacking)}: a family's module has {', '.join(FAMILY)}")


def presets() -> dict[str, dict]:
    """Every preset of every family: name -> config."""
    return {name: hf for family in families().values() for name, hf in family.PRESETS.items()}


def find_model(which: str | os.PathLike | Mapping | Any) -> Model:
    """A model from a preset's name, a directory with `config.json`, a YAML or JSON file with a config, a config dict,
    or a transformers config.

    Raises ValueError for an unknown name (with a suggestion), an unsupported `model_type`, or a config
    that makes no sense; FileNotFoundError for a file that is not there.
    """
    if isinstance(which, Mapping):
        return _from_config(_composed(dict(which)))
    if hasattr(which, "to_dict"):
        return _from_config(which.to_dict())
    which, known = os.fspath(which), presets()
    if which in known:
        return _from_config(dict(known[which]))
    of_file = which.endswith((".yaml", ".yml", ".json"))
    if os.path.isdir(which) or of_file:
        path = Path(which) if of_file else Path(which) / "config.json"
        if not path.is_file():
            held = f"a model's directory holds a config.json{instead_of(which)}"
            raise FileNotFoundError(f"{path} does not exist: {held}")
        hf = read_json(path) if path.suffix == ".json" else _read_yaml(path)
        try:
            return _from_config(_composed(hf))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    near = did_you_mean(os.path.basename(which), list(known)) or f"; the presets are {', '.join(known)}"
    raise ValueError(f"model {which!r} is neither a directory nor a preset{near}")


def _read_yaml(path: Path) -> dict:
    import yaml

    try:
        hf = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(hf, dict):
        raise ValueError(f"{path} must hold a mapping: a model's config")
    return hf


def _composed(hf: dict) -> dict:
    """A composition's config, whole: parts that are named by a preset or a directory are replaced by their configs."""
    foundation = hf.get("foundation")
    if isinstance(foundation, str):
        hf = {**hf, "foundation": find_model(foundation).hf}
        if has_weights(foundation):
            hf = {"weights": foundation, **hf}
    for kind in ("encoders", "decoders"):
        if isinstance(hf.get(kind), Mapping):
            hf = {**hf, kind: {name: _with_config(part) for name, part in hf[kind].items()}}
    return hf


def _with_config(part: Any) -> Any:
    if isinstance(part, Mapping) and "config" not in part and isinstance(part.get("weights"), str):
        return {**part, "config": read_json(Path(part["weights"]) / "config.json")}
    return part


def has_weights(directory: str | os.PathLike) -> bool:
    return Path(directory).is_dir() and any(Path(directory).glob("*.safetensors"))


def _from_config(hf: dict) -> Model:
    known, family = families(), hf.get("model_type")
    if family is None and (wanted := hf.get("_class_name")) is not None:  # diffusers' configs have this instead
        family = next((n for n, module in known.items() if getattr(module, "CLASS_NAME", None) == wanted), wanted)
    family = next((n for n, module in known.items() if family in getattr(module, "ALIASES", ())), family)
    if family not in list(known):  # a list, because the value may be anything that JSON can hold
        if family in list(modules := _modules()):
            _check_family(modules[family])
        raise ValueError(f"model_type {family!r} is not supported: supported are {', '.join(sorted(known))}")
    module = known[family]
    cfg = module.config(hf)
    more = {name: partial(getattr(module, name), cfg=cfg) for name in OF_INPUTS if hasattr(module, name)}
    more |= {name: partial(getattr(module, name), cfg) for name in OF_GENERATOR if hasattr(module, name)}
    more |= {name: getattr(module, name)(cfg) for name in OF_CFG if hasattr(module, name)}
    more["ignored"] = getattr(module, "IGNORED", ())
    return Model(family, hf, cfg, module.specs(cfg), lambda p, batch, ops: module.forward(p, batch, cfg, ops), **more)


def example(model: Model) -> dict:
    """Some batch of the model's, to be looked at for its shapes."""
    if model.examples:
        return model.prepare(model.examples(torch.Generator().manual_seed(0))[-1])
    ids = torch.zeros(1, 16, dtype=torch.long)
    return fill_batch({"input_ids": ids, "labels": ids})


def param_counts(specs: Specs) -> tuple[int, int]:
    """(total, active): all parameters, and those that one token is multiplied with."""
    return sum(spec.numel for spec in specs.values()), round(sum(spec.numel * spec.active for spec in specs.values()))


def logits(model: Model, params: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """Logits [B, S, V] on one device: batch as in Hugging Face (`input_ids`, `attention_mask`, `position_ids`, ...;
    `pixel_values`, `image_grid_thw`, `input_features`, ... of the models that have a use for them)."""
    out = model.forward(params, on_one_device(model.prepare(batch), model.blanks), plain())
    if out.unembedding is None:
        raise ValueError(f"a model of family {model.family} has no logits")
    return out.hidden @ out.unembedding.T

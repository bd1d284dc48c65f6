"""A foundation model, with any number of encoders into it and decoders out of it, described by a config:

    model_type: omni
    foundation: {...}       # the config of any family of language models
    lr: 1.0                 # factor on the learning rate of the foundation; 0 freezes it
    encoders:
      NAME: {type: vit, config: {...}, placeholder: 7, lr: 0.0, projector: mlp, projector_lr: 1.0,
             weights: DIRECTORY, weights_prefix: "model.encoder."}
    decoders:
      NAME: {type: codes, config: {...}, input: hidden, lr: 1.0, weight: 1.0}

An encoder's outputs, projected, stand in for the embeddings of its placeholder tokens; those of encoders that share a
placeholder are added. A decoder reads the foundation's hidden states, or the stream of the decoder that `input` names,
and adds a loss. `type` is a module of encoders/ or decoders/, or the path of a file like them. Parameters are
called as in the foundation, `encoders.NAME.`, `projectors.NAME.` and `decoders.NAME.`. What has `weights`, the
foundation too, starts with the tensors of that directory whose names begin with `weights_prefix`.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import import_file
from ..items import Item, seat
from ..loss import IGNORE
from ..ops import Ops, Output, fill_batch, layer_params
from ..specs import ParamSpec
from . import fields
from .encoders import vit
from .layers import project, projection

ATTEMPTS = 20
PROJECTORS = ("linear", "mlp", "none")
OF_PART = ("type", "config", "lr", "weights", "weights_prefix")
TEXT = {"input_ids", "attention_mask", "position_ids", "segment_ids", "labels", "token_type_ids"}
# Names that batches, streams and metrics have for other things.
TAKEN = TEXT | {"items", "hidden", "loss", "tokens", "router_aux", "router_z"}

# Small enough to try: an image of patches, and text.
PRESETS = {
    "omni-tiny": {
        "model_type": "omni",
        "foundation": {
            "model_type": "qwen3",
            "vocab_size": 512,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
        },
        "encoders": {
            "image": {
                "type": "vit",
                "placeholder": 7,
                "config": vit.TINY,
            },
        },
    }
}


@dataclass(frozen=True)
class Encoder:
    module: ModuleType
    cfg: Any
    placeholder: int
    per_unit: Fraction  # outputs
    projector: str
    lr: float
    projector_lr: float


@dataclass(frozen=True)
class Decoder:
    module: ModuleType
    cfg: Any
    input: str  # "hidden", or a decoder before this one
    width: int  # of that stream
    lr: float
    weight: float


@dataclass(frozen=True)
class OmniConfig:
    """What the foundation's cfg says of sizes is said here too, for those who ask the model."""

    module: ModuleType  # of the foundation
    foundation: Any
    lr: float
    encoders: Mapping[str, Encoder]
    decoders: Mapping[str, Decoder]
    weights: Mapping[str, tuple[str, str]]  # prefix of our names -> directory, and the prefix there

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.foundation, name)


def config(hf: Mapping, family: str | None = None) -> OmniConfig:
    """family: the one that the foundation must be of, for families that are compositions themselves. Raises
    ValueError, naming key and value, for what is missing, unknown or impossible."""
    known = ("model_type", "foundation", "lr", "encoders", "decoders", "weights")
    _only(hf, (*known, "architectures", "dtype", "transformers_version"), "of an omni model")
    inner = fields.read(hf, "foundation")
    if not isinstance(inner, Mapping) or not isinstance(inner.get("model_type"), str):
        fields.refuse("foundation", inner, "the config of a language model, with its model_type")
    if family not in (None, inner["model_type"]):
        fields.refuse("foundation.model_type", inner["model_type"], repr(family))
    module = _module("", inner["model_type"], ("specs", "forward"))
    if hasattr(module, "examples"):
        fields.refuse("foundation.model_type", inner["model_type"], "a language model's, that takes text alone")
    foundation = module.config(inner)
    encoders, decoders, weights = {}, {}, {}
    if hf.get("weights") is not None:
        weights[""] = (hf["weights"], "")
    for name, part in _parts(hf, "encoders"):
        of_encoder = ("placeholder", "projector", "projector_lr")
        _only(part, (*of_encoder, *OF_PART), f"of the encoder {name}")
        if part.get("weights") is not None:
            weights[f"encoders.{name}."] = (part["weights"], part.get("weights_prefix") or "")
        encoder = _module("encoders", fields.read(part, "type"), ("specs", "blank", "encode", "items", "example"))
        placeholder = fields.read(part, "placeholder")
        if type(placeholder) is not int or not 0 <= placeholder < foundation.vocab:
            fields.refuse(f"encoders.{name}.placeholder", placeholder, f"a token below vocab_size = {foundation.vocab}")
        projector = fields.read(part, "projector", "mlp")
        if projector not in PROJECTORS:
            fields.refuse(f"encoders.{name}.projector", projector, f"one of {', '.join(PROJECTORS)}")
        cfg = _read(encoder, part, f"encoders.{name}")
        if projector == "none" and cfg.width != foundation.hidden:
            fields.refuse(f"encoders.{name}.projector", projector, f"'linear' or 'mlp': the encoder's outputs have "
                          f"{cfg.width} elements, the foundation's embeddings {foundation.hidden}")  # fmt: skip
        empty = encoder.blank(cfg)
        encoders[name] = Encoder(
            encoder, cfg, placeholder, Fraction(len(empty.slots), empty.units), projector,
            factor(part, "lr", name), factor(part, "projector_lr", name),
        )  # fmt: skip
    widths = {"hidden": foundation.hidden}
    for name, part in _parts(hf, "decoders"):
        _only(part, ("input", "weight", *OF_PART), f"of the decoder {name}")
        if part.get("weights") is not None:
            weights[f"decoders.{name}."] = (part["weights"], part.get("weights_prefix") or "")
        if name in encoders:
            fields.refuse("decoders", name, "a name that no encoder has")
        decoder = _module("decoders", fields.read(part, "type"), ("specs", "blank", "decode", "width", "example"))
        stream = fields.read(part, "input", "hidden")
        if stream not in widths:
            fields.refuse(f"decoders.{name}.input", stream, f"one of {', '.join(widths)}")
        cfg = _read(decoder, part, f"decoders.{name}")
        decoders[name] = Decoder(
            decoder, cfg, stream, widths[stream], factor(part, "lr", name), factor(part, "weight", name)
        )
        if not hasattr(decoder, "count") and "labels" not in decoder.blank(cfg, (1, 1)):
            raise ValueError(f"{decoder.__file__} lacks count: its targets are no labels, it must count them")
        widths[name] = decoder.width(cfg, widths[stream])
    return OmniConfig(module, foundation, factor(hf, "lr", "the foundation"), encoders, decoders, weights)


def _read(module: ModuleType, part: Mapping, where: str) -> Any:
    try:
        return module.config(fields.read(part, "config", {}))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def factor(part: Mapping, key: str, where: str) -> float:
    value = fields.read(part, key, 1.0)
    if type(value) not in (int, float) or not value >= 0:
        fields.refuse(f"{key} of {where}", value, "a number, at least 0")
    return float(value)


def _only(given: Mapping, known: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"the config {where} has an unknown key {key!r}: known are {', '.join(known)}")


def _parts(hf: Mapping, key: str) -> list[tuple[str, Mapping]]:
    parts = fields.read(hf, key, {})
    named = isinstance(parts, Mapping) and all(isinstance(n, str) and n.isidentifier() for n in parts)
    if named and (bad := [name for name in parts if name in TAKEN or name.startswith("row_")]):
        fields.refuse(key, bad[0], f"a name other than {', '.join(sorted(TAKEN))} and row_...")
    if not named or not all(isinstance(part, Mapping) for part in parts.values()):
        fields.refuse(key, parts, "a mapping from names (letters, digits, _) to configs")
    return list(parts.items())


def _module(folder: str, kind: str, needed: tuple[str, ...]) -> ModuleType:
    if not isinstance(kind, str):
        fields.refuse("type", kind, "the name of a module, or the path of a file")
    if kind.endswith(".py"):
        module = import_file(kind, f"type {kind}")
    else:
        try:
            module = importlib.import_module(f"{__package__}.{folder}.{kind}".replace("..", "."))
        except ModuleNotFoundError as error:
            if not (error.name or __package__).startswith(__package__):
                raise ValueError(f"type {kind!r} needs {error.name}, which is not installed") from None
            place = f"models/{folder}" if folder else "models"
            raise ValueError(f"type {kind!r}: {place} has no module of that name, nor is it a .py file") from None
    if lacking := [name for name in ("config", *needed) if not hasattr(module, name)]:
        raise ValueError(f"{module.__file__} lacks {', '.join(lacking)}: it must have {', '.join(('config', *needed))}")
    return module


def specs(cfg: OmniConfig) -> dict[str, ParamSpec]:
    out = _slowed(cfg.module.specs(cfg.foundation), cfg.lr)
    for name, part in cfg.encoders.items():
        out |= _slowed(part.module.specs(part.cfg, f"encoders.{name}"), part.lr)
        out |= _slowed(_projector_specs(part, cfg.foundation.hidden, f"projectors.{name}"), part.projector_lr)
    for name, part in cfg.decoders.items():
        out |= _slowed(part.module.specs(part.cfg, f"decoders.{name}", part.width), part.lr)
    return out


def _slowed(specs: Mapping[str, ParamSpec], lr: float) -> dict[str, ParamSpec]:
    return {name: replace(spec, lr=spec.lr * lr) for name, spec in specs.items()}


def _projector_specs(part: Encoder, hidden: int, prefix: str) -> dict[str, ParamSpec]:
    sizes = {"none": [], "linear": [part.cfg.width, hidden], "mlp": [part.cfg.width, hidden, hidden]}[part.projector]
    out = {}
    for layer, (into, width) in enumerate(zip(sizes, sizes[1:])):
        out |= projection(f"{prefix}.{layer}", width, into, True, into**-0.5)
    return out


def _project(p: Mapping[str, Tensor], prefix: str, y: Tensor, part: Encoder, ops: Ops) -> Tensor:
    for layer in range({"none": 0, "linear": 1, "mlp": 2}[part.projector]):
        y = project(p, f"{prefix}.{layer}", F.gelu(y) if layer else y, ops)
    return y


def forward(p: Mapping[str, Tensor], batch: Mapping[str, Tensor], cfg: OmniConfig, ops: Ops) -> Output:
    levels: list[Tensor] = []
    placed = torch.zeros_like(batch["segment_ids"], dtype=torch.bool)
    for name, part in cfg.encoders.items():
        x = layer_params(batch, name)
        y = part.module.encode(p, f"encoders.{name}", x, part.cfg, ops)
        units, found = len(x["item"]), (len(y), y.shape[-1])
        if found != (units * part.per_unit, part.cfg.width):
            raise ValueError(f"encoders.{name}: encode gave {list(y.shape)} for {units} units: by its blank item and "
                             f"its width, it must be {[int(units * part.per_unit), part.cfg.width]}")  # fmt: skip
        y = ops.place(_project(p, f"projectors.{name}", y, part, ops), batch, name)
        placed = placed | (batch[f"{name}.source"] >= 0)
        for level, of_level in enumerate(y.unbind(2) if y.ndim == 4 else [y]):
            levels[level : level + 1] = [levels[level] + of_level if level < len(levels) else of_level]
    if len(levels) - 1 > cfg.foundation.layers:
        raise ValueError(f"an encoder has {len(levels) - 1} levels besides its outputs: the foundation, of "
                         f"{cfg.foundation.layers} layers, takes one after each")  # fmt: skip
    if levels:
        batch = {**batch, "embeddings": levels[0], "placed": placed, "deep": levels[1:]}
    out = cfg.module.forward(p, batch, cfg.foundation, ops)

    streams, losses = {"hidden": out.hidden}, {}
    for name, part in cfg.decoders.items():
        streams[name], losses[name] = part.module.decode(
            p, f"decoders.{name}", streams[part.input], layer_params(batch, name), part.cfg, ops
        )
    return out._replace(losses=losses)


def blanks(cfg: OmniConfig) -> dict[str, Item]:
    return {name: part.module.blank(part.cfg) for name, part in cfg.encoders.items()}


def prepare(inputs: Mapping, cfg: OmniConfig) -> dict:
    """inputs: input_ids [B, S] (attention_mask, position_ids, labels), for each encoder under its name the list of
    raw samples, in the order of their placeholder tokens, and for each decoder its targets, NAME.FIELD [B, S, ...]
    (by default none).

    Raises ValueError where raw samples and placeholder tokens do not match.
    """
    for key in inputs:
        part, _, field = key.partition(".")
        if key not in {*cfg.encoders, *TEXT} and not (field and part in cfg.decoders):
            raise ValueError(
                f"the inputs have {key!r}, but the model has the encoders {', '.join(cfg.encoders) or '(none)'} "
                f"and the decoders {', '.join(cfg.decoders) or '(none)'}"
            )
    batch = fill_batch({key: value for key, value in inputs.items() if key not in cfg.encoders})
    for name, part in cfg.decoders.items():
        given = layer_params(batch, name)
        nothing = part.module.blank(part.cfg, tuple(batch["segment_ids"].shape))
        if given.keys() - nothing.keys():
            raise ValueError(f"targets {', '.join(given)} of {name}: they are {', '.join(nothing)}")
        for field, blank in nothing.items():
            if given.get(field, blank).shape != blank.shape:
                raise ValueError(f"{name}.{field} are {list(given[field].shape)}: they must be {list(blank.shape)}")
            batch[f"{name}.{field}"] = given.get(field, blank)
    batch["items"] = {
        name: seat(raw_items(part, inputs.get(name, ())), _tokens(batch, part.placeholder), name)
        for name, part in cfg.encoders.items()
        if len(inputs.get(name, ()))
    }
    given = {cfg.encoders[name].placeholder for name in batch["items"]}
    for name, part in cfg.encoders.items():
        if part.placeholder not in given and len(tokens := _tokens(batch, part.placeholder)):
            raise ValueError(f"the text has {len(tokens)} placeholder tokens of {name}, but there is no input for them")
    return batch


def _tokens(batch: Mapping[str, Tensor], placeholder: int) -> Tensor:
    return ((batch["input_ids"] == placeholder) & (batch["segment_ids"] >= 0)).flatten().nonzero()[:, 0]


def raw_items(part: Encoder, raws) -> list[Item]:
    """The items of raw samples, with slots that count their outputs through all of them."""
    out, count = [], 0
    for raw in raws:
        items = part.module.items(raw, part.cfg)
        if isinstance(items, Item) or not all(isinstance(item, Item) for item in items):
            raise ValueError(f"{part.module.__file__}: items gave {type(items).__name__}: it must be a list of Item")
        out += [item.moved(lambda slots: slots + count) for item in items]
        count += outputs(items)
    return out


def outputs(items: list[Item]) -> int:
    """How many placeholder tokens these items are for."""
    return sum(item.outputs for item in items)


def sources(cfg: OmniConfig) -> dict[str, tuple[str, str]]:
    """Of the parameters that start with published weights: the directory, and the name there."""
    out, names = {}, list(specs(cfg)) if cfg.weights else []
    for prefix, (directory, there) in cfg.weights.items():
        for name in names:
            if name.startswith(prefix) if prefix else not name.startswith(("encoders.", "projectors.", "decoders.")):
                out[name] = (directory, there + name.removeprefix(prefix))
    return out


def targets(batch: Mapping[str, Tensor], cfg: OmniConfig) -> dict[str, Tensor]:
    found = {"loss": (batch["labels"] != IGNORE).sum()}
    for name, part in cfg.decoders.items():
        of_decoder = layer_params(batch, name)
        if hasattr(part.module, "count"):
            found[name] = part.module.count(of_decoder, part.cfg)
        else:
            found[name] = (of_decoder["labels"] != IGNORE).sum()
    return found


def weights(cfg: OmniConfig) -> dict[str, float]:
    return {name: part.weight for name, part in cfg.decoders.items()}


def examples(cfg: OmniConfig, generator: torch.Generator) -> list[dict]:
    """Text alone, each encoder alone, all of them together; targets for every decoder."""
    names = list(cfg.encoders)
    together = [names] if len(names) > 1 else []
    return [_example(chosen, cfg, generator) for chosen in ([], *([name] for name in names), *together)]


def _example(names: list[str], cfg: OmniConfig, generator: torch.Generator) -> dict:
    taken = {part.placeholder for part in cfg.encoders.values()}
    free = torch.tensor([token for token in range(cfg.vocab) if token not in taken][:4096])

    def text() -> list[int]:
        n = int(torch.randint(2, 7, (), generator=generator))
        return free[torch.randint(len(free), (n,), generator=generator)].tolist()

    ids, inputs = text(), {}
    for placeholder in dict.fromkeys(cfg.encoders[name].placeholder for name in names):
        sharing = [name for name in names if cfg.encoders[name].placeholder == placeholder]
        # Encoders that share a placeholder must give equally many outputs: where chance has it otherwise in all
        # attempts, the example does not have them all.
        for _ in range(ATTEMPTS if len(sharing) > 1 else 1):
            raws = {name: cfg.encoders[name].module.example(cfg.encoders[name].cfg, generator) for name in sharing}
            counts = {name: outputs(raw_items(cfg.encoders[name], [raw])) for name, raw in raws.items()}
            if len(set(counts.values())) == 1:
                break
        inputs |= {name: [raw] for name, raw in raws.items() if counts[name] == counts[sharing[0]]}
        ids += [placeholder] * counts[sharing[0]] + text()
    inputs["input_ids"] = torch.tensor([ids])
    for name, part in cfg.decoders.items():
        fields = part.module.example(part.cfg, generator, (1, len(ids)))
        inputs |= {f"{name}.{field}": t for field, t in fields.items()}
    return inputs

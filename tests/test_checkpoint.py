"""Checkpoints: what is saved anywhere is read anywhere, bit by bit, and damage is noticed and survived."""

import errno
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftrain import checkpoint, pretrained, safetensors_io
from ftrain.checkpoint import Corrupt, latest, restore, resume, save
from ftrain.mesh import Mesh, device_mesh
from ftrain.model import find_model
from ftrain.plan import ask, find_plan, over_replicas
from ftrain.pretrained import export, init_from, load_pretrained
from ftrain.ranks import run_ranks
from ftrain.safetensors_io import read_values
from ftrain.specs import ParamSpec, normal, stored
from ftrain.state import initial, make_state, whole

HF = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 61,
    "hidden_size": 20,
    "intermediate_size": 28,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
    "tie_word_embeddings": True,
}
MODEL = find_model(HF)
META = {"sequences_seen": 40, "seed": 7, "mesh": [1, 2, 1]}
EMBED, GATES = "model.embed_tokens.weight", "model.layers.0.mlp.experts.gate_proj.weight"


def expected(kind, name, spec):
    """Distinct values for every element, so that a tensor in another's place cannot hide."""
    return initial(f"{kind} {name}", replace(spec, init=normal(1.0)), 0)


def placed(plan, sizes, replica=1, model=MODEL):
    mesh = Mesh(*sizes)
    return over_replicas(ask(find_plan(plan), model.specs, mesh), replica), device_mesh(mesh, replica, "cpu")


def filled(plan="ddp", sizes=(1, 1, 1), replica=1, step=3, model=MODEL):
    placements, mesh = placed(plan, sizes, replica, model)
    kinds = {
        kind: make_state(model.specs, placements, mesh, lambda n, s, at, kind=kind: expected(kind, n, s)[at]).params
        for kind in ("model", "mu", "nu")
    }
    state = make_state(model.specs, placements, mesh, lambda n, s, at: torch.zeros(s.shape)[at])
    return state._replace(params=kinds["model"], mu=kinds["mu"], nu=kinds["nu"], step=torch.tensor(step))


def assert_expected(state, step=3, model=MODEL):
    for kind, tensors in (("model", state.params), ("mu", state.mu), ("nu", state.nu)):
        for name, spec in model.specs.items():
            assert torch.equal(whole(tensors[name]), expected(kind, name, spec)), (kind, name)
    assert int(state.step) == step and state.step.dtype == torch.int64


def saved(out, step=3, world=1, plan="ddp", sizes=(1, 1, 1), replica=1, **options):
    run_ranks(world, lambda rank: save(out, filled(plan, sizes, replica, step), MODEL, META, **options))
    return Path(out) / "checkpoints" / f"step-{step}"


def restored(directory, world=1, plan="ddp", sizes=(1, 1, 1), replica=1, step=3, model=MODEL):
    def on_rank(rank):
        state, meta = restore(directory, model.specs, *placed(plan, sizes, replica, model))
        assert_expected(state, step, model)
        return meta

    return run_ranks(world, on_rank)


def flip(path, at=-9):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def names_in(directory):
    return sorted(path.name for path in Path(directory).iterdir())


# --- Round trips

WRITTEN = [
    ("ddp", (1, 1, 1), 1),
    ("fsdp", (3, 1, 1), 1),
    ("fsdp_sp", (2, 2, 1), 1),
    ("fsdp_ep", (1, 1, 2), 2),
    ("fsdp_sp_ep", (2, 1, 4), 1),
]
READ = [("fsdp_sp_ep", (1, 2, 2), 1), ("fsdp", (7, 1, 1), 1), ("fsdp_ep", (2, 1, 2), 1), ("ddp", (1, 1, 1), 1)]


@pytest.mark.parametrize("plan, sizes, replica", WRITTEN)
def test_saved_on_one_mesh_restored_on_others_bit_by_bit(tmp_path, plan, sizes, replica):
    world = Mesh(*sizes).size * replica
    directory = saved(tmp_path, world=world, plan=plan, sizes=sizes, replica=replica)
    for plan_b, sizes_b, replica_b in READ:
        for meta in restored(directory, Mesh(*sizes_b).size * replica_b, plan_b, sizes_b, replica_b):
            assert meta.items() >= (META | {"step": 3, "model_type": "qwen3_moe"}).items()


def test_every_rank_writes_and_file_size_is_bounded(tmp_path):
    files = checkpoint.share_out(MODEL.specs, 4)
    for kind in ("model", "mu", "nu"):
        share = [0] * 4
        for file in files:
            share[file.rank] += sum(spec.numel for spec in file.specs.values()) * (file.kind == kind)
        assert min(share) > 0 and max(share) < 2 * sum(share) / 4
    limit = 8000
    directory = saved(tmp_path, world=2, sizes=(2, 1, 1), plan="fsdp", file_bytes=limit)
    sizes = {path.name: path.stat().st_size for path in directory.rglob("*.safetensors")}
    assert len(sizes) > 6
    for file in checkpoint.share_out(MODEL.specs, 2, limit):
        if len(file.specs) > 1:
            assert sum(4 * s.numel for s in file.specs.values()) <= limit
        assert Path(file.path).name in sizes
    restored(directory)


def test_random_state_goes_on_where_it_was(tmp_path):
    torch.manual_seed(5)
    saved(tmp_path)
    wanted = torch.rand(3)
    torch.manual_seed(6)
    run_ranks(1, lambda rank: resume(tmp_path, MODEL.specs, *placed("ddp", (1, 1, 1))))
    assert torch.equal(torch.rand(3), wanted)


def test_progress_reaches_the_total(tmp_path):
    seen = []
    directory = saved(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert [d for d, _ in seen] == sorted({d for d, _ in seen}) and seen[-1][0] == seen[-1][1] > 0
    seen.clear()
    run_ranks(1, lambda rank: restore(directory, MODEL.specs, *placed("ddp", (1, 1, 1)), lambda *at: seen.append(at)))
    assert [d for d, _ in seen] == sorted({d for d, _ in seen}) and seen[-1][0] == seen[-1][1] > 0


# --- The run directory


def test_newest_first_and_only_as_many_as_kept(tmp_path):
    for step in (1, 2, 10):
        saved(tmp_path, step)
    assert [path.name for path in latest(tmp_path)] == ["step-10", "step-2", "step-1"]
    saved(tmp_path, 5, keep=2)  # a run that went back: what is newer than this step stays
    assert names_in(tmp_path / "checkpoints") == ["step-10", "step-2", "step-5"]


def test_saving_a_step_again_replaces_it(tmp_path):
    directory = saved(tmp_path)
    (directory / "stray").touch()
    before = (directory / "model.safetensors.index.json").read_bytes()
    saved(tmp_path, world=2, sizes=(2, 1, 1), plan="fsdp")
    assert before != (directory / "model.safetensors.index.json").read_bytes() and not (directory / "stray").exists()
    assert names_in(tmp_path / "checkpoints") == ["step-3"]
    restored(directory)


def test_what_a_killed_save_leaves_is_removed_and_what_it_moved_comes_back(tmp_path):
    directory = saved(tmp_path)
    unfinished = tmp_path / "checkpoints" / "step-4.tmp-12345678"
    unfinished.mkdir()
    (unfinished / "model-00001-of-00001.safetensors").write_bytes(b"half")
    directory.rename(tmp_path / "checkpoints" / "step-3.old-12345678")  # killed between the two renames
    assert latest(tmp_path) == []
    run_ranks(1, lambda rank: resume(tmp_path, MODEL.specs, *placed("ddp", (1, 1, 1))))
    assert names_in(tmp_path / "checkpoints") == ["step-3"]
    restored(directory)


def test_a_directory_is_visible_only_when_complete(tmp_path, monkeypatch):
    """At every rename and at every write: either no step-4, or a whole one."""
    saved(tmp_path, 3)
    rename, write = Path.rename, safetensors_io.write_file
    seen = []

    def look():
        visible = names_in(tmp_path / "checkpoints")
        seen.append(visible)
        assert "step-3" in visible and "step-4" not in visible

    monkeypatch.setattr(Path, "rename", lambda self, to: (look(), rename(self, to))[1])
    monkeypatch.setattr(checkpoint, "write_file", lambda *a: (look(), write(*a))[1])
    saved(tmp_path, 4)
    assert len(seen) == 4
    restored(tmp_path / "checkpoints" / "step-4", step=4)


# --- Damage


@pytest.mark.parametrize("pattern", ["model-*.safetensors", "train_state/nu-*.safetensors", "train_state/*state.json",
                                     "model.safetensors.index.json", "train_state/manifest.json"])  # fmt: skip
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named_and_the_checkpoint_before_is_taken(tmp_path, pattern, damage):
    saved(tmp_path, 1)
    directory = saved(tmp_path, 2, 2, "fsdp", (2, 1, 1))
    path = sorted(directory.glob(pattern))[-1]
    if damage == "flip":
        flip(path)
    elif damage == "truncate":
        os.truncate(path, path.stat().st_size - 5)
    else:
        path.unlink()
    with pytest.raises(Corrupt, match=re.escape(str(path))):
        restored(directory, 2, "fsdp", (2, 1, 1), step=2)
    warned = []

    def on_rank(rank):
        state, meta, used = resume(tmp_path, MODEL.specs, *placed("fsdp", (3, 1, 1)), warn=warned.append)
        assert_expected(state, 1)
        assert meta["step"] == 1 and used.name == "step-1"

    run_ranks(3, on_rank)
    assert len(warned) == 3 and all(str(path) in sentence for sentence in warned)


def test_no_whole_checkpoint_left_is_an_error(tmp_path):
    flip(next(saved(tmp_path).glob("model-*.safetensors")))
    with pytest.raises(Corrupt, match="no whole checkpoint is left"):
        run_ranks(2, lambda rank: resume(tmp_path, MODEL.specs, *placed("fsdp", (2, 1, 1))))
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        run_ranks(2, lambda rank: resume(tmp_path / "other", MODEL.specs, *placed("fsdp", (2, 1, 1))))


def test_a_checkpoint_of_another_model_lists_all_differences_and_is_not_passed_over(tmp_path):
    saved(tmp_path, 1)
    saved(tmp_path, 2)
    other = find_model(HF | {"vocab_size": 64, "num_hidden_layers": 3, "mlp_only_layers": [0, 2]})
    with pytest.raises(ValueError) as caught:
        run_ranks(2, lambda rank: resume(tmp_path, other.specs, *placed("fsdp", (2, 1, 1), model=other)))
    text = str(caught.value)
    assert not isinstance(caught.value, Corrupt) and "step-2" in text
    assert "embed_tokens.weight is [61, 20] instead of [64, 20]" in text
    assert "27 missing: model.layers.0.mlp.gate_proj.weight [28, 20], " in text and "and 7 more; 16 extra: " in text


@pytest.mark.parametrize("failing", [0, 2])
def test_full_disk_on_one_rank_fails_all_and_leaves_what_was_there(tmp_path, monkeypatch, failing):
    saved(tmp_path, 1, 4, "fsdp", (4, 1, 1))
    write = safetensors_io.write_file
    file = next(f.path for f in checkpoint.share_out(MODEL.specs, 4) if f.rank == failing and f.kind == "mu")

    def full(path, layout, tensors):
        if str(path).endswith(file):
            next(iter(tensors))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, layout, tensors)

    monkeypatch.setattr(checkpoint, "write_file", full)

    def on_rank(rank):
        with pytest.raises(OSError) as caught:
            save(tmp_path, filled("fsdp", (4, 1, 1), step=2), MODEL, META)
        return str(caught.value)

    sentences = run_ranks(4, on_rank)
    assert len(set(sentences)) == 1
    where = re.escape(str(tmp_path / "checkpoints" / "step-2"))
    wanted = rf"cannot write {where}: No space left on device \(it needs [\d.]+ MB, \S+ .B are free\)"
    assert re.fullmatch(wanted, sentences[0])
    assert names_in(tmp_path / "checkpoints") == ["step-1"]
    monkeypatch.undo()
    restored(tmp_path / "checkpoints" / "step-1", step=1)


@pytest.mark.parametrize("function", ["write_manifest", "swap_in"])
def test_failure_of_the_last_acts_leaves_what_was_there(tmp_path, monkeypatch, function):
    directory = saved(tmp_path)

    def fail(*args):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(checkpoint, function, fail)
    with pytest.raises(OSError, match=r"cannot write .*step-3: .*quota.*it needs"):
        saved(tmp_path, world=2, plan="fsdp", sizes=(2, 1, 1))
    assert names_in(tmp_path / "checkpoints") == ["step-3"]
    restored(directory)


def test_a_run_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write .*file/checkpoints/step-3: Not a directory"):
        saved(tmp_path / "file", world=2, plan="fsdp", sizes=(2, 1, 1))


# --- Hugging Face directories


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


def test_missing_extra_and_misshaped_tensors_are_all_listed(tmp_path):
    transformers_model(tmp_path)
    tensors = content(tmp_path)
    part = "model.layers.0.mlp.experts.2.down_proj.weight"
    del tensors["model.norm.weight"], tensors[part]
    tensors[EMBED] = tensors[EMBED][:-1].clone()
    tensors["model.layers.1.mlp.gate_proj.weight"] = torch.zeros(28, 20, dtype=torch.int64)
    tensors |= {f"vision.{i}": torch.zeros(1) for i in range(25)}
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4), "lm_head.weight": torch.zeros(61, 20)}
    save_file(tensors, tmp_path / "model.safetensors")
    sentence = (
        f"2 missing: {part} [20, 12], model.norm.weight [20]; 25 extra: vision.0,",
        "and 5 more; ",
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
    for module in (checkpoint, pretrained, safetensors_io):
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

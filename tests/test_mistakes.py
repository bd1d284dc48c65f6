"""What users get wrong, through the command line: one sentence on stderr, exit status 2, and nothing lost."""

import json
import os
import shutil
import subprocess
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import command, environment, steps, tensors, write_model, write_text
from safetensors.torch import load_file, save_file

from ftrain import __main__ as cli
from ftrain import launch
from ftrain.model import families

NORM = "model.norm.weight"  # [32]


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    root = tmp_path_factory.mktemp("mistakes")
    flags = {
        "model": write_model(root / "tiny"), "data": write_text(root / "text.jsonl", 10), "out": root / "out",
        "nproc": 1, "steps": 2, "compile": "off", "seq_len": 32, "batch_size": 4, "eval_batches": 1,
    }  # fmt: skip
    return SimpleNamespace(root=root, flags=flags, cache=root / "cache")


@pytest.fixture
def run(ground, capsys, monkeypatch):
    """Flags -> (exit status, stderr) of a run on one process, this one."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "FTRAIN_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(ground.cache))
    monkeypatch.setattr(launch, "accelerator", lambda: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(**more) -> tuple[int, str]:
        try:
            status = cli.main(command(**ground.flags | more)[3:])
        except SystemExit as error:
            status = error.code
        return status, capsys.readouterr().err

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def trained(ground, run):
    """A run directory with a whole checkpoint, which the test may damage."""
    first = ground.root / "trained"
    if not first.exists():
        assert run(out=first) == (0, "")
    shutil.rmtree(ground.flags["out"], ignore_errors=True)
    return Path(shutil.copytree(first, ground.flags["out"]))


def write(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content)
    return folder / name


def test_names(run):
    plans = "ddp, fsdp, fsdp_ep, fsdp_sp, fsdp_sp_ep, or FILE.py:FUNCTION"
    said = f"error: --plan fsdp_sp_epp: no such plan; did you mean fsdp_sp_ep? (plans: {plans})\n"
    assert run(plan="fsdp_sp_epp") == (2, said)
    said = "error: model 'qwen3-moe-tiney' is neither a directory nor a preset; did you mean qwen3-moe-tiny?\n"
    assert run(model="qwen3-moe-tiney") == (2, said)
    status, err = run(batch_sise=3)
    assert status == 2 and "Perhaps you meant" in err and "--batch-size INT" in err and "Traceback" not in err


def test_mesh(run):
    said = (
        "error: mesh fsdp 2 x sp 1 x ep 1 = 2 ranks, but the world size is 1: the dimensions must multiply to the "
        "world size (use --nproc 2, or -1 for one dimension)\n"
    )
    assert run(mesh_fsdp=2) == (2, said)


SIZES = ("steps", "seq_len", "batch_size", "accumulate", "nproc", "eval_batches", "log_every")


@pytest.mark.parametrize("size", [0, -3])
@pytest.mark.parametrize("name", SIZES)
def test_sizes(run, name, size):
    assert run(**{name: size}) == (2, f"error: --{name.replace('_', '-')} {size}: must be at least 1\n")


@pytest.mark.parametrize("size", [0, -3])
@pytest.mark.parametrize("axis", ["fsdp", "sp", "ep"])
def test_mesh_sizes(run, axis, size):
    said = f"error: --mesh.{axis} {size}: must be a positive size, or -1 to infer it\n"
    assert run(**{f"mesh_{axis}": size}) == (2, said)


def test_data(ground, run):
    assert run(data="nowhere.txt") == (2, "error: --data nowhere.txt: no such file or directory\n")
    file = write(ground.root, "empty.txt", "")
    expected = 'expected UTF-8 text, or JSONL with a "text" field per line'
    assert run(data=file) == (2, f"error: --data {file}: the file is empty; {expected}\n")
    file = write(ground.root, "blank.jsonl", '{"text": ""}\n')
    assert run(data=file) == (2, f"error: --data {file}: every document is empty; nothing to train on\n")
    file = write(ground.root, "torn.jsonl", '{"text": "one"}\n\n{"text": "three"\n')
    reason = "not valid JSON (Expecting ',' delimiter at column 17)"
    expected = 'expected an object with a "text" string on each line'
    assert run(data=file) == (2, f"error: {file}, line 3: {reason}; {expected}\n")
    file = write(ground.root, "short.txt", "hello")
    status, err = run(data=file)
    assert status == 2 and err.startswith(f"error: --data {file}: too little text, ") and err.count("\n") == 1


def test_config(ground, run):
    folder = ground.root / "config"
    folder.mkdir()
    file = folder / "config.json"
    said = f"error: {file} does not exist: a model's directory holds a config.json\n"
    assert run(model=folder) == (2, said)
    write(folder, "config.json", '{"model_type": "qwen3_moe",')
    status, err = run(model=folder)
    assert status == 2 and err.startswith(f"error: {file}: not valid JSON (") and err.count("\n") == 1
    known = f"supported are {', '.join(sorted(families()))}"
    assert run(model=write_model(ground.root / "t5", model_type="t5")) == (
        2, f"error: {ground.root / 't5' / 'config.json'}: model_type 't5' is not supported: {known}\n",
    )  # fmt: skip
    assert run(model=write_model(ground.root / "negative", hidden_size=-1)) == (
        2, f"error: {ground.root / 'negative' / 'config.json'}: hidden_size = -1 in the model config: "
        "it must be a positive integer\n",
    )  # fmt: skip


# --- Weights


def damaged(checkpoint: Path, folder: Path, change) -> Path:
    """A copy of a checkpoint's model, its tensors changed in place by `change`."""
    shutil.copytree(checkpoint, folder)
    (folder / "model.safetensors.index.json").unlink()  # else what it does not list is not looked at
    (file,) = folder.glob("model-*.safetensors")
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def test_weights_that_are_not_the_models(run, trained, tmp_path):
    checkpoint = trained / "checkpoints" / "step-2"

    def change(weights):
        del weights["lm_head.weight"]
        weights[NORM] = torch.ones(31)
        weights["visual.bias"] = torch.ones(3)

    status, err = run(init=damaged(checkpoint, tmp_path / "w", change), out=tmp_path / "out")
    assert status == 2 and err.count("\n") == 1
    assert err.startswith(f"error: the tensors in {tmp_path / 'w'} are not those of the model: ")
    for said in ("1 missing: lm_head.weight [512, 32]", "1 mis-shaped: model.norm.weight is [31] instead of [32]",
                 "1 extra: visual.bias"):  # fmt: skip
        assert said in err
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_weights_that_are_truncated(run, trained, tmp_path):
    folder = damaged(trained / "checkpoints" / "step-2", tmp_path / "w", lambda weights: None)
    (file,) = folder.glob("model-*.safetensors")
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2])
    reason = f"its header describes {len(raw)} bytes, the file has {len(raw) // 2}"
    said = f"error: {file} is truncated, corrupt or not a safetensors file ({reason})\n"
    assert run(init=folder, out=tmp_path / "out") == (2, said)


def test_weights_that_are_not_there(run, tmp_path):
    assert run(init="nowhere") == (2, "error: --init nowhere: must be a directory with Hugging Face weights\n")
    said = f"error: {tmp_path} holds no *.safetensors files: only safetensors weights are read\n"
    assert run(init=tmp_path, out=tmp_path / "out") == (2, said)


# --- Training that goes wrong


def test_nan_in_the_first_step(run, trained, tmp_path):
    def change(weights):
        weights[NORM][0] = torch.nan

    folder = damaged(trained / "checkpoints" / "step-2", tmp_path / "w", change)
    status, err = run(init=folder, out=tmp_path / "out", warmup=0)
    assert (status, err) == (
        2, "error: the loss is nan and the gradient norm nan at step 1 (lr 1.00e-03): the update was not made, and "
        "there was none before it to be saved; try a smaller --lr, a longer --warmup, or other data\n",
    )  # fmt: skip
    assert not (tmp_path / "out" / "checkpoints").exists()  # a NaN is nothing to go on from


def test_nan_later_leaves_the_last_good_step(run, trained):
    before = tensors(trained / "checkpoints" / "step-2")
    # Step 3 is made with a learning rate that step 4's loss does not survive.
    status, err = run(out=trained, steps=6, lr=1e30, save_every=0)
    assert status == 2 and err.count("\n") == 1
    assert err.startswith("error: the loss is ") and " at step 4 (lr " in err
    assert f": the update was not made, and step 3 is saved in {trained}; try a smaller --lr" in err
    assert [entry["step"] for entry in steps(trained)] == [1, 2, 3]
    after = tensors(trained / "checkpoints" / "step-3")
    assert all(tensor.isfinite().all() for tensor in after.values())
    still = tensors(trained / "checkpoints" / "step-2")
    assert all(torch.equal(still[name], before[name]) for name in before)
    state = json.loads((trained / "checkpoints" / "step-3" / "train_state" / "train_state.json").read_text())
    assert (state["step"], state["sequences"]) == (3, 12)


# --- The run directory


@pytest.mark.parametrize("flag", ["data", "init", "plan"])
def test_overwrite_with_another_mistake_loses_nothing(run, trained, tmp_path, flag):
    wrong = str(tmp_path / "nowhere")
    if flag == "init":
        os.mkdir(wrong)  # it is there, but has no weights
    status, err = run(out=trained, overwrite=True, **{flag: wrong})
    assert status == 2 and wrong in err
    assert tensors(trained / "checkpoints" / "step-2") and len(steps(trained)) == 2
    assert (trained / "run.json").exists()


def test_overwrite_begins_anew(run, trained):
    assert run(out=trained, steps=1, overwrite=True) == (0, "")
    assert [path.name for path in (trained / "checkpoints").iterdir()] == ["step-1"]
    assert [entry["step"] for entry in steps(trained)] == [1]


@pytest.mark.parametrize("flag", ["init", "model"])
def test_what_a_run_starts_from_is_not_deleted(run, trained, flag):
    start = trained / "checkpoints" / "step-2"
    status, err = run(out=trained, steps=1, overwrite=True, **{flag: start})
    assert status == 2 and err.startswith(f"error: --{flag} {start} is a checkpoint of --out {trained}")
    assert tensors(start)


def test_resume_never_is_held_to(run, trained):
    said = f"error: --resume never: {trained} holds checkpoints; give another --out, or --overwrite\n"
    assert run(out=trained, resume="never") == (2, said)


def test_other_data_on_a_resume_is_said(run, trained, ground, capsys):
    other = write_text(ground.root / "other.jsonl", 12)
    for data, said in ((ground.flags["data"], False), (other, True)):
        capsys.readouterr()
        assert cli.main(command(**ground.flags | {"out": trained, "steps": 3 + said, "data": data})[3:]) == 0
        warned = "warning: the text or its tokenizer is not that of the checkpoint's run" in capsys.readouterr().out
        assert warned == said


def test_another_length_on_a_resume_is_said(run, trained, ground, capsys):
    for length, said in ((ground.flags["seq_len"], False), (ground.flags["seq_len"] // 2, True)):
        capsys.readouterr()
        assert cli.main(command(**ground.flags | {"out": trained, "steps": 3 + said, "seq_len": length})[3:]) == 0
        assert (f"warning: --seq-len {length}, but the checkpoint's run had 32" in capsys.readouterr().out) == said


def test_a_later_checkpoint_of_another_past_is_said(run, trained, ground, capsys):
    shutil.copytree(trained / "checkpoints" / "step-2", ground.root / "step-2", dirs_exist_ok=True)
    assert run(out=trained, steps=4) == (0, "")
    for more, said in (({"out": trained}, True), ({"out": ground.root / "elsewhere"}, False)):
        argv = command(**ground.flags | {"resume": ground.root / "step-2", "steps": 3} | more)[3:]
        assert cli.main(argv) == 0
        out = capsys.readouterr().out
        assert (f"warning: {trained / 'checkpoints' / 'step-4'} is later than where this run starts" in out) == said


def test_a_corrupt_checkpoint_is_named(run, trained):
    file = trained / "checkpoints" / "step-2" / "train_state" / "mu-00001-of-00001.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 5)
    status, err = run(out=trained, steps=3)
    assert status == 2 and err == (
        f"error: {file} is truncated or corrupt: it has {size - 5} bytes, {size} were written; "
        f"no whole checkpoint is left in {trained / 'checkpoints'}\n"
    )


# --- Several ranks: said once, and all end


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, said",
    [
        ({"mesh_sp": 2, "model": {"num_attention_heads": 3, "num_key_value_heads": 1}},
         "3 attention heads are not divisible by sp 2: valid sizes of --mesh.sp are [1, 3]"),
        ({"mesh_ep": 2, "model": {"num_experts": 3}}, "3 experts are not divisible by ep 2 ("),
        ({"data": "nowhere.txt"}, "--data nowhere.txt: no such file or directory"),
        ({"mesh_ep": 2, "lr": 1e30, "steps": 6, "warmup": 0}, "the loss is "),
    ],
    ids=["heads", "experts", "data", "nan"],
)  # fmt: skip
def test_mistakes_on_two_ranks(ground, tmp_path, flags, said):
    if "model" in flags:
        flags = flags | {"model": write_model(tmp_path / "model", **flags["model"])}
    mark = uuid.uuid4().hex
    env = environment(ground.cache) | {"MISTAKES": mark}
    argv = command(**ground.flags | {"nproc": 2, "out": tmp_path / "out"} | flags)
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1
    assert "error" not in done.stdout and "Traceback" not in done.stdout
    assert not _marked(mark)


def _marked(mark: str) -> list[Path]:
    """Processes that have it in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(path)
        except OSError:
            pass
    return found

"""Checkpoints: what is saved anywhere is read anywhere, bit by bit, and damage is noticed and survived."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import HF, META, MODEL, assert_expected, filled, flip, names_in, placed, restored, saved

from ftrain import checkpoint, disk, safetensors_io
from ftrain.checkpoint import Corrupt, latest, resume, save
from ftrain.mesh import Mesh
from ftrain.model import find_model
from ftrain.ranks import run_ranks

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
    files = checkpoint.share_out(checkpoint.kinds(MODEL.specs), 4)
    for kind in ("model", "mu", "nu"):
        share = [0] * 4
        for file in files:
            share[file.rank] += sum(spec.numel for spec in file.specs.values()) * (file.kind == kind)
        assert min(share) > 0 and max(share) < 2 * sum(share) / 4
    limit = 8000
    directory = saved(tmp_path, world=2, sizes=(2, 1, 1), plan="fsdp", file_bytes=limit)
    sizes = {path.name: path.stat().st_size for path in directory.rglob("*.safetensors")}
    assert len(sizes) > 6
    for file in checkpoint.share_out(checkpoint.kinds(MODEL.specs), 2, limit):
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
    unfinished.mkdir()
    saved(tmp_path, 5)  # a run that does not resume tidies too
    assert names_in(tmp_path / "checkpoints") == ["step-3", "step-5"]


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from ftrain import checkpoint
from checkpoints import saved

saved({out!r}, 1)
real, calls = checkpoint.{function}, []

def die(*args):
    calls.append(args)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)

checkpoint.{function} = die
saved({out!r}, 2)
"""


@pytest.mark.parametrize("function, call", [("write_file", 2), ("swap_in", 1)])
def test_kill_9_during_a_save(tmp_path, function, call):
    code = KILLED.format(tests=str(Path(__file__).parent), out=str(tmp_path), function=function, call=call)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    left = names_in(tmp_path / "checkpoints")
    assert len(left) == 2 and left[0] == "step-1" and left[1].startswith("step-2.tmp-")

    def on_rank(rank):
        state, _, directory = resume(tmp_path, MODEL.specs, *placed("fsdp", (2, 1, 1)))
        assert_expected(state, 1)
        save(tmp_path, state._replace(step=torch.tensor(2)), MODEL, META)

    run_ranks(2, on_rank)
    assert names_in(tmp_path / "checkpoints") == ["step-1", "step-2"]


def test_a_directory_is_visible_only_when_complete(tmp_path, monkeypatch):
    """Nothing of step-4 is seen until all of it is written and synced; then it is whole."""
    saved(tmp_path, 3)
    acts = []

    def noted(owner, name):
        real = getattr(owner, name)

        def act(*args):
            visible = names_in(tmp_path / "checkpoints")
            assert "step-3" in visible and "step-4" not in visible
            acts.append(name)
            return real(*args)

        monkeypatch.setattr(owner, name, act)

    noted(checkpoint, "write_file")
    noted(disk, "sync_tree")
    noted(Path, "rename")
    saved(tmp_path, 4)
    assert acts == ["write_file"] * 3 + ["sync_tree", "rename"]
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


def test_a_checkpoint_of_another_model_names_the_differences_and_is_not_passed_over(tmp_path):
    saved(tmp_path, 1)
    saved(tmp_path, 2)
    other = find_model(HF | {"vocab_size": 64, "num_hidden_layers": 3, "mlp_only_layers": [0, 2]})
    with pytest.raises(ValueError) as caught:
        run_ranks(2, lambda rank: resume(tmp_path, other.specs, *placed("fsdp", (2, 1, 1), model=other)))
    text = str(caught.value)
    assert not isinstance(caught.value, Corrupt) and "step-2" in text
    assert "embed_tokens.weight is [61, 20] instead of [64, 20]" in text
    assert "27 missing: model.layers.0.mlp.gate_proj.weight [28, 20], " in text and "and 24 more; 16 extra: " in text


@pytest.mark.parametrize("failing", [0, 2])
def test_full_disk_on_one_rank_fails_all_and_leaves_what_was_there(tmp_path, monkeypatch, failing):
    saved(tmp_path, 1, 4, "fsdp", (4, 1, 1))
    write = safetensors_io.write_file
    file = next(f.path for f in checkpoint.share_out(checkpoint.kinds(MODEL.specs), 4) if f.rank == failing and f.kind == "mu")

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

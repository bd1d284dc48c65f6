"""Whole runs as a user makes them: the same training on every mesh, and across every interruption.

Round-off, as measured, and what is allowed: 2e-7 of a loss (1e-6), 3e-6 of a gradient norm, 4e-7 of a
parameter and 4e-6 of a moment, as fractions of the tensor's largest element (2e-5, 2e-6, 2e-5). What is lost,
doubled or shifted is larger by orders of magnitude: AdamW's eps has the gradients' size here, so that neither
round-off is blown up nor a gradient's scale divided away.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import command, environment, series, start, steps, tensors, write_model, write_text

from ftrain import __main__ as cli
from ftrain.data import heldout_batches, prepare
from ftrain.records import read

LOSS, NORM, PARAMETER, MOMENT = 1e-6, 2e-5, 2e-6, 2e-5
KEYS = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "mfu", "peak_memory_bytes", "step_time_s",
        "router_aux_loss", "router_z_loss", "expert_load_max", "expert_load_min"}  # fmt: skip
EP2 = {"nproc": 2, "mesh_fsdp": 1, "mesh_ep": 2}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """`run(name, **flags)` trains in a directory of that name, and returns it."""
    root = tmp_path_factory.mktemp("runs")
    env = environment(root / "cache")
    flags = {
        "model": write_model(root / "tiny"), "data": write_text(root / "text.jsonl"), "plan": "fsdp_sp_ep",
        "precision": "fp32", "compile": "off", "nproc": 1, "seq_len": 64, "batch_size": 4, "eval_batches": 2,
        "save_every": 5, "warmup": 2, "lr": 3e-3, "eps": 1e-3, "clip": 0.5, "router_z_loss": 0.01,
    }  # fmt: skip

    def attempt(out: Path, limit=None, **more) -> subprocess.CompletedProcess:
        argv = command(**flags | {"out": out} | more)
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=500, preexec_fn=limit)

    def run(name: str, **more) -> Path:
        done = attempt(root / name, **more)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ""
        return root / name

    return SimpleNamespace(root=root, env=env, flags=flags, attempt=attempt, run=run)


# --- The same training on every mesh

TWENTY = {"steps": 20, "compile": "aot_eager", "schedule": "constant"}


@pytest.fixture(scope="module")
def one(ground):
    return ground.run("one", **TWENTY)


def assert_same_training(out, reference, at):
    a, b = series(out), series(reference)[:at]
    assert a.shape == b.shape == (at, 2)
    assert (((a - b) / b).abs() < torch.tensor([LOSS, NORM])).all()
    a, b = (tensors(directory / "checkpoints" / f"step-{at}") for directory in (out, reference))
    assert a.keys() == b.keys() and any(name.startswith("nu ") for name in a)
    for name in a:
        difference = (a[name] - b[name]).abs().max() / b[name].abs().max()
        assert difference < (MOMENT if " " in name else PARAMETER), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, flags",
    [
        ("fsdp2", {"nproc": 2, "mesh_fsdp": 2}),
        ("sp2", {"nproc": 2, "mesh_fsdp": 1, "mesh_sp": 2}),
        ("ep2", EP2),
        ("sp2-ep2", {"nproc": 4, "mesh_fsdp": 1, "mesh_sp": 2, "mesh_ep": 2}),
        ("fsdp2-ep2", {"nproc": 4, "mesh_fsdp": 2, "mesh_ep": 2}),
        ("replica2", {"nproc": 2, "mesh_replica": 2, "mesh_fsdp": 1, "plan": "fsdp"}),
        ("accumulate2", {"accumulate": 2}),
        ("remat", {"remat": "full"}),
    ],
)
def test_every_mesh_trains_alike(ground, one, name, flags):
    assert_same_training(ground.run(name, **TWENTY | flags), one, 20)


@pytest.mark.slow
def test_inductor_trains_alike(ground, one):
    assert_same_training(ground.run("inductor", **TWENTY | {"compile": "inductor", "steps": 5}), one, 5)


def test_the_training_learns(one):
    losses = series(one)[:, 0]
    assert losses[-3:].mean() < losses[:3].mean() - 0.1


# --- Records


def test_metrics_of_every_step(one):
    entries = steps(one)
    assert all(entry.keys() == KEYS for entry in entries)
    assert all(entry["tokens"] == 4 * 64 and entry["step_time_s"] > 0 and entry["lr"] > 0 for entry in entries)
    heldout = {entry["step"]: entry["heldout_loss"] for entry in read(one / "metrics.jsonl") if "heldout_loss" in entry}
    assert heldout.keys() == {0, 20} and heldout[20] < heldout[0]


def test_tensorboard_has_the_same_numbers(one):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(one / "tensorboard")).Reload()
    for name in ("loss", "grad_norm"):
        seen = [(event.step, event.value) for event in events.Scalars(name)]
        assert seen == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in steps(one)]


def test_run_json_makes_the_same_run_again(ground, one):
    argv = command(config=one / "run.json", out=ground.root / "again")
    done = subprocess.run(argv, env=ground.env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert torch.equal(series(ground.root / "again"), series(one))
    written = [json.loads((out / "run.json").read_text()) for out in (one, ground.root / "again")]
    assert written[0].pop("out") != written[1].pop("out") and written[0] == written[1]


# --- The checkpoint is the model that was trained


def transformers_loss(directory: Path, data) -> float:
    """The held-out loss, with every document of a row as a sequence of its own."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for batch in heldout_batches(data.heldout, 4, 2):
        for ids, labels, segments in zip(batch["input_ids"], batch["labels"], batch["segment_ids"], strict=True):
            for segment in segments[segments >= 0].unique():
                here = segments == segment
                with torch.no_grad():
                    logits = model(input_ids=ids[here][None]).logits[0]
                total += float(torch.nn.functional.cross_entropy(logits, labels[here], reduction="sum"))
                count += int((labels[here] != -100).sum())
    return total / count


def test_transformers_has_the_held_out_loss_that_was_printed(ground, one, tmp_path, capsys):
    from transformers import AutoTokenizer

    directory, flags = one / "checkpoints" / "step-20", ground.flags
    data = prepare(flags["data"], flags["model"], 512, 64, ground.root / "cache" / "ftrain")
    recorded = [entry["heldout_loss"] for entry in read(one / "metrics.jsonl") if "heldout_loss" in entry][-1]
    assert transformers_loss(directory, data) == pytest.approx(recorded, rel=1e-6)

    assert cli.main(["export", str(directory), str(tmp_path / "export")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'export'}\n"
    assert not (tmp_path / "export" / "train_state").exists()
    assert transformers_loss(tmp_path / "export", data) == pytest.approx(recorded, rel=1e-6)

    document = data.heldout.ids[: data.heldout.ends[0] - 1].tolist()
    for folder in (directory, tmp_path / "export"):
        opened = AutoTokenizer.from_pretrained(folder)
        assert opened(opened.decode(document))["input_ids"] == document
        assert opened.eos_token_id == data.heldout.ids[data.heldout.ends[0] - 1]


# --- Interruptions

FORTY = {"steps": 40}


def read_until(process: subprocess.Popen, said: str) -> str:
    """The run's output so far. It cannot go far beyond: what it says next waits in a pipe of one page."""
    lines = []
    while not lines or not lines[-1].startswith(said):
        lines.append(process.stdout.readline().decode())
        assert lines[-1], "".join(lines)
    return "".join(lines)


def end(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def stop_in_training(ground, name, **flags) -> Path:
    """A run that was killed after its seventh step, two after its first checkpoint."""
    process = start(ground.env, **ground.flags | FORTY | flags | {"out": ground.root / name})
    try:
        read_until(process, "step  7/40")
    finally:
        end(process)
    until = time.monotonic() + 20  # ranks of their own end with their launcher, a moment later
    while _writers(ground.root / name) and time.monotonic() < until:
        time.sleep(0.1)
    assert "step-5" in checkpoints(ground.root / name) and "step-40" not in checkpoints(ground.root / name)
    return ground.root / name


def _writers(out: Path) -> list[str]:
    """Processes with this directory on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(out).encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
        except OSError:
            pass
    return found


def assert_identical(out: Path, reference: Path) -> None:
    """Bit by bit: losses, gradient norms, and everything in the last checkpoint."""
    assert torch.equal(series(out), series(reference))
    a, b = (tensors(directory / "checkpoints" / "step-40") for directory in (out, reference))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def undisturbed(ground):
    return ground.run("undisturbed", **FORTY)


@pytest.fixture(scope="module")
def stopped(ground):
    return stop_in_training(ground, "stopped")


def test_killed_in_training_goes_on_bit_by_bit(ground, undisturbed, stopped):
    shutil.copytree(stopped, ground.root / "resumed")
    assert len(steps(ground.root / "resumed")) >= 7
    assert_identical(ground.run("resumed", **FORTY), undisturbed)


@pytest.mark.slow
def test_killed_ranks_go_on_bit_by_bit(ground):
    reference = ground.run("undisturbed-ep2", **FORTY | EP2)
    stop_in_training(ground, "stopped-ep2", **EP2)
    assert_identical(ground.run("stopped-ep2", **FORTY | EP2), reference)


@pytest.mark.slow
def test_goes_on_under_another_plan_on_another_mesh(ground, undisturbed, stopped):
    shutil.copytree(stopped, ground.root / "moved")
    flags = {"nproc": 2, "plan": "fsdp_sp", "mesh_fsdp": 1, "mesh_sp": 2}
    assert_same_training(ground.run("moved", **FORTY | flags), undisturbed, 40)


def test_killed_in_a_save_goes_on_from_the_checkpoint_before(ground, undisturbed):
    out = ground.root / "killed-in-a-save"
    process = start(ground.env, **ground.flags | FORTY | {"out": out})

    def unfinished() -> list[Path]:
        return list((out / "checkpoints").glob("step-*.tmp-*"))

    try:
        read_until(process, "saving checkpoint step-5: ")
        os.set_blocking(process.stdout.fileno(), False)
        while True:
            while not unfinished():
                process.stdout.read()
                assert process.poll() is None, "no save was met"
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            if unfinished():  # else that save was over sooner: wait for the next
                break
            process.send_signal(signal.SIGCONT)
    finally:
        end(process)
    (left,) = unfinished()
    assert left.name.partition(".")[0] not in checkpoints(out)
    last = max(int(name.removeprefix("step-")) for name in checkpoints(out) if "." not in name)
    done = ground.attempt(out, **FORTY)
    assert done.returncode == 0, done.stderr
    assert f"resuming from {out / 'checkpoints' / f'step-{last}'}\n" in done.stdout
    assert_identical(out, undisturbed)
    assert not any("." in name for name in checkpoints(out))


@contextmanager
def small_files(out: Path):
    """No file may be as large as the parameters: a disk that fills up while the checkpoint is written."""
    limits = (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    yield partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits), "File too large", lambda: None


@contextmanager
def small_disk(out: Path):
    """`out` on a file system with room for half a checkpoint more."""
    held = out.with_name("held")
    out.rename(held)
    out.mkdir()
    size = sum(-(-path.stat().st_size // 4096) * 4096 for path in held.rglob("*")) + 400_000

    def mount(*options: str) -> bool:
        argv = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(out)]
        return subprocess.run(argv, capture_output=True).returncode == 0

    if not shutil.which("mount") or not mount(f"size={size}"):
        pytest.skip("mounting a small disk needs root")
    try:
        shutil.copytree(held, out, dirs_exist_ok=True)
        yield None, "No space left on device", lambda: mount("remount", "size=64m")
    finally:
        subprocess.run(["umount", str(out)])


@pytest.mark.parametrize("full", [small_files, small_disk])
def test_full_disk_while_saving(ground, undisturbed, stopped, full):
    out = ground.root / full.__name__
    shutil.copytree(stopped, out)
    for name in checkpoints(out):
        if name != "step-5":
            shutil.rmtree(out / "checkpoints" / name)
    with full(out) as (limit, reason, make_room):
        done = ground.attempt(out, limit, **FORTY)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: cannot write {out / 'checkpoints' / 'step-10'}: {reason} (it needs ")
        assert done.stderr.count("\n") == 1
        assert checkpoints(out) == ["step-5"]
        make_room()
        done = ground.attempt(out, **FORTY)
        assert done.returncode == 0, done.stderr
        assert f"resuming from {out / 'checkpoints' / 'step-5'}\n" in done.stdout
        assert_identical(out, undisturbed)

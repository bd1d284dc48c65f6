"""From one command to the ranks of a job: real processes, a tiny entry."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ftrain import launch

ENTRY = """
import os, sys, time
from types import SimpleNamespace
from ftrain import config, launch

def entry(cfg):
    place = launch.init()
    try:
        work(sys.argv[1], *place)
    finally:
        launch.finish()

def work(what, rank, world, local_rank, device):
    import torch, torch.distributed as dist
    total = torch.full((1,), rank + 1.0, device=device)
    dist.all_reduce(total)
    os.write(1, f"rank {rank} of {world} on {device.type}: {total.item():g} pid {os.getpid()} "
                f"threads {os.environ.get('OMP_NUM_THREADS')}\\n".encode())
    if what == "sleep":
        time.sleep(120)
    if rank == world - 1:
        if what == "mistake":
            raise ValueError("--seq-len 7: must be even")
        if what == "fault":
            raise RuntimeError("broken")
        if what == "killed":
            os.kill(os.getpid(), 9)
    if what != "ok":
        dist.all_reduce(total)  # the last rank never comes

cfg = SimpleNamespace(nproc=int(sys.argv[2]), mesh=config.MeshConfig())
sys.exit(launch.launch(entry, cfg, [sys.executable, *sys.argv]))
"""


def test_how_threads_wait_is_the_users_to_say():
    env = {"OMP_NUM_THREADS": "2"}
    launch.thread_defaults(env)
    assert env == {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
    env = {"OMP_WAIT_POLICY": "ACTIVE"}
    launch.thread_defaults(env)
    assert env == {"OMP_WAIT_POLICY": "ACTIVE"}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep no such count")
def test_peak_memory_is_not_that_of_what_the_process_was_before():
    """A program that replaces a larger one, as a rank replaces a fork of its launcher."""
    then = "import torch; from ftrain.flops import peak_memory; print(peak_memory(torch.device('cpu')))"
    before = f"import os, sys; x = b'x' * 2**30; os.execv(sys.executable, [sys.executable, '-c', {then!r}])"
    found = subprocess.run([sys.executable, "-c", before], capture_output=True, text=True, check=True)
    assert 2**26 < int(found.stdout) < 2**30


@pytest.fixture
def command(tmp_path, monkeypatch):
    """(what, nproc) -> the command that runs ENTRY, in a clean environment on CPU."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "FTRAIN_TRACEBACK")
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ours:
            monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    script = tmp_path / "entry.py"
    script.write_text(ENTRY)
    return lambda what, nproc=2: [sys.executable, str(script), what, str(nproc)]


def run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def start(command: list[str], env: dict | None = None) -> subprocess.Popen:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_one_process_is_a_world_of_its_own(command):
    done = run(command("ok", 1))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("rank 0 of 1 on cpu: 1 ")


def test_local_ranks_reduce_together_and_share_the_cores(command):
    done = run(command("ok"))
    assert done.returncode == 0, done.stderr
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for line, rank in zip(sorted(done.stdout.splitlines()), (0, 1), strict=True):
        assert line.startswith(f"rank {rank} of 2 on cpu: 3 ") and line.endswith(f"threads {threads}")
    assert done.stderr == ""


@pytest.mark.parametrize(
    "what, status, last, traced",
    [
        ("mistake", 2, "error: --seq-len 7: must be even", False),
        ("fault", 1, "error: rank 1: RuntimeError: broken", True),
        ("killed", 1, "error: rank 1 was killed by SIGKILL without an error of its own", False),
    ],
)
def test_one_rank_fails_all_end_and_the_first_cause_is_said_last(command, what, status, last, traced):
    done = run(command(what))
    assert done.returncode == status
    lines = done.stderr.splitlines()
    assert lines[-1] == last
    assert ("Traceback (most recent call last):" in lines) == traced
    assert traced or len(lines) == 1
    for line in done.stdout.splitlines():
        assert not alive(int(line.split("pid ")[1].split()[0]))


@pytest.mark.parametrize("sent, status, said", [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGKILL, -9, "")])
def test_ranks_end_with_their_launcher(command, sent, status, said):
    launcher = start(command("sleep"))
    pids = [int(launcher.stdout.readline().split("pid ")[1].split()[0]) for _ in range(2)]
    launcher.send_signal(sent)
    _, err = launcher.communicate(timeout=30)
    assert (launcher.returncode, err) == (status, said)
    until = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def test_slurm_ranks_join(command):
    env = dict(os.environ, SLURM_NTASKS="2", SLURM_JOB_ID=str(os.getpid()), SLURM_JOB_NODELIST="localhost")
    ranks = [start(command("ok"), env | {"SLURM_PROCID": r, "SLURM_LOCALID": r}) for r in ("0", "1")]
    for rank, process in enumerate(ranks):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out.startswith(f"rank {rank} of 2 on cpu: 3 ")


def test_slurm_variables():
    env = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456",
           "SLURM_JOB_NODELIST": "gpu[003-005,9],login"}  # fmt: skip
    assert launch.slurm(env) == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu003", "MASTER_PORT": "15456",
    }  # fmt: skip
    assert launch.slurm(env | {"SLURM_STEP_NODELIST": "b7"})["MASTER_ADDR"] == "b7"
    assert launch.slurm(env | {"SLURM_STEP_NUM_TASKS": "6"})["WORLD_SIZE"] == "6"
    assert launch.slurm(env | {"MASTER_ADDR": "x", "MASTER_PORT": "1"})["MASTER_PORT"] == "1"
    assert launch.slurm(env | {"RANK": "0"}) == {}, "torchrun is nearer"
    assert launch.slurm(env | {"SLURM_NTASKS": "1"}) == {}
    assert launch.slurm({"SLURM_NTASKS": "8"}) == {}, "an allocation without srun"


@pytest.mark.parametrize(
    "nodes, host",
    [("a", "a"), ("a1,b2", "a1"), ("node[003-005,9]", "node003"), ("node[7,9-11],x", "node7"), ("r[1-2]n[3-4]", "r1n3"),
     ("n-[01-02]-ib", "n-01-ib")],
)  # fmt: skip
def test_first_host_of_a_compressed_list(nodes, host):
    assert launch.first_host(nodes) == host


def test_more_ranks_than_devices_is_refused(monkeypatch):
    monkeypatch.setattr(launch, "accelerator", lambda: "cuda")
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    assert launch._local_ranks(None) == 2 and launch._local_ranks(1) == 1
    with pytest.raises(ValueError, match="--nproc 4: this machine has 2 cuda devices, one for each rank"):
        launch._local_ranks(4)

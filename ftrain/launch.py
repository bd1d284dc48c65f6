"""From one command to a rank of a job, on one process or on many.

Three things may have started us: torchrun or Slurm's srun, and then this process is a rank already;
or a user, and then it trains alone or becomes the launcher of local ranks, each of which runs the
same command again and finds itself in the first case.
"""

import ctypes
import logging
import os
import re
import signal
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from .mesh import resolve

# Exit statuses: a fault of the program, and what a user can put right (shown without a traceback).
FAULT, MISTAKE, INTERRUPTED = 1, 2, 128 + signal.SIGINT
LAUNCHER = "FTRAIN_LAUNCHER"  # the launcher's process id, in the environment of the ranks it starts


class Process(NamedTuple):
    """A rank's place in the job, and the torch.device it computes on."""

    rank: int
    world: int
    local_rank: int  # on this machine
    device: Any


def launch(entry: Callable[[Any], None], cfg, command: Sequence[str]) -> int:
    """Run `entry(cfg)` on every rank of the job, here and now, and return the exit status.

    command: program and arguments that run this very call again, as one rank.
    Looks at cfg.nproc and cfg.mesh. In a single process, errors are the caller's to report.
    """
    os.environ.update(slurm(os.environ))
    thread_defaults(os.environ)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _as_rank(entry, cfg)
    n = _local_ranks(cfg.nproc)
    # Before any process is started, so that a mistake costs no time.
    resolve(cfg.mesh.fsdp, cfg.mesh.sp, cfg.mesh.ep, cfg.mesh.replica, n)
    if n > 1:
        return _start_ranks(n, command)
    entry(cfg)
    return 0


def thread_defaults(env: MutableMapping[str, str]) -> None:
    """How torch's threads wait for each other, unless `env` says it already; before torch is imported.

    Threads that spin for long halve the speed of a busy machine; those that sleep at once pay a wake-up at each of a
    step's hundreds of parallel regions. 10,000 rounds are well under a millisecond: a step of two threads took a tenth
    less with them than with none.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & env.keys():  # else the count would overrule a policy of the user's
        env.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="10000")


def accelerator() -> str | None:
    """The type of this machine's accelerator ("cuda", ...), or None where only the CPU can
    take part in a process group."""
    import torch
    import torch.distributed as dist

    device = torch.accelerator.current_accelerator(check_available=True)
    return device.type if device and dist.get_default_backend_for_device(device) != "gloo" else None


def init() -> Process:
    """Set up the default process group of this rank: gloo on CPU, NCCL (or its kin) on GPU with
    gloo for what lies on the host. A process alone needs no rendezvous."""
    import torch
    import torch.distributed as dist

    kind, device, backend = accelerator(), torch.device("cpu"), "gloo"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if not kind:
        _keep_freed_memory()
    else:
        # Slurm may show each rank its own GPU only, as number 0.
        index = local_rank % torch.accelerator.device_count()
        device = torch.device(kind, index)
        torch.accelerator.set_device_index(index)
        backend = f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(device)}"
    bound = device if kind else None
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, device_id=bound)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=bound)
    return Process(dist.get_rank(), dist.get_world_size(), local_rank, device)


def _keep_freed_memory() -> None:
    """Have malloc keep the large blocks that are freed, for the next step wants the same: given back to the system, they
    come again page by page, zeroed. It is most of a tenth of a step. Only glibc has to be told."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(parameter, value)


def finish() -> None:
    """Take the process group down, if it is up. A rank of many that is failing leaves that to the
    end of its process: its peers must not learn of it before its error is recorded."""
    import torch.distributed as dist

    if dist.is_initialized() and (dist.get_world_size() == 1 or sys.exc_info()[0] is None):
        dist.destroy_process_group()


def slurm(env: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables, of a rank that Slurm's srun started; empty where it did not, or where
    something nearer has set them."""
    ranks = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or "1"
    if "RANK" in env or LAUNCHER in env or "SLURM_PROCID" not in env or int(ranks) < 2:
        return {}
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or "localhost"
    # Below the range from which systems give out ports, and the same on every rank.
    port = 12000 + int(env.get("SLURM_JOB_ID", "0")) % 20000
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": ranks,
        "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": env.get("MASTER_ADDR", first_host(nodes)),
        "MASTER_PORT": env.get("MASTER_PORT", str(port)),
    }


def first_host(nodes: str) -> str:
    """The first name of Slurm's compressed list: node[003-005,9],other -> node003."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).split(",")[0]


def report(error: BaseException, who: str = "") -> int:
    """Say on stderr, last, what went wrong, and return the exit status: one line for what the user
    can put right, and for a fault of the program its traceback and then the line."""
    status = _status(error)
    if status == INTERRUPTED:
        return _say("interrupted", status)
    kind = f"{type(error).__name__}: " if status == FAULT else ""
    trace = "".join(traceback.format_exception(error))
    return _say(f"error: {who}{kind}{sentence(error)}", status, trace)


def sentence(error: BaseException) -> str:
    """An exception's message, for a human."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _status(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return MISTAKE if isinstance(error, (ValueError, OSError)) else FAULT


def _say(line: str, status: int, trace: str = "") -> int:
    shown = trace if status == FAULT or os.environ.get("FTRAIN_TRACEBACK") == "1" else ""
    sys.stdout.flush()
    print(f"{shown}{line}", file=sys.stderr, flush=True)
    return status


def _local_ranks(nproc: int | None) -> int:
    import torch

    kind = accelerator()
    devices = torch.accelerator.device_count() if kind else 0
    if kind and nproc and nproc > devices:
        raise ValueError(f"--nproc {nproc}: this machine has {devices} {kind} devices, one for each rank")
    return nproc or devices or 1


def _as_rank(entry: Callable[[Any], None], cfg) -> int:
    """Run `entry(cfg)` as one rank of many: whatever ends it early ends the process at once."""
    from torch.distributed.elastic.multiprocessing.errors import record
    from torch.multiprocessing import _prctl_pr_set_pdeathsig

    launcher = os.environ.get(LAUNCHER)
    if launcher:
        # A launcher that is killed cannot take its ranks along: they must not train on unseen.
        _prctl_pr_set_pdeathsig(signal.SIGKILL)
        if os.getppid() != int(launcher):
            os._exit(1)
    try:
        record(entry)(cfg)
        return 0
    except SystemExit:
        raise
    except BaseException as error:
        # A launcher of ours has the error from `record`, and says which rank's was the first.
        status = _status(error) if launcher else report(error, f"rank {os.environ['RANK']}: ")
        sys.stdout.flush()
        # No orderly exit: it could wait for the peers, who wait for us. Closed sockets tell them.
        os._exit(status)


def _start_ranks(n: int, command: Sequence[str]) -> int:
    """Start `command` as n local ranks with torch's elastic launcher, wait, and return the exit
    status. When one fails the others are ended, and the first cause is said last."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // n)))
    logging.disable(logging.CRITICAL)  # the launcher's own remarks would bury the cause
    try:
        with tempfile.TemporaryDirectory(prefix="ftrain-") as logs:
            config = LaunchConfig(
                min_nodes=1, max_nodes=1, nproc_per_node=n, max_restarts=0, run_id=uuid.uuid4().hex,
                rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost",
                logs_specs=DefaultLogsSpecs(log_dir=logs), shutdown_timeout=5,
            )  # fmt: skip
            try:
                elastic_launch(config, command[0])(*command[1:])
                return 0
            except ChildFailedError as error:
                return _first_cause(error.failures)
            except SignalException as error:
                return _say("interrupted", 128 + error.sigval)
    finally:
        logging.disable(logging.NOTSET)
        del os.environ[LAUNCHER]
        if sys.stdout.isatty():
            print("\x1b[?25h", end="", flush=True)  # a rank that was killed may have hidden the cursor


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _first_cause(failures: Mapping[int, Any]) -> int:
    """Say what ended the job first, from elastic's ProcessFailure of each rank.

    A rank that died without a word (killed, out of memory, a crash) comes first, for the others'
    errors follow from its silence; then whoever wrote its error first; last those whom the launcher ended.
    """

    def when(rank: int) -> tuple[bool, float]:
        failure = failures[rank]
        written = Path(failure.error_file)
        return failure.exitcode == -signal.SIGTERM, written.stat().st_mtime if written.is_file() else 0.0

    rank = min(failures, key=when)
    failure = failures[rank]
    if not isinstance(failure.message, dict):
        how = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"exited with {failure.exitcode}"
        return _say(f"error: rank {rank} {how} without an error of its own", FAULT)
    text, trace = failure.message["message"], failure.message["extraInfo"]["py_callstack"]
    if failure.exitcode == MISTAKE:  # every rank would say the same; `record` puts the exception's type in front
        return _say(f"error: {text.split(': ', 1)[1]}", MISTAKE, trace)
    return _say(f"error: rank {rank}: {text}", FAULT, trace)

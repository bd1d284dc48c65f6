"""Stand ftrain's train step beside its peers': python tools/bench/bench.py --work FOLDER (README.md).

Python only: what it starts has environments of its own.
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from environments import REPO, environment
from work import DEFAULT, LIMITS, PEERS, REMAT, TOKENS, VOCAB, Peer, Row, config, describe, find_peers, find_rows

HERE = Path(__file__).resolve().parent


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="scratch folder: environments, models, logs, results")
    parser.add_argument("--envs", type=Path, help="folder of environments that exist, as env-hf, env-veomni, ...")
    parser.add_argument("--rows", nargs="+", default=list(DEFAULT), help="names of rows, or patterns ('*' is all)")
    parser.add_argument("--peers", nargs="+", default=["*"], help=f"names or patterns of: {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=3, help="how often each runs, in turns")
    parser.add_argument("--steps", type=int, default=25, help="of a run")
    parser.add_argument("--warmup", type=int, default=5, help="steps at its start that are not timed")
    parser.add_argument("--threads", type=int, default=2, help="of a run's ranks together, on as many CPUs")
    parser.add_argument("--remat", default=REMAT, choices=("none", "selective", "full", "offload"), help="of ftrain")
    parser.add_argument("--timeout", type=float, default=900, help="seconds after which a run has failed")
    parser.add_argument("--keep-cache", action="store_true", help="use what earlier runs compiled")
    parser.add_argument("--no-limits", action="store_true", help="do not measure what the machine can do")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    args.work = args.work.resolve()
    for name in ("rounds", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    if not 1 <= args.warmup < args.steps:
        parser.error(f"--warmup {args.warmup}: must be at least 1 and less than --steps {args.steps}")
    cpus = sorted(os.sched_getaffinity(0))
    if args.threads > len(cpus):
        parser.error(f"--threads {args.threads}: there are {len(cpus)} CPUs")
    os.sched_setaffinity(0, cpus[: args.threads])  # of this process, and so of all that it starts
    try:
        args.rows = find_rows(args.rows)
        args.of_row = {row: find_peers(row, args.peers) for row in args.rows}
    except ValueError as error:
        parser.error(str(error))
    return args


# --- What all read


def prepare(args: argparse.Namespace, row: Row) -> dict[str, str]:
    """The row's model, as transformers initialises it, and its batches, each made once -> their places."""
    model = args.work / "models" / row.model
    if not (model / "model.safetensors").exists():
        model.parent.mkdir(parents=True, exist_ok=True)
        wanted = model.with_suffix(".json")
        wanted.write_text(json.dumps(config(row)))
        python = environment("hf", args.work, args.envs)
        subprocess.run([python, HERE / "peers" / "checkpoint_run.py", wanted, model], check=True)
    batches = args.work / f"batches-s{row.seq}-{args.steps}.npy"
    if not batches.exists():
        python = environment("hf", args.work, args.envs)
        shape = [args.steps, TOKENS // row.seq, row.seq]
        subprocess.run([python, HERE / "peers" / "batches_run.py", batches, str(VOCAB), *map(str, shape)], check=True)
    return {"model": str(model), "batches": str(batches)}


# --- One run


def last_error(log: str) -> str:
    """The line of a log that says what went wrong: the last of Python's, of C++'s, of a signal, or at all."""
    lines = [line.strip() for line in log.splitlines() if re.search(r"\w", line)]
    for kind in (r"(?<!ChildFailed)(Error|Exception)\s*:", r"what\(\):", r"Signal \d+ \(SIG(?!TERM)", ""):
        if found := [line for line in lines if re.search(kind, line)]:
            return found[-1]
    return "no output"


def end(process: subprocess.Popen) -> None:
    """End a run. torchrun is asked first: its ranks have sessions of their own, and only it knows them."""
    for sent, patience in ((signal.SIGTERM, 40), (signal.SIGKILL, None)):
        os.killpg(process.pid, sent)
        try:
            process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            continue


def run(args: argparse.Namespace, row: Row, name: str, peer: Peer, number: int, places: dict[str, str]) -> dict:
    """Run a peer once -> what rank 0 saw, `memory` of each rank, `wall` seconds of the whole; or `error`."""
    folder = args.work / "runs" / row.name / f"{name}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("rank-*.json"):
        old.unlink()
    work = describe(row, peer, args.steps, args.threads, args.remat, out=str(folder), **places)
    (folder / "work.json").write_text(json.dumps(work, indent=1))
    python = environment(peer.environment, args.work, args.envs)
    ranks = work["fsdp"] * work["sp"] * work["ep"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    cache = args.work / "cache" / ("kept" if args.keep_cache else args.stamp) / row.name / name
    # The same for all, and how threads wait as `ftrain.launch.thread_defaults` has it: those that spin for long would take
    # a core from the other ranks.
    env = os.environ | {
        "OMP_NUM_THREADS": str(work["threads"]), "MKL_NUM_THREADS": str(work["threads"]),
        "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000",
        "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(cache), "JAX_COMPILATION_CACHE_DIR": str(cache),
    }  # fmt: skip
    result = {"row": row.name, "peer": name, "round": number, "log": str(folder / "log.txt")}
    began = time.perf_counter()
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(
            [python, *torchrun, HERE / "peers" / peer.script, folder / "work.json"],
            stdout=log, stderr=subprocess.STDOUT, env=env, cwd=folder, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(args.timeout)
        except BaseException as error:  # Ctrl-C too: no run may stay behind
            end(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            status = f"took more than {args.timeout:g} s"
    result["wall"] = time.perf_counter() - began
    found = [folder / f"rank-{rank}.json" for rank in range(ranks)]
    if status or not all(path.exists() for path in found):
        said = last_error((folder / "log.txt").read_text(errors="replace"))
        return result | {"error": status if isinstance(status, str) else said}
    of_rank = [json.loads(path.read_text()) for path in found]
    return result | of_rank[0] | {"memory": [rank["memory"] for rank in of_rank]}


def all_runs(args: argparse.Namespace) -> Path:
    """Every round of every row -> the file of results, which is written anew after each run."""
    args.stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    file = args.work / f"results-{args.stamp}.json"
    commit = subprocess.run(["git", "-C", REPO, "describe", "--always", "--dirty"], capture_output=True, text=True)
    setting = {
        "steps": args.steps, "warmup": args.warmup, "rounds": args.rounds, "threads": args.threads, "tokens": TOKENS,
        "remat": args.remat,
        "commit": commit.stdout.strip(), "machine": f"{cpu_name()}, {os.cpu_count()} CPUs", "began": args.stamp,
    }  # fmt: skip
    runs: list[dict] = []
    for row in args.rows:
        places = prepare(args, row)
        turns = dict(args.of_row[row]) if args.no_limits else {**args.of_row[row], "limits": LIMITS}
        for number in range(args.rounds):
            for name, peer in turns.items():
                runs.append(run(args, row, name, peer, number, places))
                done = runs[-1]
                said = done.get("error") or f"{done['wall']:.0f} s"
                print(f"{row.name}  round {number + 1}  {name}: {said}", flush=True)
                file.write_text(json.dumps({"setting": setting, "runs": runs}, indent=1))
        shutil.rmtree(args.work / "cache" / args.stamp, ignore_errors=True)
    return file


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    args = parse(arguments())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the run in progress is ended too
    args.work.mkdir(parents=True, exist_ok=True)
    file = all_runs(args)
    report = environment("ftrain", args.work, args.envs)
    sys.exit(subprocess.run([report, HERE / "report.py", file]).returncode)


if __name__ == "__main__":
    main()

"""The benchmark's own arithmetic and bookkeeping; no test says how fast anything is."""

import argparse
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

BENCH = Path(__file__).parents[1] / "tools" / "bench"
sys.path.insert(0, str(BENCH))
sys.path.append(str(BENCH / "peers"))

import bench  # noqa: E402
import limits  # noqa: E402
import report  # noqa: E402
import shared  # noqa: E402
import work  # noqa: E402

from ftrain.config import TrainConfig  # noqa: E402

# --- Rows and peers


def test_rows_are_found_by_name_and_by_pattern():
    name = "moe-h256-l4-s256-fp32-sp2ep2"
    assert [row.name for row in work.find_rows([name])] == [name]
    assert work.find_rows(["*"]) == work.matrix()
    found = work.find_rows(["dense-h512-*-bf16-sp2", "dense-h512-l8-*"])
    assert len(found) == 4 + 12 - 2  # two of them are named twice
    assert all(row.hidden == 512 for row in found)
    assert work.find_rows(list(work.DEFAULT))


def test_a_pattern_without_rows_is_an_error():
    with pytest.raises(ValueError, match=r"--rows dense-h128-\*: matches no row.*h256 or h512"):
        work.find_rows(["*-one", "dense-h128-*"])


def test_names_are_unique_and_every_row_has_ftrain():
    rows = work.matrix()
    assert len({row.name for row in rows}) == len(rows)
    assert all("ftrain" in work.find_peers(row, ["*"]) for row in rows)
    assert all((BENCH / "peers" / peer.script).exists() for peer in (*work.PEERS.values(), work.LIMITS))


def test_peers_run_what_they_can():
    one, ep2 = work.find_rows(["moe-h256-l4-s256-fp32-one"])[0], work.find_rows(["moe-h256-l4-s256-fp32-ep2"])[0]
    assert "jax" not in work.find_peers(one, ["*"])
    assert list(work.find_peers(ep2, ["*"])) == ["ftrain", "veomni", "titan"]
    assert list(work.find_peers(one, ["transformers*"])) == ["transformers", "transformers-compiled"]
    with pytest.raises(ValueError, match="--peers deepspeed: valid peers are ftrain"):
        work.find_peers(one, ["ftrain", "deepspeed"])


@pytest.mark.parametrize("mesh, threads, of_rank", [("one", 2, 2), ("fsdp2", 2, 1), ("sp2ep2", 2, 1), ("ep2", 8, 4)])
def test_threads_are_shared_out_over_ranks(mesh, threads, of_rank):
    row = work.find_rows([f"moe-h256-l4-s256-bf16-{mesh}"])[0]
    told = work.describe(row, work.PEERS["ftrain"], 3, threads, model="m", batches="b", out="o")
    assert told["threads"] == of_rank
    assert shared.Work(**told).ranks == math.prod(work.MESHES[mesh])


def test_ftrain_recomputes_what_it_does_by_default_or_as_told():
    row = work.find_rows(["dense-h256-l4-s256-fp32-one"])[0]
    told = [work.describe(row, work.PEERS["ftrain"], 3, 2, *remat, model="m", batches="b") for remat in ((), ("full",))]
    assert [of["remat"] for of in told] == [TrainConfig().remat, "full"]


def test_a_peer_may_have_a_mesh_of_its_own():
    row = work.find_rows(["moe-h256-l4-s256-fp32-sp2ep2"])[0]
    told = work.describe(row, work.PEERS["ftrain-one-rank"], 3, 2, model="m", batches="b", out="o")
    assert (shared.Work(**told).ranks, told["threads"]) == (1, 2)


# --- What comes of the runs

ROW = "dense-h256-l4-s256-fp32-fsdp2"


def a_run(peer, number, seconds, losses=(8.0, 7.0, 6.0), **more):
    # The first step, which is not timed, is slow.
    run = {"row": ROW, "peer": peer, "round": number, "log": f"{peer}/log.txt", "losses": list(losses)}
    return run | {"seconds": [9.0, seconds, seconds], "norms": [1.0] * 3, "memory": [10**9, 2 * 10**9]} | more


def failed(peer, number):
    return {"row": ROW, "peer": peer, "round": number, "log": f"{peer}/log.txt", "error": "RuntimeError: no [gloo]"}


def results(*runs):
    return {"setting": {"warmup": 1, "tokens": 2048}, "runs": list(runs)}


def line_of(peer, *runs):
    return next(line for line in report.summarise(results(*runs)) if line.peer == peer)


def test_ratios_are_those_of_a_round():
    runs = [a_run("ftrain", i, s) for i, s in enumerate((1.0, 2.0, 4.0))]
    runs += [a_run("titan", i, s) for i, s in enumerate((2.0, 3.0, 4.0))]
    line = line_of("titan", *runs)
    assert line.faster == report.Spread(1.5, 1.0, 2.0)
    assert line.rate == 2048 / 3
    assert line.memory == 2 * 10**9
    assert (line.cold, line.warm, line.loss, line.same) == (9.0, 9.0, 6.0, True)
    assert line_of("ftrain", *runs).faster is None


@pytest.mark.parametrize("losses, same", [
    ((8.0, 7.0, 6.0001), True), ((8.0, 7.0, 6.01), False), ((8.0, float("nan"), 6.0), False),
])  # fmt: skip
def test_other_losses_are_other_work(losses, same):
    line = line_of("titan", a_run("ftrain", 0, 1.0), a_run("titan", 0, 1.0, losses))
    assert line.same is same
    shown = text(report.table([line], {}, 2048))
    assert ("!" in shown.split("titan")[1].splitlines()[0]) is not same


def test_bf16_has_its_own_tolerance():
    runs = [a_run("ftrain", 0, 1.0), a_run("titan", 0, 1.0, (8.0, 7.0, 6.01))]
    assert line_of("titan", *(run | {"row": ROW.replace("fp32", "bf16")} for run in runs)).same


def text(table) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_a_failed_peer_is_shown():
    lines = report.summarise(results(a_run("ftrain", 0, 1.0), failed("veomni", 0), failed("veomni", 1)))
    assert [line.peer for line in lines] == ["ftrain", "veomni"]
    shown = text(report.table(lines, {}, 2048))
    assert "failed: RuntimeError: no [gloo] (veomni/log.txt)" in " ".join(shown.replace("│", " ").split())


def test_a_failed_round_is_shown_beside_the_others():
    runs = [a_run("ftrain", 0, 1.0), a_run("ftrain", 1, 1.0), failed("titan", 0), a_run("titan", 1, 3.0)]
    line = line_of("titan", *runs)
    assert (line.faster.median, line.cold, line.error) == (3.0, None, "RuntimeError: no [gloo]")
    assert "a round failed: RuntimeError" in text(report.table([line], {}, 2048))


def test_nothing_is_compared_where_ftrain_failed():
    line = line_of("titan", failed("ftrain", 0), a_run("titan", 0, 1.0))
    assert (line.rate, line.faster, line.difference, line.same) == (2048, None, None, None)


def test_the_report_is_written(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / "results.json"
    measured = a_run("limits", 0, 1.0, limits=LIMITS)
    path.write_text(json.dumps(results(a_run("ftrain", 0, 1.0), a_run("titan", 0, 2.0), failed("veomni", 0), measured)))
    monkeypatch.setattr(sys, "argv", ["report.py", str(path)])
    report.main()
    summary = json.loads((tmp_path / "results-summary.json").read_text())
    assert [line["peer"] for line in summary["lines"]] == ["ftrain", "titan", "veomni"]
    assert summary["floors"][ROW]["total"] == pytest.approx(limits.floor(LIMITS).total)
    assert (tmp_path / "results.png").stat().st_size > 0


# --- The floor

LIMITS = {
    "flops": 4e9, "parameters": 1000, "read": 800, "itemsize": 2, "ranks": 2, "memory": 1e6,
    "matmuls": [
        {"kind": "fwd", "shape": [1, 1, 1], "count": 3, "flops": 1e9, "seconds": 1.0},
        {"kind": "wgrad", "shape": [1, 1, 1], "count": 1, "flops": 1e9, "seconds": 3.0},
    ],
    "collectives": {"all_gather": {"count": 4, "bytes": 4000, "seconds": 0.25}},
}  # fmt: skip


def test_the_floor():
    found = limits.floor(LIMITS)
    assert found.matmul == pytest.approx(2 * 4e9 / 6)  # two ranks, four products of 1e9 in six seconds
    assert found.compute == pytest.approx(3.0)
    assert found.memory == pytest.approx((28 * 500 + 8 * 800) / 1e6)
    assert found.communication == pytest.approx(1.0)
    assert found.mfu(6.0) == pytest.approx(0.5)
    assert limits.collective_rates(LIMITS) == {"all_gather": 4000.0}


def test_the_floor_is_shown_beside_the_step():
    runs = results(a_run("ftrain", 0, 6.0), a_run("limits", 0, 1.0, limits=LIMITS))
    lines, found = report.summarise(runs), report.floors(runs)
    shown = text(report.limits_table(lines, found, 2048))
    assert "50.0%" in shown and "all_gather" in shown


# --- Running


@pytest.mark.parametrize("log, said", [
    ("Traceback\nRuntimeError: of rank 1\n\nroot cause\nChildFailedError: \n====\n", "RuntimeError: of rank 1"),
    ("terminate called\n  what():  [enforce fail]\nx ChildFailedError: \n", "what():  [enforce fail]"),
    ("Signal 9 (SIGKILL) received\nSignal 15 (SIGTERM) received\n", "Signal 9 (SIGKILL) received"),
    ("one\n  killed  \n====\n", "killed"),
    ("", "no output"),
])  # fmt: skip
def test_the_line_that_says_what_went_wrong(log, said):
    assert bench.last_error(log) == said


RUNNER = """
import shared
work = shared.read()
shared.write(work, shared.train(work, lambda ids: (float(ids.sum()), 1.0)))
"""


@pytest.fixture
def run_script(tmp_path, monkeypatch):
    """Runs a script, as a peer, on three batches of ones."""
    monkeypatch.setattr(bench, "environment", lambda *_: sys.executable)
    monkeypatch.setenv("PYTHONPATH", str(BENCH / "peers"))
    shared.np.save(tmp_path / "batches.npy", shared.np.ones((3, 2, 4), dtype=int))
    args = argparse.Namespace(
        work=tmp_path, envs=None, steps=3, threads=1, timeout=20.0, stamp="now", keep_cache=False, remat="none"
    )

    def run(script: str, timeout: float = 20.0) -> dict:
        path = tmp_path / "peer.py"
        path.write_text(script)
        args.timeout = timeout
        places = {"model": "none", "batches": str(tmp_path / "batches.npy")}
        peer = work.Peer("ftrain", str(path), ("one",))
        return bench.run(args, work.find_rows(["dense-h256-l4-s256-fp32-one"])[0], "made-up", peer, 0, places)

    return run


def test_a_run_is_read_back(run_script):
    found = run_script(RUNNER)
    assert found["losses"] == [8.0, 8.0, 8.0]
    assert len(found["seconds"]) == 3
    assert len(found["memory"]) == 1 and found["memory"][0] > 10**6
    assert "error" not in found


def test_a_run_that_fails_says_why_and_leaves_its_log(run_script):
    run_script(RUNNER)  # what it left must not be taken for the next one's
    found = run_script("raise ValueError('no such kernel')")
    assert found["error"] == "ValueError: no such kernel"
    assert "Traceback" in Path(found["log"]).read_text()
    assert "losses" not in found


def test_a_run_that_does_not_end_is_ended(run_script):
    assert run_script("import time; time.sleep(60)", timeout=0.5)["error"] == "took more than 0.5 s"


@pytest.mark.slow
def test_two_runners_do_the_same_work(tmp_path):
    """Those that ftrain's own environment can run, on a tiny model: the losses are the same."""
    hf = work.config(work.find_rows(["moe-h256-l4-s256-fp32-one"])[0])
    hf |= {"vocab_size": 64, "hidden_size": 32, "head_dim": 4, "num_hidden_layers": 1, "moe_intermediate_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    peers, model, batches = BENCH / "peers", tmp_path / "model", tmp_path / "batches.npy"
    subprocess.run([sys.executable, peers / "checkpoint_run.py", tmp_path / "config.json", model], check=True)
    subprocess.run([sys.executable, peers / "batches_run.py", batches, "64", "3", "2", "16"], check=True)
    losses = {}
    for script in ("ftrain_run.py", "transformers_run.py"):
        told = work.describe(
            work.find_rows(["moe-h256-l4-s256-fp32-one"])[0], work.Peer("", script, ()), 3, 1,
            model=str(model), batches=str(batches), out=str(tmp_path),
        )  # fmt: skip
        (tmp_path / "work.json").write_text(json.dumps(told))
        subprocess.run([sys.executable, peers / script, tmp_path / "work.json"], check=True)
        losses[script] = json.loads((tmp_path / "rank-0.json").read_text())["losses"]
    assert losses["ftrain_run.py"] == pytest.approx(losses["transformers_run.py"], rel=1e-5)
    assert losses["ftrain_run.py"][0] != losses["ftrain_run.py"][2]

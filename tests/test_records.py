"""The console and the run directory's records."""

import dataclasses
import io
import json
import time

import pytest

from ftrain import console, records
from ftrain.config import TrainConfig, load, to_json


def plain(**changes) -> console.Console:
    return console.Console(on=True, stream=io.StringIO(), **changes)


HEADER = dict(
    model="qwen3-moe-tiny", plan="fsdp", mesh="fsdp 2 x sp 1 x ep 1", precision="fp32", total=12_345_678, active=4_000,
    local=6_172_839, largest=[console.TensorSummary("model.embed_tokens.weight", (4096, 128), "S(0) R R", 1 << 20)],
    run_directory="runs/x",
)  # fmt: skip
STEP = dict(
    loss=5.4321, grad_norm=1.25, lr=3e-4, tokens_per_s=12_345.0, mfu=0.412, peak_memory_bytes=3 << 30, eta_s=3725.0
)  # fmt: skip


def test_plain_header_and_step():
    c = plain()
    c.header(**HEADER)
    c.step(7, 200, **STEP, heldout_loss="5.1")
    text = c.stream.getvalue()
    assert "\x1b" not in text and "\r" not in text
    assert "parameters     12.3M total, 4K active, 6.17M per rank" in text
    assert "run directory  runs/x" in text
    assert "model.embed_tokens.weight  4096 x 128  S(0) R R    1.0 MiB" in text
    assert text.splitlines()[-1] == (
        "step   7/200  loss 5.4321  grad norm 1.250  lr 3.00e-04  12.3K tokens/s  mfu 41.2%  "
        "peak memory 3.0 GiB  eta 1:02:05  heldout loss 5.1"
    )


def test_unknown_mfu_is_a_dash():
    c = plain()
    c.step(1, 2, **STEP | {"mfu": None})
    assert "mfu -  " in c.stream.getvalue()


def test_terminal_says_the_same_words():
    from rich.console import Console as Rich

    out = io.StringIO()
    c = console.Console(on=True, stream=out, rich=Rich(file=out, force_terminal=True, color_system=None, width=200))
    c.header(**HEADER)
    c.step(7, 200, **STEP)
    with c.phase("compiling"):
        pass
    text = out.getvalue()
    for words in ("fsdp 2 x sp 1 x ep 1", "12.3M total, 4K active", "S(0) R R", "step   7/200  loss", "eta 1:02:05"):
        assert words in text
    assert "compiling: 0.0 s" in text


def test_phase_says_that_it_began_lives_and_ended():
    c = plain(alive_every=0.05)
    with c.phase("compiling"):
        time.sleep(0.3)
    lines = c.stream.getvalue().splitlines()
    assert lines[0] == "compiling ..." and lines[1] == "compiling ... 0 s" and lines[-1] == "compiling: 0.3 s"


def test_failed_phase_does_not_say_how_long_it_took():
    c = plain()
    with pytest.raises(RuntimeError), c.phase("compiling"):
        raise RuntimeError
    assert c.stream.getvalue() == "compiling ...\n"


def test_other_ranks_are_silent():
    c = console.console(rank=1, stream=io.StringIO())
    c.header(**HEADER)
    c.step(1, 2, **STEP)
    c.warn("x")
    with c.phase("compiling"):
        pass
    assert c.stream.getvalue() == ""


@pytest.mark.parametrize(
    "value, text", [(0, "0"), (999.4, "999"), (999.6, "1K"), (12_345_678, "12.3M"), (7.6e9, "7.6B"), (2e12, "2T")]
)
def test_si(value, text):
    assert console.si(value) == text


@pytest.mark.parametrize("value, text", [(5, "5 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 40, "5.0 TiB")])
def test_bytes(value, text):
    assert console.bytes_(value) == text


def opened(out, resumed=None) -> records.Records:
    return records.open_records(TrainConfig(out=str(out), steps=9), resumed, warn=print)


def steps(out) -> list:
    return [entry["step"] for entry in records.read(out / "metrics.jsonl")]


def test_a_line_is_readable_as_soon_as_it_is_logged(tmp_path):
    r = opened(tmp_path)
    r.log(1, loss=2.5, expert_load=[0.5, float("inf")], grad_norm=float("nan"))
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 1, "loss": 2.5, "expert_load": [0.5, None], "grad_norm": None}
    r.close()


def test_configuration_is_recorded_and_loads(tmp_path):
    opened(tmp_path).close()
    assert load(str(tmp_path / "run.json")) == TrainConfig(out=str(tmp_path), steps=9)


def test_resume_drops_later_steps_and_a_torn_line(tmp_path):
    r = opened(tmp_path)
    for step in range(1, 6):
        r.log(step, loss=1.0 / step)
    r.log(3, heldout_loss=1.5)
    r.close()
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "lo')
    r = opened(tmp_path, resumed=3)
    assert steps(tmp_path) == [1, 2, 3, 3]
    r.log(4, loss=7.0)
    r.close()
    assert records.read(tmp_path / "metrics.jsonl")[-2:] == [{"step": 3, "heldout_loss": 1.5}, {"step": 4, "loss": 7.0}]


def test_a_line_without_its_newline_is_whole(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    opened(tmp_path, resumed=2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_broken_middle_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is not a JSON object with a step"):
        opened(tmp_path, resumed=2)


def test_new_start_begins_anew_and_clear_touches_nothing_else(tmp_path):
    r = opened(tmp_path)
    r.log(1, loss=1.0)
    r.close()
    opened(tmp_path).close()
    assert steps(tmp_path) == []
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    mine = [tmp_path / name for name in ("notes.txt", "checkpoints/best/weights", "tensorboard/other/events")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    opened(tmp_path).close()
    records.clear(str(tmp_path))
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(mine)
    assert not list(tmp_path.glob("checkpoints/step-*"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_records_of_others_are_left_alone(tmp_path, name):
    (tmp_path / name).write_text("theirs")
    with pytest.raises(ValueError, match=f"holds {name}, but no run.json"), records.hold(str(tmp_path), 0):
        pass


def test_one_run_at_a_time(tmp_path):
    out = str(tmp_path / "out")
    with records.hold(out, 0):
        with records.hold(out, 1):  # of the same job
            pass
        with pytest.raises(ValueError, match="another run is writing there"), records.hold(out, 0, patience=0.2):
            pass
    with records.hold(out, 0):
        pass


def test_tensorboard_events_hold_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    r = opened(tmp_path)
    for step in (1, 2, 3):
        r.log(step, loss=float(step), expert_load=[1.0])
    r.close()
    r = opened(tmp_path, resumed=2)
    r.log(3, loss=30.0)
    r.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_missing_tensorboard_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    said = []
    r = records.open_records(TrainConfig(out=str(tmp_path)), None, warn=said.append)
    r.log(1, loss=1.0)
    r.close()
    assert len(said) == 1 and said[0].startswith("no TensorBoard events are written: ")
    assert steps(tmp_path) == [1]


def test_full_disk_names_the_file(tmp_path):
    r = opened(tmp_path)
    r._file = open("/dev/full", "w")
    with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written: No space left on device"):
        r.log(1, loss=1.0)


def test_changes_since_the_last_start(tmp_path):
    before = TrainConfig(out=str(tmp_path), lr=1e-3)
    assert records.changes(before) == []
    (tmp_path / "run.json").write_text(to_json(before))
    assert records.changes(before) == []
    after = dataclasses.replace(before, lr=0.1, schedule="constant")
    assert records.changes(after) == ["lr 0.001 -> 0.1", "schedule cosine -> constant"]

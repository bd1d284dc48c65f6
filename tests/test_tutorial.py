"""docs/new_modality.md, followed to the letter: its files typed, its commands run, what it says of them held true."""

import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import environment, series, steps

from ftrain.check import MESHES
from ftrain.equivalence import differences, random_batches, run_mesh, run_plain
from ftrain.mesh import Mesh
from ftrain.model import find_model
from ftrain.plan import find_plan
from ftrain.records import read

PAGE = Path(__file__).parents[1] / "docs" / "new_modality.md"
# name -> what stands in the block: ```python series.py, ```sh train.
BLOCKS = {name: text for name, text in re.findall(r"^```\w+ (\S+)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)}
FILES = {name: text for name, text in BLOCKS.items() if "." in name}
COMMANDS = {name: text for name, text in BLOCKS.items() if "." not in name}


def typed(directory: Path) -> Path:
    for name, text in FILES.items():
        (directory / name).write_text(text)
    return directory


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(typed(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """Every command, in the page's order -> what it printed. The check, which needs nobody's results, beside others."""
    root = typed(tmp_path_factory.mktemp("tutorial"))
    env = environment(root / "cache")
    shell = f"set -e; python() {{ {shlex.quote(sys.executable)} \"$@\"; }}\n"

    def run(name: str) -> str:
        argv = ["bash", "-c", shell + COMMANDS[name]]
        done = subprocess.run(argv, env=env, cwd=root, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, f"{COMMANDS[name]}{done.stdout}{done.stderr}"
        return done.stdout

    with ThreadPoolExecutor(1) as beside:
        check = beside.submit(run, "check")
        said = {name: run(name) for name in COMMANDS if name != "check"}
    return SimpleNamespace(root=root, said=said | {"check": check.result()})


def test_the_page_has_what_is_run():
    assert list(FILES) == ["series.py", "omni.yaml", "shapes.py", "compare.py", "use.py"]
    assert list(COMMANDS) == ["check", "train", "mesh", "compare", "use"]


def test_the_encoder_is_short_and_knows_of_no_ranks():
    code = FILES["series.py"]
    assert len(code.splitlines()) < 150
    assert not re.search(r"rank|mesh|dist|shard|world|fsdp|\bsp\b|gather|reduce|image|text", code, re.I)


@pytest.mark.slow
def test_the_plan_holds_for_it(followed):
    said = followed.said["check"]
    assert "keeps every invariant" in said and "FAILS" not in said
    assert re.search(rf"equivalence +holds  \d+ values on {len(MESHES)} meshes", said)


@pytest.mark.slow
def test_it_learns(followed):
    """The loss falls; of two answers with three possibilities each, nearly all are right."""
    entries = read(followed.root / "runs/one/metrics.jsonl")
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    heldout = [entry["heldout_loss"] for entry in entries if "heldout_loss" in entry]
    *_, scores = (entry for entry in entries if "channel_accuracy" in entry)
    assert len(losses) == 200 and sum(losses[-20:]) < 0.25 * sum(losses[:20])
    assert len(heldout) == 2 and heldout[1] < 0.2 < 2 < heldout[0]
    assert scores["channel_accuracy"] > 0.95 and scores["wave_accuracy"] > 0.9
    padded = [entry["series_waste"] for entry in entries if "series_waste" in entry]
    assert 0 < sum(padded) / len(padded) < 0.3


@pytest.mark.slow
def test_four_ranks_train_alike(followed):
    one, four = (series(followed.root / "runs" / name) for name in ("one", "four"))
    assert len(four) == 20
    for column, tolerance in ((0, 1e-6), (1, 2e-5)):
        assert ((four - one[:20]) / one[:20])[:, column].abs().max() < tolerance
    assert "mesh           fsdp=2 sp=2 ep=1" in followed.said["mesh"]
    assert any(entry["series_imbalance"] > 1 for entry in steps(followed.root / "runs/four"))
    assert re.fullmatch(r"20 losses, largest relative difference \de-0[7-9]\n", followed.said["compare"])


@pytest.mark.slow
def test_what_was_trained_is_used(followed):
    assert re.fullmatch(r"said (\[\d, \d\]) right \1\n", followed.said["use"])


# --- What the page warns of, and that the checks above would see


def differ(here, right: str = "", wrong: str = "") -> list:
    """Where two steps on two ranks differ from one device's, with something in the encoder replaced."""
    assert right in FILES["series.py"]
    (here / "series.py").write_text(FILES["series.py"].replace(right, wrong))
    model = find_model("omni.yaml")
    batches = random_batches(model, 2)
    found = run_mesh(model, find_plan("fsdp_sp_ep"), Mesh(1, 2, 1), batches)
    return differences(found, run_plain(model, batches), model)


def test_the_encoder_gives_the_same_on_two_ranks(here, one_thread):
    assert not differ(here)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ('ops.local_mask(x["item"][None])', 'ops.local_mask(0 * x["item"][None])'),
        ('x["position"], cfg.width', 'torch.arange(len(x["position"])), cfg.width'),
        ("return norm(p, f", "y = y - y.mean(0)\n    return norm(p, f"),
    ],
    ids=["one sees the other", "positions of the pack", "a mean over the pack"],
)
def test_series_that_are_not_kept_apart_are_seen(here, right, wrong, one_thread):
    assert differ(here, right, wrong)


def test_a_change_in_place_is_named_with_its_line(here, one_thread):
    with pytest.raises(ValueError, match=r"encoders.series.layers.\d: .*series.py, line \d+ .*F.rms_norm\(.*in place"):
        differ(here, 'F.layer_norm(y, y.shape[-1:], q[f"{name}.weight"], eps=1e-6)',
               'F.rms_norm(y, y.shape[-1:], q[f"{name}.weight"])')  # fmt: skip


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("slots=number)]", "slots=torch.arange(len(number) + 1))]", r"it must have a multiple of 1 units, and 1 out"),
        ("slots=number)]", "slots=number)][0]", r"items gave Item: it must be a list of Item"),
        ('.norm", y)', '.norm", y)[::2]', r"encoders.series: encode gave \[\d+, 32\] for \d+ units"),
        ('.norm", y)', '.norm", y)[:, :8]', r"encoders.series: encode gave \[\d+, 8\] .* must be \[\d+, 32\]"),
        ('fields.size(hf, "num_channels")', 'fields.size(hf, "tracks")', r"encoders.series: .* lacks 'tracks'"),
    ],
    ids=["too many slots", "no list", "too few outputs", "too narrow", "config"],
)
def test_mistakes_are_named(here, right, wrong, words):
    with pytest.raises(ValueError, match=words):
        differ(here, right, wrong)


def test_what_a_layer_declares_but_does_not_use_is_named(here, one_thread):
    words = r"encoders.series.layers: no block reads proj.bias, proj.weight, which the model declares"
    with pytest.raises(ValueError, match=words):
        differ(here, 'project(q, "proj", seen, ops)', "seen")


def test_files_with_deferred_annotations_are_read(here):
    (here / "series.py").write_text("from __future__ import annotations\n" + FILES["series.py"])
    assert find_model("omni.yaml").cfg.encoders["series"].cfg.channels == 3


def test_a_file_that_is_not_there_is_named_whole(here):
    os.remove("series.py")
    with pytest.raises(FileNotFoundError, match=f"type series.py: there is no file {re.escape(str(here))}/series.py"):
        find_model("omni.yaml")

"""The command line: names, help, suggestions, and errors without tracebacks."""

import dataclasses
import re
import subprocess
import sys

import pytest

from ftrain import __main__ as cli
from ftrain import config, launch

FLAGS = """--model --plan --mesh.fsdp --mesh.sp --mesh.ep --mesh.replica --nproc --steps --seq-len --batch-size
--accumulate --lr --seed --precision --compile --remat --data --init --out --save-every --resume --overwrite
--eval-every""".split()


def run(argv: list[str], capsys) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command line, run in this process."""
    try:
        status = cli.main(argv)
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    return status, out, err


def words(box: str) -> str:
    """The words of tyro's boxes, in one line."""
    return " ".join(re.sub(r"[─│╭╮╰╯]|-{9,}", " ", box).split())


@pytest.mark.parametrize("argv", [["--help"], ["check", "--help"], ["export", "--help"], ["--stepz"], ["--steps", "0"]])
def test_torch_is_not_imported_for_words(argv):
    program = (
        "import sys, ftrain.__main__ as cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["False"], done.stderr


def test_help_has_every_flag_grouped_with_its_meaning(capsys):
    status, out, _ = run(["--help"], capsys)
    text = words(out)
    assert status == 0
    for name in FLAGS:
        assert re.search(rf"(?<!\S){re.escape(name)}[ ,]", text), name
    for group in ("task", "parallel", "mesh", "compute", "optimizer", "schedule", "saving", "watching"):
        assert f"{group} options" in text
    for name, group in config.GROUPS.items():
        for field in dataclasses.fields(group):
            flag = f"--mesh.{field.name}" if name == "mesh" else config.flag(field.name)
            meaning = re.search(rf"(?<!\S){re.escape(flag)}[ ,].*?\(default: ", text).group()
            assert len(re.sub(r"--\S+|[{|}]", " ", meaning).split()) >= 4, f"{flag} is not explained"
    assert "ddp|fsdp|" in text  # plans are listed as the folder has them
    assert "--config" in text and "check" in text and "export" in text


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--stepz", "3"], "Unrecognized options: --stepz, 3 Perhaps you meant: --steps INT"),
        (["--mesh-fsdp", "2"], "Perhaps you meant: --mesh.fsdp INT"),
        (["--precision", "bf17"], "invalid choice 'bf17' for argument '--precision'"),
        (["--steps", "many"], "Error parsing --steps: invalid literal for int"),
        (["--resume", "auto", "--overwrite"], "--resume and --overwrite are not allowed together"),
        (["chek"], "error: unknown command chek; did you mean check? (commands: train, check, plan, export; none is train)"),
        (["--batch-size", "0"], "error: --batch-size 0: must be at least 1"),
        (["--config", "nowhere"], "error: --config nowhere: there is no such file; a run directory holds it as run"),
    ],
)
def test_mistakes_are_said_in_a_sentence(argv, said, capsys):
    status, out, err = run(argv, capsys)
    assert status == 2 and out == ""
    assert said in words(err)
    assert "Traceback" not in err


def test_mesh_that_does_not_fit_is_said_before_anything_starts(capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "_local_ranks", lambda nproc: nproc or 1)
    status, _, err = run(["--mesh.fsdp", "1", "--mesh.ep", "2"], capsys)
    assert status == 2
    assert err == (
        "error: mesh fsdp 1 x sp 1 x ep 2 = 2 ranks, but the world size is 1: the dimensions must multiply "
        "to the world size (use --nproc 2, or -1 for one dimension)\n"
    )


def test_config_file_gives_the_defaults(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "launch", lambda entry, cfg, command: seen.append((cfg, command)) or 0)
    cfg = config.TrainConfig(steps=5, lr=2e-4, mesh=config.MeshConfig(sp=2))
    file = tmp_path / "run.json"
    file.write_text(config.to_json(cfg))
    argv = ["--lr", "1e-4", "--config", str(file)]
    assert cli.main(argv) == 0
    assert seen == [(dataclasses.replace(cfg, lr=1e-4), [sys.executable, "-m", "ftrain", *argv])]


@pytest.mark.parametrize(
    "error, status, said",
    [
        (ValueError("unknown plan 'x'"), 2, "error: unknown plan 'x'\n"),
        (FileNotFoundError("--data x: there is no such file"), 2, "error: --data x: there is no such file\n"),
        (OSError(28, "No space left on device", "runs/x"), 2, "error: runs/x: No space left on device\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_users_can_put_right_has_no_traceback(error, status, said, capsys, monkeypatch):
    def fail(argv):
        raise error

    monkeypatch.delenv("FTRAIN_TRACEBACK", raising=False)
    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    assert run([], capsys) == (status, "", said)


def test_traceback_on_request_and_for_faults(capsys, monkeypatch):
    def mistake(argv):
        raise ValueError("wrong")

    def fault(argv):
        raise RuntimeError("broken")

    monkeypatch.setitem(cli.COMMANDS, "train", mistake)
    monkeypatch.setenv("FTRAIN_TRACEBACK", "1")
    status, _, err = run([], capsys)
    assert status == 2 and err.startswith("Traceback") and err.endswith("\nerror: wrong\n")
    monkeypatch.delenv("FTRAIN_TRACEBACK")
    monkeypatch.setitem(cli.COMMANDS, "train", fault)
    status, _, err = run([], capsys)
    assert status == 1 and err.startswith("Traceback") and err.endswith("\nerror: RuntimeError: broken\n")


def test_export_hands_on_its_arguments(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("ftrain.pretrained.export", lambda *args: seen.append(args) or args[1])
    assert run(["export", "a", "b", "--dtype", "bf16"], capsys) == (0, "wrote b\n", "")
    assert seen == [("a", "b", "bf16")]


def test_export_of_nothing_is_said_in_a_sentence(tmp_path, capsys):
    status, _, err = run(["export", str(tmp_path / "nowhere"), str(tmp_path / "b")], capsys)
    assert status == 2 and "nowhere" in err and "Traceback" not in err

"""`python -m ftrain`: train, or one of the smaller commands. Imports torch only when there is work."""

import argparse
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from . import config, launch

DESCRIPTION = """Train a model, of text or of images and sounds too. Every flag has a default: `python -m ftrain --plan fsdp_sp_ep` is a whole run.

Other commands, each with its own --help: `check` holds a sharding plan to its invariants; `plan` says
what a step will hold, send and take on machines you do not have yet;
`export` writes a checkpoint's model as a plain Hugging Face directory.

--config FILE takes the defaults of all flags from a run's run.json; with another --out, the same run again.
FTRAIN_TRACEBACK=1 in the environment shows where an error comes from."""


def train(argv: Sequence[str]) -> int:
    """Train: the command without a name."""
    pre = argparse.ArgumentParser(prog=config.PROGRAM, add_help=False, allow_abbrev=False)
    pre.add_argument("--config")
    pre.add_argument("--recipe")
    given, rest = pre.parse_known_args(argv)
    if given.config and given.recipe:
        raise ValueError("--config excludes --recipe: a run's configuration names its own")
    default = config.load(given.config) if given.config else config.TrainConfig()
    if given.recipe:
        default = config.with_recipe(default, given.recipe)
    cfg = config.parse(rest, default, DESCRIPTION)
    config.validate(cfg)
    return launch.launch(_train, cfg, [sys.executable, "-m", "ftrain", *argv])


def _train(cfg: config.TrainConfig) -> None:
    from .train import main

    main(cfg)


def check(argv: Sequence[str]) -> int:
    """Hold a plan to its invariants."""

    def check(plan: str, model: str = "qwen3-moe-tiny") -> bool:
        """Hold a sharding plan to its invariants over many meshes, on CPU, and print for each whether
        it holds, with the smallest counterexample where it does not.

        Args:
            plan: A name in plans/, or FILE.py:FUNCTION.
            model: The model whose parameters are asked about: a preset, or a directory with a config.json.
        """
        from .check import check

        return check(plan, model)

    return 0 if tyro.cli(check, prog=f"{config.PROGRAM} check", args=list(argv)) else 1


def export(argv: Sequence[str]) -> int:
    """Write a checkpoint's model for others."""

    def export(
        source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")],
        dest: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DEST")],
        dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    ) -> None:
        """Write a checkpoint's model as a Hugging Face directory, without the optimizer's state.

        Args:
            source: Directory of a checkpoint: OUT/checkpoints/step-N.
            dest: Directory to write; it must not exist yet, or be empty.
            dtype: Of the floating-point weights written; None: as they are.
        """
        from .pretrained import export

        print(f"wrote {export(source, dest, dtype)}")

    tyro.cli(export, prog=f"{config.PROGRAM} export", args=list(argv))
    return 0


def plan(argv: Sequence[str]) -> int:
    """Forecast a step's memory, communication and speed."""
    from . import planning, search

    cfg = planning.parse(argv)
    return search.main(cfg) if cfg.search else planning.main(cfg)


COMMANDS = {"train": train, "check": check, "plan": plan, "export": export}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (sys.argv's by default) and return its exit status; errors are reported, not raised."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "train"
    try:
        if name not in COMMANDS:
            near = config.did_you_mean(name, list(COMMANDS))
            raise ValueError(f"unknown command {name}{near} (commands: {', '.join(COMMANDS)}; none is train)")
        return COMMANDS[name](argv)
    except (Exception, KeyboardInterrupt) as error:
        return launch.report(error)


if __name__ == "__main__":
    sys.exit(main())

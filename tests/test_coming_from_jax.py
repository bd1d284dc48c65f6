"""docs/coming-from-jax.md: its lines run, one after the other, and every row of its table is among them."""

import re
from pathlib import Path

import jax_devices  # noqa: F401
import torch.distributed as dist

PAGE = (Path(__file__).parents[1] / "docs" / "coming-from-jax.md").read_text()
BLOCKS = re.findall(r"^```python ?(\S*)\n(.*?)^```$", PAGE, re.M | re.S)


def test_the_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    try:
        for name, text in BLOCKS:
            exec(compile(text, f"coming-from-jax.md, {name or 'imports'}", "exec"), space)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-0", "step-1"]


def test_every_row_has_lines():
    rows = [line.split("|")[1] for line in PAGE.split("|---|---|\n")[1].split("\n\n")[0].splitlines()]
    lacking = [row for row in rows if not any(name and name.lower() in row.lower() for name, _ in BLOCKS)]
    assert len(rows) == 14 and not [row for row in lacking if "a function in JAX" not in row]

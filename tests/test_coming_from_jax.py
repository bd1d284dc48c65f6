"""docs/coming-from-jax.md: its lines run, one after the other; the rows of its table that have lines are named."""

import re
from pathlib import Path

import jax_devices  # noqa: F401
import pytest
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


@pytest.mark.parametrize(
    "known", ["tree.map", "jit", "donate_argnums", "NamedSharding", "scan", "grad", "optax", "orbax", "from_jax_fn"]
)
def test_what_the_table_names_has_lines(known):
    assert known in dict(BLOCKS) and known in PAGE.split("## Trees")[0]

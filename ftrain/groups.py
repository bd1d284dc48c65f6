"""Which parameters learn, and how fast: what `--freeze` and `--lr-factor` say of names."""

import difflib
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from .specs import ParamSpec, Specs


def regrouped(specs: Specs, freeze: Sequence[str], factors: Sequence[tuple[str, float]]) -> dict[str, ParamSpec]:
    """The specs with these factors on the learning rate in place of their own; of several that fit a name the last
    one holds, and `freeze` over all.

    A pattern fits a name that it is, or begins at a dot (`model.visual`), or in whole by * and ? (`*.bias`).
    Raises ValueError for a pattern that fits none, with names that are near.
    """
    out = dict(specs)
    for flag, pattern, factor in [*(("--lr-factor", *f) for f in factors), *(("--freeze", p, 0.0) for p in freeze)]:
        found = [name for name in out if fits(pattern, name)]
        if not found:
            raise ValueError(f"{flag} {pattern}: no parameter is called so{_near(pattern, specs)}")
        out |= {name: replace(out[name], lr=factor) for name in found}
    return out


def fits(pattern: str, name: str) -> bool:
    return name == pattern or name.startswith(pattern.rstrip(".") + ".") or fnmatchcase(name, pattern)


def _near(pattern: str, specs: Specs) -> str:
    """Names, and beginnings of names, like the pattern; else the first part of every name."""
    starts = {".".join(parts[:n]) for parts in (name.split(".") for name in specs) for n in range(1, len(parts) + 1)}
    near = difflib.get_close_matches(pattern, sorted(starts), n=3)
    if near:
        return f"; near are {', '.join(near)}"
    return f"; names begin with {', '.join(dict.fromkeys(name.partition('.')[0] for name in specs))}"

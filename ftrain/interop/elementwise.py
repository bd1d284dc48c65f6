"""Whether a JAX function of sharded arrays does to a shard what it does to the whole: element by element."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Operators whose result, at each place, comes from their operands' elements at that place.
ELEMENTWISE = frozenset(
    "abs add add_any and atan2 cbrt ceil clamp convert_element_type copy cos cosh div eq erf erf_inv erfc exp exp2 "
    "expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not or pow "
    "reduce_precision rem round rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan tanh xor".split()
)
CALLS = frozenset("jit closed_call remat2 custom_jvp_call custom_vjp_call".split())


class _Origin(NamedTuple):
    """What is known of a value. sharded: the cut parameters that it is of, at each place of that place. uniform: one
    number everywhere, the same whatever is cut. free: the same array whatever is cut."""

    sharded: frozenset[str]
    uniform: bool
    free: bool


class _Different(Exception):
    """Two traces that do not do the same; `within`: where."""

    def __init__(self, within: tuple):
        self.within = within


def check_elementwise(
    fn: Callable, whole: Sequence[Any], part: Sequence[Any], of: Sequence[str | None], cut: Collection[str]
) -> None:
    """Raises ValueError, naming the function that does it and the parameter, where `fn` would give another result for
    shards than for whole arrays.

    whole, part: its arguments, trees of jax.ShapeDtypeStruct, with whole parameters and with parts of those in `cut`. of:
    of each leaf the parameter whose shape it has, or None.
    fn is traced with both: what looks at a size (in Python, where no operator shows it) is not the same in the two.
    """
    traces = [jax.make_jaxpr(fn)(*arguments) for arguments in (part, whole)]
    known = [
        _Origin(frozenset([name]), False, False) if name in cut else _Origin(frozenset(), not leaf.ndim, True)
        for name, leaf in zip(of, jax.tree.leaves(part), strict=True)
    ]
    try:
        results = _walk(*traces, known, ())
    except _Different as error:
        who = _who(error.within) or "the transformation"
        raise ValueError(
            f"{who} does something else for a part of a parameter than for all of it, by its size or shape: with a plan "
            "that shards it would be another optimizer"
        ) from None
    for out in results:
        if not (out.sharded or out.free or out.uniform):
            raise ValueError("the transformation makes an array by the size of what a rank holds, which ranks have parts of")


def _walk(part: ClosedJaxpr, whole: ClosedJaxpr, arguments: Sequence[_Origin], within: tuple) -> list[_Origin]:
    """Of each result. within: the equations that this is called by, the innermost first."""
    if len(part.jaxpr.eqns) != len(whole.jaxpr.eqns) or len(part.consts) != len(whole.consts):
        pairs = zip(part.jaxpr.eqns, whole.jaxpr.eqns)
        first = next((a for a, b in pairs if a.primitive is not b.primitive), None)
        raise _Different((first, *within) if first is not None else within)
    same = [(c, _equal(c, d)) for c, d in zip(part.consts, whole.consts)]
    consts = [_Origin(frozenset(), free and not getattr(c, "ndim", 0), free) for c, free in same]
    origin = dict(zip([*part.jaxpr.constvars, *part.jaxpr.invars], [*consts, *arguments], strict=True))
    twin = dict(zip([*whole.jaxpr.constvars, *whole.jaxpr.invars], [*part.jaxpr.constvars, *part.jaxpr.invars], strict=True))

    def read(v, w, here: tuple) -> _Origin:
        if isinstance(v, Literal) and isinstance(w, Literal) and _equal(v.val, w.val):
            return _Origin(frozenset(), not getattr(v.val, "ndim", 0), True)
        if isinstance(v, Literal) or isinstance(w, Literal) or twin.get(w) is not v:
            raise _Different(here)
        return origin[v]

    for a, b in zip(part.jaxpr.eqns, whole.jaxpr.eqns):
        here = (a, *within)
        if a.primitive is not b.primitive or len(a.invars) != len(b.invars) or len(a.outvars) != len(b.outvars):
            raise _Different(here)
        given = [read(v, w, here) for v, w in zip(a.invars, b.invars)]
        origin |= zip(a.outvars, _of_equation(a, b, given, here), strict=True)
        twin |= zip(b.outvars, a.outvars)
    return [read(v, w, within) for v, w in zip(part.jaxpr.outvars, whole.jaxpr.outvars, strict=True)]


def _of_equation(a, b, given: Sequence[_Origin], here: tuple) -> list[_Origin]:
    name, sharded = a.primitive.name, frozenset().union(*(g.sharded for g in given))
    if name in CALLS:
        return _walk(next(_inner(a.params.values())), next(_inner(b.params.values())), given, here)
    if name == "cond":
        if given[0].sharded or not given[0].uniform:
            _refuse(here, given[0].sharded)
        branches = [_walk(p, q, given[1:], here) for p, q in zip(a.params["branches"], b.params["branches"], strict=True)]
        return [_either(of) for of in zip(*branches)]
    elementwise = name in ELEMENTWISE
    if elementwise and _simple(a.params) != _simple(b.params):
        raise _Different(here)
    if sharded:
        # Of one parameter at a time, for others may be cut elsewhere; beside what is the same number everywhere.
        if not (elementwise and len(sharded) == 1 and all(g.sharded or g.uniform for g in given)):
            _refuse(here, sharded)
        return [_Origin(sharded, False, False) for _ in a.outvars]
    spread = elementwise or name == "broadcast_in_dim"
    inputs_free, inputs_uniform = all(g.free for g in given), all(g.uniform for g in given)
    # Parameters of an equation too: a size may stand there. Those of what only spreads a number are its shape.
    free = inputs_free and (spread or _simple(a.params) == _simple(b.params))
    found = []
    for v, w in zip(a.outvars, b.outvars):
        as_it_was = free and v.aval.shape == w.aval.shape
        uniform = (as_it_was and not v.aval.ndim) or (spread and inputs_uniform)
        found.append(_Origin(frozenset(), uniform, as_it_was))
    return found


def _either(of: Sequence[_Origin]) -> _Origin:
    """Of what is one or the other."""
    sharded = frozenset().union(*(o.sharded for o in of))
    return _Origin(sharded, all(o.uniform for o in of), all(o.free for o in of))


def _inner(values: Iterable[Any]) -> Iterator[ClosedJaxpr]:
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value
        elif isinstance(value, Jaxpr):
            yield ClosedJaxpr(value, ())


def _simple(params: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) for key, value in params.items()}


def _equal(a: Any, b: Any) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _refuse(within: tuple, names: frozenset[str]) -> None:
    name, more = min(names, default="a parameter"), f" and {len(names) - 1} more" * (len(names) > 1)
    raise ValueError(
        f"{_who(within) or 'the transformation'} takes values of all of a parameter together ({within[0].primitive.name}), "
        f"but a rank holds only a part of {name}{more}: on shards it would be another optimizer. Leave it out (--clip clips "
        "by the global norm, rightly), or use a plan that shards nothing"
    )


def _who(within: tuple) -> str | None:
    """The transformation that equations come from: the innermost function that made an `update_fn`."""
    for eqn in within:
        traceback = getattr(eqn.source_info, "traceback", None)
        for frame in traceback.frames if traceback else ():
            outer, made, inner = frame.function_name.partition(".<locals>.")
            if made and inner.startswith(("update", "init")) and outer != "with_extra_args_support":
                return outer
    return None

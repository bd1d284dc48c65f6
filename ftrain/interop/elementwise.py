"""Whether a JAX function of sharded arrays does to a shard what it does to the whole: element by element."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Operators whose result, at each place, comes from their operands' elements at that place.
ELEMENTWISE = frozenset(
    "abs add add_any and atan2 cbrt ceil clamp convert_element_type copy copy_p cos cosh div eq erf erf_inv erfc exp exp2 "
    "expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not or pow "
    "reduce_precision rem round rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan tanh xor".split()
)


class _Origin(NamedTuple):
    """What is known of a value: the sharded parameters that it is of, and whether it is the same number everywhere."""

    sharded: frozenset[str]
    uniform: bool


def check_elementwise(fn: Callable, arguments: Sequence[Any], of: Sequence[str | None], sharded: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the function that does it and the parameter, where `fn(*arguments)` would give another
    result for shards than for whole arrays.

    arguments: trees of jax.ShapeDtypeStruct. of: of each of their leaves the parameter whose shape it has, or None.
    sharded: the parameters, among them, of which a rank holds a part.
    """
    closed = jax.make_jaxpr(fn)(*arguments)
    leaves = jax.tree.leaves(arguments)
    known = [_given(name if name in sharded else None, leaf.ndim) for name, leaf in zip(of, leaves, strict=True)]
    _walk(closed.jaxpr, _of_constants(closed), known)


def _given(name: str | None, ndim: int) -> _Origin:
    return _Origin(frozenset() if name is None else frozenset([name]), ndim == 0)


def _of_constants(closed: ClosedJaxpr) -> list[_Origin]:
    return [_given(None, getattr(c, "ndim", 0)) for c in closed.consts]


def _walk(jaxpr: Jaxpr, consts: Sequence[_Origin], arguments: Sequence[_Origin], within: tuple = ()) -> list[_Origin]:
    """Of each result. within: the equations that this is called by, the innermost first."""
    origin = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, arguments, strict=True))

    def read(v) -> _Origin:
        return _given(None, getattr(v.val, "ndim", 0)) if isinstance(v, Literal) else origin[v]

    for eqn in jaxpr.eqns:
        given = [read(v) for v in eqn.invars]
        for v, found in zip(eqn.outvars, _of_equation(eqn, given, within), strict=True):
            origin[v] = found
    return [read(v) for v in jaxpr.outvars]


def _of_equation(eqn, given: Sequence[_Origin], within: tuple) -> list[_Origin]:
    here = (eqn, *within)
    sharded = frozenset().union(*(g.sharded for g in given))
    inner = _inner(eqn)
    if inner is not None:  # a function called
        return _walk(inner.jaxpr, _of_constants(inner), given, here)
    if eqn.primitive.name == "cond":
        if given[0].sharded:
            _refuse(here, given[0].sharded)
        branches = [_walk(b.jaxpr, _of_constants(b), given[1:], here) for b in eqn.params["branches"]]
        return [_Origin(frozenset().union(*(o.sharded for o in of)), all(o.uniform for o in of)) for of in zip(*branches)]
    elementwise = eqn.primitive.name in ELEMENTWISE
    spread = eqn.primitive.name == "broadcast_in_dim" and given[0].uniform and not eqn.invars[0].aval.ndim
    if sharded:
        # Of one parameter at a time, for others may be cut elsewhere; beside what is the same number everywhere.
        beside = all(g.sharded or g.uniform for g in given)
        if not (elementwise and len(sharded) == 1 and beside):
            _refuse(here, sharded)
        return [_Origin(sharded, False) for _ in eqn.outvars]
    uniform = spread or (elementwise and all(g.uniform for g in given))
    return [_Origin(frozenset(), uniform or not v.aval.ndim) for v in eqn.outvars]


def _inner(eqn) -> ClosedJaxpr | None:
    """What a call calls; None where the equation is no plain call."""
    if eqn.primitive.name in ("jit", "pjit", "closed_call", "core_call", "remat", "custom_jvp_call", "custom_vjp_call"):
        found = next((eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params), None)
        return ClosedJaxpr(found, ()) if isinstance(found, Jaxpr) else found
    return None


def _refuse(within: tuple, names: frozenset[str]) -> None:
    name, more = min(names), f" and {len(names) - 1} more" * (len(names) > 1)
    who = next(filter(None, map(_maker, within)), "the transformation")
    raise ValueError(
        f"{who} takes values of all of a parameter together ({within[0].primitive.name}), but a rank holds only a part of "
        f"{name}{more}: on shards it would be another optimizer. Leave it out (--clip clips by the global norm, rightly), "
        "or use a plan that shards nothing"
    )


def _maker(eqn) -> str | None:
    """The transformation that an equation comes from: the innermost function that made an `update_fn`."""
    traceback = getattr(eqn.source_info, "traceback", None)
    for frame in traceback.frames if traceback else ():
        outer, made, inner = frame.function_name.partition(".<locals>.")
        if made and inner.startswith(("update", "init")) and outer != "with_extra_args_support":
            return outer
    return None

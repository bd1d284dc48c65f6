"""optax in the train step: a GradientTransformation in place of AdamW, on the sharded state."""

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import jax
import jax.numpy as jnp
import optax
import torch
from jax.tree_util import DictKey, keystr, tree_flatten_with_path
from torch import Tensor

from ..config import TrainConfig, did_you_mean
from ..files import import_function
from ..optim import Optimizer
from ..specs import ParamSpec, Specs, trainable, zeros
from .elementwise import check_elementwise
from .operators import aligned, shape_of, unique
from .trees import from_jax, to_jax

NUMBERS = "optax"  # the kind of what has no parameter's shape: counts, decays
# Those of optax whose updates are a learning rate times something else: with another learning rate they are the same.
KNOWN = (
    "adabelief", "adadelta", "adam", "adamax", "adamaxw", "adamw", "adan", "amsgrad", "lamb", "lion", "nadam", "nadamw",
    "novograd", "radam", "rmsprop", "sgd", "sign_sgd", "signum", "sm3", "yogi",
)  # fmt: skip


def from_optax(transform: optax.GradientTransformation) -> Optimizer:
    """Any optax transformation as the optimizer of a `Recipe`: `Recipe(adam, schedule, optimizer=from_optax(...))`.

    Its updates are multiplied by the learning rate, which is the recipe's: give optax 1. Gradients are clipped before
    by the recipe's global norm. What it keeps of each parameter is sharded as the parameter is, in `state.extra`; the
    update writes there and to the parameters in place, after JAX has computed them, so that for a moment both are
    there twice.
    It runs on each rank's shards: where it would need more than an element at a time (a norm, a factored moment, a
    matrix's orthogonalisation, random numbers) of a parameter that is sharded, or does something else for another size (a
    mask by `x.size`), ValueError names what does and the parameter. Where nothing is sharded, everything goes. ValueError
    too for state that a checkpoint would not hold exactly: floats of 64 bits, unsigned integers such as a random key.
    Whole numbers are held exactly to 2^24.
    """
    calls: dict[tuple, Callable] = {}

    def kinds(specs: Specs) -> dict[str, dict[str, ParamSpec]]:
        found: dict[str, dict[str, ParamSpec]] = {}
        for (kind, name), leaf in _leaves(transform, _whole(specs)):
            found.setdefault(kind, {})[name] = _spec(None if kind == NUMBERS else specs[name], leaf)
        return found

    def init(specs: Specs, params: Mapping[str, Tensor], cut: Collection[str]) -> dict[str, dict[str, Tensor]]:
        trained = {name: params[name] for name in trainable(specs)}
        whole = _whole(specs)
        places = [place for place, _ in _leaves(transform, whole)]
        check_elementwise(transform.init, [whole], [_parts(whole, cut)], sorted(whole), {*cut} & whole.keys())
        device = next(iter(trained.values())).device
        state = transform.init({name: to_jax(t.detach(), copy=True) for name, t in trained.items()})
        values: dict[str, dict[str, Tensor]] = {}
        for (kind, name), leaf in zip(places, jax.tree.leaves(state), strict=True):
            value = from_jax(leaf).to(device).clone()
            values.setdefault(kind, {})[name] = value if value.ndim else value[None]
        return values

    def update_(
        lr: Tensor, specs: Specs, params: Mapping[str, Tensor], grads: Mapping[str, Tensor],
        kept: Mapping[str, Mapping[str, Tensor]], scale: Tensor, apply: Tensor, cut: Collection[str],
    ) -> None:  # fmt: skip
        key = tuple((n, tuple(params[n].shape), tuple(specs[n].shape), specs[n].lr, n in cut) for n in grads)
        if key not in calls:
            calls[key] = _operator(transform, specs, {name: params[name] for name in grads}, cut)
        calls[key](params, grads, kept, lr, scale, apply)

    return Optimizer(kinds, init, update_)


def _operator(
    transform: optax.GradientTransformation, specs: Specs, params: Mapping[str, Tensor], cut: Collection[str]
) -> Callable:
    """The update as one operator of the graph, which writes in place, for these parameters of a rank."""
    names = list(params)
    whole = _whole(specs)
    leaves_of_whole = _leaves(transform, whole)
    places = [place for place, _ in leaves_of_whole]
    part = _parts(whole, cut)  # of any rank: all ranks are to refuse the same
    of_whole, of_part, state = (
        jax.eval_shape(transform.init, shapes) for shapes in (whole, part, {n: shape_of(t) for n, t in params.items()})
    )
    structure = jax.tree.structure(of_whole)
    for ((kind, name), large), small in zip(leaves_of_whole, jax.tree.leaves(of_part), strict=True):
        if kind == NUMBERS and large.shape != small.shape:
            raise ValueError(
                f"the optimizer keeps {name} of shape {list(large.shape)}, which is not its parameter's: with a plan that "
                "shards that parameter it would be another optimizer"
            )
    of_trees = sorted(names)  # the order of JAX's dicts
    of = [*of_trees, *(None if kind == NUMBERS else name for kind, name in places), *of_trees]
    check_elementwise(
        lambda g, s, p: transform.update(g, s, p), [whole, of_whole, whole], [part, of_part, part], of,
        {*cut} & whole.keys(),
    )  # fmt: skip
    factors = [specs[name].lr for name in names]

    @jax.jit
    def updated(values, grads, leaves, lr, scale, apply):
        before = jax.tree.unflatten(structure, [x.reshape(s.shape) for x, s in zip(leaves, jax.tree.leaves(state))])
        given = {name: g / scale for name, g in zip(names, grads)}
        updates, after = transform.update(given, before, dict(zip(names, values)))
        new = [p + (lr * factor * updates[name]).astype(p.dtype) for name, p, factor in zip(names, values, factors)]
        kept = [x.reshape(old.shape).astype(old.dtype) for x, old in zip(jax.tree.leaves(after), leaves)]
        choose = lambda new, old: [jnp.where(apply, n, o) for n, o in zip(new, old)]  # noqa: E731
        return choose(new, values), choose(kept, leaves)

    @torch.library.custom_op(unique("optax") + "_", mutates_args=("params", "kept"))
    def op(
        params: list[Tensor], grads: list[Tensor], kept: list[Tensor], lr: Tensor, scale: Tensor, apply: Tensor
    ) -> None:
        arrays = to_jax([[aligned(t) for t in of] for of in (params, grads, kept)])
        found = from_jax(jax.block_until_ready(updated(*arrays, *to_jax([lr, scale, apply], copy=True))))
        torch._foreach_copy_([*params, *kept], [*found[0], *found[1]])

    @op.register_fake
    def _(params, grads, kept, lr, scale, apply):
        return None

    def call(params, grads, kept, *numbers):
        op([params[name] for name in names], [grads[name] for name in names], [kept[k][n] for k, n in places], *numbers)

    return call


def _whole(specs: Specs) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in trainable(specs).items()}


def _parts(whole: Mapping[str, jax.ShapeDtypeStruct], cut: Collection[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """With small parameters in place of those that are cut."""
    return {
        name: jax.ShapeDtypeStruct(tuple(min(n, 2) if n != 2 else 1 for n in of.shape), of.dtype) if name in cut else of
        for name, of in whole.items()
    }


def _leaves(
    transform: optax.GradientTransformation, whole: Mapping[str, jax.ShapeDtypeStruct]
) -> list[tuple[tuple[str, str], jax.ShapeDtypeStruct]]:
    """Of each leaf of the state: its kind and name, and its shape for whole parameters. What has a parameter's shape, at
    that parameter's place in a tree of them, has its name; all else is of the kind NUMBERS. Raises ValueError for two of
    one name, and for what a checkpoint would not hold exactly."""
    found = []
    for path, leaf in tree_flatten_with_path(jax.eval_shape(transform.init, dict(whole)))[0]:
        last = path[-1] if path else None
        if isinstance(last, DictKey) and last.key in whole and leaf.shape == whole[last.key].shape:
            found.append(((_dotted(path[:-1]), last.key), leaf))
        else:
            found.append(((NUMBERS, _dotted(path)), leaf))
    places = Counter(place for place, _ in found)
    if twice := [name for (_, name), n in places.items() if n > 1]:
        raise ValueError(f"the optimizer keeps two tensors called {twice[0]}: give its parts other labels")
    for (kind, name), leaf in found:
        if str(leaf.dtype) not in ("float32", "bfloat16", "float16", "int32", "int16", "int8", "bool"):
            raise ValueError(f"the optimizer keeps {kind}, {name}, as {leaf.dtype}, which a checkpoint would not hold exactly")
    return found


def _dotted(path: tuple) -> str:
    """A place in the state, fit for a file's name."""
    return f"{NUMBERS}.{quote(keystr(path, simple=True, separator='.'), safe='.')}"


def _spec(param: ParamSpec | None, leaf: jax.ShapeDtypeStruct) -> ParamSpec:
    return replace(param, parts=(), within=None) if param else ParamSpec(leaf.shape or (1,), zeros)


# --- From the command line


def find_optimizer(cfg: TrainConfig, specs: Specs) -> tuple[Optimizer, str]:
    """`--optimizer optax:NAME`, an optimizer of optax, or `optax:FILE.py:FUNCTION`, which takes the specs and returns a
    transformation; and it in words.

    One of optax (KNOWN) has learning rate 1, for the schedule is ours, and of beta1, beta2, eps and weight_decay (of what
    decays) those that it knows. Raises ValueError naming what is valid.
    """
    which = cfg.optimizer.removeprefix("optax:")
    if cfg.optimizer_state != "fp32":
        raise ValueError(f"--optimizer-state {cfg.optimizer_state}: of AdamW alone; optax keeps its state as it does")
    if ":" in which:
        path, _, function = which.rpartition(":")
        transform, words = import_function(path, function, f"--optimizer {cfg.optimizer}")(specs), which
        if not isinstance(transform, optax.GradientTransformation | optax.GradientTransformationExtraArgs):
            raise ValueError(f"--optimizer {cfg.optimizer}: {function} returns {transform!r}, and no GradientTransformation")
        return from_optax(transform), words
    known = [name for name in KNOWN if hasattr(optax, name)]
    if which not in known:
        near = did_you_mean(which, known)
        raise ValueError(
            f"--optimizer {cfg.optimizer}: no optimizer that is known to be the same under our learning rate{near} (valid: "
            f"adamw; optax: and {', '.join(known)}, or FILE.py:FUNCTION)"
        )
    takes = inspect.signature(getattr(optax, which)).parameters
    decays = {name: spec.decay for name, spec in trainable(specs).items()}
    ours: dict[str, Any] = {"b1": cfg.beta1, "b2": cfg.beta2, "eps": cfg.eps, "weight_decay": cfg.weight_decay}
    ours |= {"mask": decays, "weight_decay_mask": decays}
    if "weight_decay" in takes and not {"mask", "weight_decay_mask"} & takes.keys() and cfg.weight_decay:
        raise ValueError(
            f"--optimizer {cfg.optimizer} --weight-decay {cfg.weight_decay:g}: it would decay norms and biases too, and "
            "cannot be told not to: --weight-decay 0"
        )
    given = {key: value for key, value in ours.items() if key in takes}
    said = ", ".join(f"{key}={value}" for key, value in given.items() if not key.endswith("mask"))
    return from_optax(getattr(optax, which)(learning_rate=1.0, **given)), f"optax.{which}({said})"

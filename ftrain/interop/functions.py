"""JAX functions as differentiable torch operators."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..outline import exact
from .operators import aligned, shape_of, unique
from .trees import from_jax, to_jax


def from_jax_fn(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A pure, jittable JAX function of arrays (trees of them too) -> the same function of torch tensors.

    It is one operator of torch's, `ftrain::jax_...`, with the gradient that jax.vjp has: a compiled train step calls
    it, and no graph breaks. The backward computes the forward again. Of a sharded job each rank calls it with what it
    holds; on a mesh, `fn` may only mix what a rank has whole. Integer inputs have no gradient, gradients of gradients
    there are none: asking for them raises RuntimeError. Sizes must be known when it is captured.
    Raises ValueError for what `to_jax` cannot take, and for a result that is no tree of arrays.
    """
    forms: dict[tuple, Callable] = {}  # one operator for each form of the arguments

    def call(*args):
        leaves, tree = tree_flatten(args)
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        others = tuple((i, leaf) for i, leaf in enumerate(leaves) if i not in where)
        key = tree, tuple((i, exact(leaf)) for i, leaf in others)
        if key not in forms:

            def flat(*arrays):
                filled = dict(others) | dict(zip(where, arrays))
                return fn(*tree_unflatten([filled[i] for i in range(len(leaves))], tree))

            forms[key] = _operator(flat, getattr(fn, "__name__", "fn"))
        return forms[key]([leaves[i] for i in where])

    return torch.compiler.allow_in_graph(call)  # Dynamo is not to look into it


def _operator(fn: Callable, name: str) -> Callable[[Sequence[Tensor]], Any]:
    """Of a function of arrays. What it returns is found out by shape alone, at the first call with each."""
    stem = "".join(c if c.isalnum() and c.isascii() else "_" for c in name)
    op_name = unique(f"jax_{stem}")
    forward = jax.jit(lambda *xs: jax.tree.leaves(fn(*xs)))

    @jax.jit
    def gradient(xs, above):
        learning = [i for i, x in enumerate(xs) if jnp.issubdtype(x.dtype, jnp.floating)]

        def of_learning(*values):
            given = list(xs)
            for i, value in zip(learning, values):
                given[i] = value
            return [out for out in forward(*given) if jnp.issubdtype(out.dtype, jnp.floating)]

        found = iter(jax.vjp(of_learning, *(xs[i] for i in learning))[1](above))
        return [next(found) if i in learning else jnp.zeros_like(x) for i, x in enumerate(xs)]

    @torch.library.custom_op(op_name, mutates_args=())
    def op(xs: list[Tensor]) -> list[Tensor]:
        return _run(lambda arrays: forward(*arrays), xs)

    @op.register_fake
    def _(xs):
        return [_like(out, xs) for out in jax.eval_shape(forward, *map(_known, xs))]

    @torch.library.custom_op(f"{op_name}_backward", mutates_args=())
    def backward(xs: list[Tensor], above: list[Tensor]) -> list[Tensor]:
        return _run(gradient, xs, above)

    @backward.register_fake
    def _(xs, above):
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in xs]

    def setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs[0])
        ctx.outputs = [(out.shape, out.dtype, out.device) for out in output]
        ctx.mark_non_differentiable(*(out for out in output if not _learns(out)))

    def of_gradients(ctx, above):
        xs = ctx.saved_tensors
        given = [
            torch.zeros(shape, dtype=dtype, device=device) if g is None else g
            for g, (shape, dtype, device) in zip(above, ctx.outputs)
            if dtype.is_floating_point
        ]
        grads = backward(list(xs), given)
        return [g if _learns(x) else None for g, x in zip(grads, xs)]

    op.register_autograd(of_gradients, setup_context=setup)

    def call(xs: Sequence[Tensor]):
        found, spec = jax.tree.flatten(jax.eval_shape(fn, *map(_known, xs)))
        if not found:
            raise ValueError(f"{name} returns no array")
        if any(jnp.issubdtype(out.dtype, jnp.complexfloating) for out in found):
            raise ValueError(f"{name} returns complex numbers, of whose gradients torch and JAX mean different things")
        return jax.tree.unflatten(spec, op(list(xs)))

    return call


def _learns(t: Tensor) -> bool:
    return t.dtype.is_floating_point


def _known(x: Tensor) -> jax.ShapeDtypeStruct:
    if any(not isinstance(n, int) for n in x.shape):
        raise ValueError(f"a JAX function is given {tuple(x.shape)}: sizes must be known, and not depend on data")
    if x.dtype.is_complex:
        raise ValueError(f"a JAX function is given {x.dtype}: torch and JAX mean different gradients of complex numbers")
    return shape_of(x)


def _like(out: jax.ShapeDtypeStruct, xs: Sequence[Tensor]) -> Tensor:
    return torch.empty(out.shape, dtype=getattr(torch, str(out.dtype)), device=xs[0].device if xs else None)


def _run(fn: Callable, *given: Sequence[Tensor]) -> list[Tensor]:
    """`fn` of the arrays in lists of tensors -> tensors of their own: JAX may hand on what it was given."""
    taken = [[aligned(x) for x in xs] for xs in given]
    outs = from_jax(jax.block_until_ready(fn(*(to_jax(xs) for xs in taken))))
    seen = {x.data_ptr() for xs in taken for x in xs if x.numel()}
    result = []
    for out in outs:
        result.append(out.clone() if out.numel() and out.data_ptr() in seen else out)
        seen.add(result[-1].data_ptr())
    return result

"""Parts of a graph that repeat: a layer's forward and its backward, each one node of the graph around it.

Under capture (graph.py) `differentiable` traces a function and its gradient on their own, cuts the trace where the
backward begins, and leaves two nodes in the graph around it. What the backward takes from the forward crosses between
these nodes alone. Equal regions have equal keys: they are compiled once (program.py), however many layers there are.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing, get_proxy_mode, has_proxy_slot, make_fx, track_tensor_tree,
)  # fmt: skip
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils._pytree import tree_flatten, tree_unflatten

from .nodes import mutates, sources
from .offload import arrived, to_device, to_host
from .outline import constant, exact, outline


class Region:
    """A flat graph of ATen operators -> a tuple. As a node's target it runs that graph."""

    def __init__(self, name: str, graph: fx.Graph, owner: torch.nn.Module):
        self.__name__, self.__qualname__, self.__module__ = name, name, __name__
        self.module = fx.GraphModule(owner, graph)
        self.key = structure(self.module)

    def __call__(self, *args):
        return self.module(*args)


def capturing() -> bool:
    """Whether a graph is being captured, and a region would be a node of it."""
    return get_proxy_mode() is not None


class Weights(NamedTuple):
    """How a function comes by its parameters, from what this rank holds of them.

    start: shards -> what was gathered, by collectives of the graph around; once for the forward and once for the
    backward, so that nothing gathered is kept. assemble: that -> the parameters, within the region. take_apart:
    gradients of the parameters -> what is to be reduced, within the region, `rows` in number. finish: that ->
    gradients of the shards. None stands for a gradient that there is none of. layout: equal where these functions do
    the same.
    """

    layout: tuple
    shards: Sequence[Tensor]
    start: Callable[[Sequence[Tensor]], list[Tensor]]
    assemble: Callable[[Sequence[Tensor]], list[Tensor]]
    take_apart: Callable[[Sequence[Tensor | None]], list[Tensor | None]]
    finish: Callable[[Sequence[Tensor | None]], list[Tensor | None]]
    rows: int


def differentiable(
    fn: Callable, keep: Callable, name: str, x: Tensor, weights: Weights, learn: Sequence[bool], known: dict,
    offload: bool = False,
) -> Any:  # fmt: skip
    """`fn(x, *parameters)` as a region, with a region for its gradient.

    fn: returns a pytree. Tensors that it takes from around itself become inputs too.
    keep: what makes of fn a function that recomputes some of it in its backward.
    learn: which of the parameters have a gradient. known: what was captured before; what does the same is not
    captured again. offload: whether what is left for the backward waits on the host.
    """
    with torch.no_grad():
        gathered = weights.start(weights.shards)
    pair = _known(fn, keep, name, x, gathered, weights, learn, known)
    if pair.backward is None:
        outs, _ = _emit(pair.forward, _proxies([x, *gathered, *pair.closures]), len(pair.differentiable))
    else:
        outs = _Differentiable.apply(pair, gathered, weights, offload, x, *weights.shards, *pair.closures)
    return tree_unflatten([outs[at.index] if isinstance(at, _Output) else at for at in pair.leaves], pair.spec)


class _Output(NamedTuple):
    """A tensor among the outputs of a region."""

    index: int


class _Pair(NamedTuple):
    """The regions of a function and of its gradient.

    forward: x, gathered, closures -> outputs, what is saved. backward: what `wants` lists -> gradients, as `gives`
    lists them: ("x", 0), ("row", i) and ("closure", i); besides these `wants` has ("saved", i), an output of the
    forward, and ("above", i), the gradient of one.
    """

    forward: Region
    backward: Region | None
    closures: list[Tensor]
    differentiable: list[bool]  # of each output
    leaves: list[Any]  # of what the function returns: an _Output, or what is no tensor
    spec: Any
    wants: list[tuple[str, int]]
    gives: list[tuple[str, int]]


def _known(
    fn: Callable, keep: Callable, name: str, x: Tensor, gathered: Sequence[Tensor], weights: Weights,
    learn: Sequence[bool], known: dict,
) -> _Pair:  # fmt: skip
    """The regions of `fn`: those of a function with the same outline, or captured."""
    outer = get_proxy_mode().tracer
    grad = torch.is_grad_enabled()
    with disable_proxy_modes_tracing():
        with torch.no_grad():
            params = weights.assemble([t.detach() for t in gathered])
        learning = [x.requires_grad and grad, *(grad and learns for learns in learn)]
        inputs = [t.detach().requires_grad_(of) for t, of in zip([x, *params], learning, strict=True)]
        found = outline(fn, inputs)
    around = [has_proxy_slot(t, outer) for t in found.outside]
    key = (found.key, tuple(around), weights.layout)
    if key not in known:
        pair = _capture(keep(fn), name, x, gathered, weights, learn)
        places = {id(t): i for i, t in enumerate(found.outside)}
        if _sizes(_values(pair)) - _sizes([x, *gathered, *found.outside]):
            return pair  # sizes of its own: another layer's may be others
        known[key] = pair, [places[id(t)] for t in pair.closures]
    pair, order = known[key]
    return pair._replace(closures=[found.outside[i] for i in order])


def _values(pair: _Pair) -> list:
    """What the regions give to the graph around, as fake tensors."""
    outputs = _outputs(pair.forward)[: len(pair.differentiable)]
    return outputs + (_outputs(pair.backward) if pair.backward else [])


def _outputs(region: Region) -> list:
    return [n.meta.get("val") for n in region.module.graph.output_node().args[0]]


def _sizes(values: Sequence) -> set:
    """The symbols that sizes of tensors are made of."""
    return set().union(*(free_symbols([*v.shape, *v.stride()]) for v in values))


def _capture(
    fn: Callable, name: str, x: Tensor, gathered: Sequence[Tensor], weights: Weights, learn: Sequence[bool]
) -> _Pair:
    outer = get_proxy_mode().tracer
    seen: dict[str, Any] = {}

    def joint(x, *gathered):
        tracer = get_proxy_mode().tracer
        with torch.no_grad():
            params = [t.view_as(t) for t in weights.assemble(gathered)]
        # They depend on what is gathered alone: the backward makes them again.
        seen["prologue"] = {n.name for n in tracer.graph.nodes}
        x = x.requires_grad_(x_learns)
        params = [t.requires_grad_(learns) for t, learns in zip(params, learn, strict=True)]
        flat, seen["spec"] = tree_flatten(fn(x, *params))
        outputs = [t for t in flat if isinstance(t, Tensor)]
        order = iter(range(len(outputs)))
        seen["leaves"] = [_Output(next(order)) if isinstance(t, Tensor) else t for t in flat]
        seen["differentiable"] = [t.requires_grad for t in outputs]
        # Tensors of the graph around: the trace took them for constants.
        closures = [t for t in tracer.tensor_attrs if has_proxy_slot(t, outer)]
        seen["closures"] = closures
        ends = [t for t in outputs if t.requires_grad]
        above = [torch.empty_like(t) for t in ends]
        learning = [t for t in [x, *params, *closures] if t.requires_grad]
        if not (ends and learning):
            return outputs, [], [], [], []
        found = iter(torch.autograd.grad(ends, learning, above, allow_unused=True))
        grads = [next(found) if t.requires_grad else None for t in [x, *params, *closures]]
        with torch.no_grad():
            rows = weights.take_apart(grads[1 : 1 + len(params)])
        return outputs, above, grads[:1], rows, grads[1 + len(params) :]

    x_learns = torch.is_grad_enabled() and x.requires_grad
    learn = [torch.is_grad_enabled() and learns for learns in learn]
    with disable_proxy_modes_tracing():
        traced = make_fx(joint, record_module_stack=False)(x.detach(), *(t.detach() for t in gathered))
    return _split(name, traced, seen)


def _split(name: str, traced: fx.GraphModule, seen: dict[str, Any]) -> _Pair:
    """The trace, cut where the backward begins."""
    nodes = list(traced.graph.nodes)
    outputs, above, of_x, of_rows, of_closures = traced.graph.output_node().args[0]
    closures: list[Tensor] = seen["closures"]
    placeholders = [n for n in nodes if n.op == "placeholder"]
    source = {n: ("row", i) for i, n in enumerate(placeholders, -1)} | {placeholders[0]: ("x", 0)}
    for n in nodes:
        if n.op == "get_attr":
            found = [i for i, t in enumerate(closures) if t is getattr(traced, n.target)]
            source |= {n: ("closure", i) for i in found}
    differentiable: list[bool] = seen["differentiable"]
    source |= {n: ("above", i) for n, i in zip(above, (i for i, d in enumerate(differentiable) if d))}

    end = nodes.index(above[0]) if above else len(nodes) - 1
    before, after = nodes[:end], nodes[end:-1]
    prologue = [n for n in before if n.name in seen["prologue"] and n not in source]
    given = [("x", 0), *(("row", i) for i in range(len(placeholders) - 1))]
    given += [("closure", i) for i in range(len(closures))]
    gives = [(kind, i) for kind, grads in (("x", of_x), ("row", of_rows), ("closure", of_closures))
             for i, grad in enumerate(grads) if grad is not None]  # fmt: skip
    grads = [grad for grad in (*of_x, *of_rows, *of_closures) if grad is not None]
    inner = {n for n in before if n not in source and n.op != "get_attr"} - set(prologue)
    stop = inner | set(source)
    # What is changed in place is needed as it is then, though what changed it is no result of anyone's.
    needed = sources([*grads, *filter(mutates, after)], lambda n: n not in stop)
    crossing = [n for n in before if n in needed and n in inner]
    forward = _region(f"{name}_forward", traced, before, source, given, [*outputs, *crossing])
    if not gives:
        return _Pair(forward, None, closures, differentiable, seen["leaves"], seen["spec"], [], [])
    source |= {n: ("saved", i) for i, n in enumerate(crossing, len(outputs))}
    wants = sorted({source[n] for n in needed if n in source})
    body = [n for n in (*prologue, *after) if n in needed]
    backward = _region(f"{name}_backward", traced, body, source, wants, grads)
    return _Pair(forward, backward, closures, differentiable, seen["leaves"], seen["spec"], wants, gives)


def _region(
    name: str, owner: fx.GraphModule, nodes: Sequence[fx.Node], source: dict[fx.Node, tuple[str, int]],
    inputs: Sequence[tuple[str, int]], outputs: Sequence[fx.Node],
) -> Region:  # fmt: skip
    """`nodes` as a graph of its own; those in `source` are its inputs, in the order of `inputs`."""
    graph = fx.Graph()
    meta = {at: n.meta for n, at in source.items()}
    given = {}
    for kind, i in inputs:
        given[kind, i] = graph.placeholder(f"{kind}_{i}")
        given[kind, i].meta = dict(meta.get((kind, i), {}))
    copied: dict[fx.Node, fx.Node] = {}

    def copy(n: fx.Node) -> fx.Node:
        if n in source:
            return given[source[n]]
        if n not in copied and n.op == "get_attr":  # a constant, wherever it was first read
            copied[n] = graph.node_copy(n)
        return copied[n]

    for n in nodes:
        if n not in source:
            copied[n] = graph.node_copy(n, copy)
    graph.output(tuple(copy(n) for n in outputs))
    graph.eliminate_dead_code()
    return Region(name, graph, owner)


def structure(module: fx.GraphModule) -> tuple:
    """What makes two graphs equal: their operators with all arguments, the kinds of their inputs, their constants."""
    number: dict[fx.Node, int] = {}
    symbols: dict[str, int] = {}

    def of(value) -> Any:
        if isinstance(value, fx.Node):
            return ("node", number[value])
        if isinstance(value, (list, tuple)):
            return tuple(of(v) for v in value)
        if isinstance(value, dict):
            return tuple((k, of(v)) for k, v in value.items())
        return exact(value)

    def size(n) -> Any:
        return n if isinstance(n, int) else ("symbol", symbols.setdefault(str(n), len(symbols)))

    rows = []
    for node in module.graph.nodes:
        number[node] = len(number)
        row: tuple = (node.op, node.target if node.op == "call_function" else None, of(node.args), of(node.kwargs))
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor):
            row += (*map(size, value.shape), *map(size, value.stride()), value.dtype, value.device)
        elif node.op == "placeholder":
            row += (size(value) if value is not None else None,)
        elif node.op == "get_attr":
            row += constant(getattr(module, node.target))
        rows.append(row)
    return tuple(rows)


def _proxies(tensors: Sequence[Tensor]) -> list:
    return [get_proxy_mode().tracer.unwrap_proxy(t) for t in tensors]


def _call(fn: Callable, value: Tensor, *args) -> fx.Proxy:
    """A node that calls a function of ours on what is no tensor of the trace, only a value of the graph. value: what it
    gives, but for its data."""
    proxy = get_proxy_mode().tracer.create_proxy("call_function", fn, args, {}, name=fn.__name__)
    proxy.node.meta["val"] = value
    return proxy


def _like(t: Tensor) -> Tensor:
    """A fake tensor with a memory of its own."""
    with disable_proxy_modes_tracing():
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)


def _emit(region: Region, arguments: Sequence, outputs: int) -> tuple[list[Tensor], fx.Proxy]:
    """A node that calls the region; its first `outputs` as fake tensors, and all as a proxy."""
    tracer = get_proxy_mode().tracer
    outs = [_like(v) for v in _outputs(region)[:outputs]]
    proxy = tracer.create_proxy("call_function", region, tuple(arguments), {}, name=region.__name__)
    track_tensor_tree(outs, proxy, constant=None, tracer=tracer)
    return outs, proxy


def _needed(pair: _Pair, x: Tensor, outs: Sequence[Tensor]) -> list[Tensor]:
    """Of a region's inputs and outputs, those whose memory its backward reads."""
    inputs = [x if kind == "x" else pair.closures[i] for kind, i in pair.wants if kind in ("x", "closure")]
    values = _outputs(pair.forward)
    given = {n.target: n.meta.get("val") for n in pair.forward.module.graph.nodes if n.op == "placeholder"}
    read = [values[i] if kind == "saved" else given.get(f"{kind}_{i}") for kind, i in pair.wants if kind != "above"]
    memory = {v.untyped_storage()._cdata for v in read if isinstance(v, Tensor)}
    return inputs + [t for t, v in zip(outs, values) if v.untyped_storage()._cdata in memory]


class _Differentiable(torch.autograd.Function):
    """Two nodes in the graph that is captured. What passes between them stays there, as proxies."""

    @staticmethod
    def forward(
        ctx, pair: _Pair, gathered: Sequence[Tensor], weights: Weights, offload: bool, x: Tensor, *tensors: Tensor
    ):
        closures = _proxies(tensors[len(weights.shards) :])
        arguments = [*_proxies([x, *gathered]), *closures]
        outs, proxy = _emit(pair.forward, arguments, len(pair.differentiable))
        ctx.pair, ctx.weights, ctx.away = pair, weights, {}
        ctx.proxies = {("x", 0): arguments[0], **{("closure", i): p for i, p in enumerate(closures)}}
        ctx.proxies |= {("saved", i): proxy[i] for kind, i in pair.wants if kind == "saved"}
        if offload:
            values = _outputs(pair.forward)
            kept = {("x", 0): x} | {("saved", i): values[i] for kind, i in pair.wants if kind == "saved"}
            for at in [at for at in dict.fromkeys(pair.wants) if at in kept]:  # in an order that does not change
                if isinstance(kept[at], Tensor):  # and no size that depends on the data
                    ctx.proxies[at] = _call(to_host, _like(kept[at]), ctx.proxies[at])
                    ctx.away[at] = kept[at]
        ctx.set_materialize_grads(False)
        kinds = [(t.shape, t.dtype, t.device) for t in outs]
        ctx.zeros = lambda i: torch.zeros(kinds[i][0], dtype=kinds[i][1], device=kinds[i][2])
        # Not for their values: autograd sees to it that they are still what they were.
        ctx.save_for_backward(*_needed(pair, x, outs))
        ctx.mark_non_differentiable(*(t for t, is_so in zip(outs, pair.differentiable) if not is_so))
        return tuple(outs)

    @staticmethod
    def backward(ctx, *above: Tensor):
        if torch.is_grad_enabled():
            raise NotImplementedError(f"gradients of gradients, through {ctx.pair.forward.__name__}: a layer has none")
        ctx.saved_tensors  # raises where one of them was changed in place
        if all(t is None for t in above):  # nothing depends on the layer
            return (None,) * len(ctx.needs_input_grad)
        pair, weights, proxies = ctx.pair, ctx.weights, ctx.proxies
        wanted = [i for kind, i in pair.wants if kind == "above"]
        given = [ctx.zeros(i) if above[i] is None else above[i] for i in wanted]
        proxies |= {("above", i): p for i, p in zip(wanted, _proxies(given))}
        if any(kind == "row" for kind, _ in pair.wants):
            proxies |= {("row", i): p for i, p in enumerate(_proxies(weights.start(weights.shards)))}
        values = {at: _like(t) for at, t in ctx.away.items()}
        back = {at: _call(to_device, values[at], proxies[at], t.device) for at, t in ctx.away.items()}
        proxies |= {at: _call(arrived, values[at], proxy) for at, proxy in back.items()}
        found, _ = _emit(pair.backward, [proxies[at] for at in pair.wants], len(pair.gives))
        grads = dict(zip(pair.gives, found, strict=True))
        of_shards = weights.finish([grads.get(("row", i)) for i in range(weights.rows)])
        of_closures = [grads.get(("closure", i)) for i in range(len(pair.closures))]
        return None, None, None, None, grads.get(("x", 0)), *of_shards, *of_closures

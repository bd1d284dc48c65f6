"""What runs of a captured piece: its operators one by one, or as a compiler fuses them.

Element-wise operators, and what only rearranges, are computed where their results are used: by the kernel of a
product's operand, of a reduction, of an output. What none of these asks for is never in memory.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from .nodes import LIGHT, is_start, is_wait, mutates

aten = torch.ops.aten

# Read where they are used, as an index into memory.
INDEXED = {
    aten.index.Tensor, aten.index_select.default, aten.embedding.default, aten.gather.default, aten.full.default,
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.scalar_tensor.default, aten.full_like.default,
    aten.where.self, aten.constant_pad_nd.default, aten.zeros.default, aten.ones.default, aten.empty_like.default,
    aten.zeros_like.default, aten.ones_like.default, torch.ops.prims.iota.default,
    torch.ops.prims.convert_element_type.default, torch.ops.prims.broadcast_in_dim.default,
}  # fmt: skip
# Their results are small; what they read is computed as they read it.
REDUCTIONS = {
    aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.amax.default, aten.amin.default,
    aten.any.default, aten.any.dim, aten.all.default, aten.var.correction, aten.var_mean.correction, aten.prod.default,
    aten.argmax.default, aten.max.dim,
}  # fmt: skip


class Kernel(NamedTuple):
    """node: the operator, or the last of those that are fused. reads, makes: storages, as numbers of `Kernels.bytes`.
    fused: whether it is element-wise, so that it may write over what it is the last to read."""

    node: fx.Node
    reads: frozenset[int]
    makes: tuple[int, ...]
    fused: bool


class Kernels(NamedTuple):
    """A piece's kernels in their order. bytes: of each storage. inputs, outputs: the storage of each, None of what is
    no tensor."""

    run: list[Kernel]
    bytes: Mapping[int, int]
    inputs: list[int | None]
    outputs: list[int | None]


# What inductor's code for CPUs computes once, where several would each compute it (torch/_inductor/ir.py, StorageBox).
DEAR = {aten.exp.default, aten.sigmoid.default}


def kernels(module: fx.GraphModule, fuse: bool, dear: Collection = ()) -> Kernels:
    """What runs of a piece; operator by operator unless `fuse`. dear: operators whose results are kept in memory for
    several that use them."""
    size: dict[int, int] = {}
    maker: dict[int, fx.Node] = {}  # of each storage, the node that made it
    users: dict[int, set[fx.Node]] = {}  # and those that read it, views aside
    for node in module.graph.nodes:
        own = storages(node)
        for key, nbytes in own.items():
            size.setdefault(key, nbytes)
            maker.setdefault(key, node)
        for key in {key for n in node.all_input_nodes for key in storages(n)}:
            if key not in own or node.op == "output" or is_wait(node):
                users.setdefault(key, set()).add(node)
    inputs = [_only(storages(n)) for n in module.graph.nodes if n.op == "placeholder"]
    outputs = [_only(storages(n)) if isinstance(n, fx.Node) else None for n in module.graph.output_node().args[0]]

    def stored(key: int) -> bool:
        node = maker[key]
        if not fuse or node.op != "call_function" or not _fusible(node):
            return True
        if node in costs and len(users.get(key, ())) > 1:
            return True
        return key in outputs or not all(_fusible(user) or user.target in REDUCTIONS for user in users.get(key, ()))

    in_memory: set[int] = set()
    costs: set[fx.Node] = set()  # what computes something dear, itself or in what it is fused with
    for node in module.graph.nodes:
        fused = [n for n in node.all_input_nodes if not storages(n).keys() & in_memory]
        if node.target in dear or any(n in costs for n in fused):
            costs.add(node)
        in_memory |= {key for key in storages(node) if maker[key] is node and stored(key)}
    behind: dict[int, frozenset[int]] = {}  # of what is not in memory, what it is computed from

    def sources(keys: Iterable[int]) -> frozenset[int]:
        found: set[int] = set()
        for key in keys:
            if key in in_memory:
                found.add(key)
            else:
                found |= behind[key]
        return frozenset(found)

    run = []
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        reads = sources(key for n in node.all_input_nodes for key in storages(n))
        made = tuple(key for key in storages(node) if maker[key] is node)
        for key in made:
            if key not in in_memory:
                behind[key] = reads
        stays = tuple(key for key in made if key in in_memory)
        if stays or mutates(node):
            run.append(Kernel(node, reads, stays, fuse and _fusible(node)))
    return Kernels(joined(run, outputs) if fuse else run, size, inputs, outputs)


def joined(run: Sequence[Kernel], outputs: Collection[int | None]) -> list[Kernel]:
    """Element-wise kernels of one size that read the same memory, or of which one reads what the other makes, as one: it
    runs when the last could, and what is made from it after it, as inductor's scheduler has it. What only it reads is
    not in memory."""
    run = list(run)
    at = 0
    while at < len(run):
        later = run[at]
        for before in range(at) if later.fused else ():
            first = run[before]
            shared = later.reads & (first.reads | {*first.makes})
            if not (first.fused and shared and _numel(first) == _numel(later)):
                continue
            waiting, made = [], set(first.makes)
            for kernel in run[before + 1 : at]:
                if kernel.reads & made:
                    made |= {*kernel.makes}
                    waiting.append(kernel)
            if later.reads & (made - {*first.makes}):  # what it is made from is made between them
                continue
            ready = [kernel for kernel in run[before + 1 : at] if kernel not in waiting]
            others = [*run[:before], *ready, *waiting, *run[at + 1 :]]
            kept = {*outputs}.union(*(kernel.reads for kernel in others))
            reads = (first.reads | later.reads) - {*first.makes}
            both = Kernel(later.node, reads, tuple(s for s in first.makes if s in kept) + later.makes, True)
            run[before : at + 1] = [*ready, both, *waiting]
            at = before + len(ready) - 1  # it may be joined with others yet
            break
        at += 1
    return run


def _numel(kernel: Kernel) -> int:
    return kernel.node.meta["val"].numel()


def storages(node: fx.Node) -> dict[int, int]:
    """Of a node's results: each storage, a view's being that of what it is a view of, and its bytes."""
    if is_wait(node):
        return storages(node.args[0])
    found = (t.untyped_storage() for t in tree_leaves(node.meta.get("val")) if isinstance(t, Tensor))
    return {storage._cdata: int(storage.nbytes()) for storage in found}


def _only(keys: Mapping[int, int]) -> int | None:
    return next(iter(keys), None)


def _fusible(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or is_start(node) or mutates(node):
        return False
    return torch.Tag.pointwise in node.target.tags or node.target in LIGHT or node.target in INDEXED

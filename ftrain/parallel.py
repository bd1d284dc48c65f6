"""From a plan's placements to communication: the one place that knows both.

`shard_model` turns placements into buckets, each a set of parameters that one collective gathers;
`parallel_ops` derives, from a record of ops for one device, the record for this rank of the mesh.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, product

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from .blocks import held
from .collectives import Group, all_gather, all_reduce, all_to_all, all_to_all_equal, group_over, reduce_scatter
from .experts import combine, grouped_mlp, permute, sort_by_expert
from .layout import Pieces, Placements
from .ops import Ops
from .precision import pack, unpack
from .region import Weights, capturing, differentiable
from .remat import remat
from .specs import Specs


@dataclass(frozen=True)
class Bucket:
    """Parameters that are gathered by one all-gather, and their gradients reduced by one reduce-scatter.

    gather: the ranks that hold the other pieces. reduce: the ranks that hold copies of this
    rank's pieces, over which gradients are summed besides. learns: False where all are frozen.
    float8: of each parameter, whether it is gathered in float8 (precision.py).
    """

    names: tuple[str, ...]
    pieces: tuple[Pieces, ...]
    gather: Group
    reduce: Group
    dtype: torch.dtype
    learns: bool
    float8: tuple[bool, ...]

    @property
    def layout(self) -> tuple:
        """Equal for buckets that do the same, of other parameters."""
        pieces = tuple((p.shape, p.dims, p.sizes) for p in self.pieces)
        return pieces, self.gather, self.reduce, self.dtype, self.learns, self.float8

    def start(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """This rank's pieces -> all ranks', in the dtype they are sent in, as `assemble` takes them."""
        if self.gather.size == 1:
            return list(shards)
        own = [p.pad(s.to(self.dtype)) for p, s in zip(self.pieces, shards)]
        return [all_gather(pack(own, self.float8, self.gather) if any(self.float8) else torch.cat(own), self.gather)]

    def assemble(self, gathered: Sequence[Tensor]) -> list[Tensor]:
        """-> the whole parameters, in the compute dtype."""
        if self.gather.size == 1:
            return [s.to(self.dtype) for s in gathered]
        [rows], lengths = gathered, [p.numel for p in self.pieces]
        parts = unpack(rows, lengths, self.float8, self.dtype) if any(self.float8) else rows.split(lengths, 1)
        return [p.assemble(part) for p, part in zip(self.pieces, parts)]

    def filled(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """Zeros for those that are missing. One at least is there."""
        like = next(g for g in grads if g is not None)
        return [like.new_zeros(p.shape) if g is None else g for p, g in zip(self.pieces, grads)]

    def take_apart(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the whole parameters -> what `finish` sums over the ranks, in fp32."""
        if self.gather.size == self.reduce.size == 1:
            return [g.float() for g in grads]
        return [torch.cat([p.take_apart(g.float()) for p, g in zip(self.pieces, grads)], 1)]

    def finish(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """-> sums over all ranks, for this rank's pieces."""
        if self.gather.size == self.reduce.size == 1:
            return list(rows)
        own = all_reduce(reduce_scatter(rows[0], self.gather), self.reduce)
        parts = own.split([p.numel for p in self.pieces])
        return [p.unpad(part, p.shape_of(self.gather.rank)) for p, part in zip(self.pieces, parts)]


class Gather(torch.autograd.Function):
    """Gather on use; the backward reduces the gradients, in fp32 whatever the compute dtype."""

    @staticmethod
    def forward(ctx, bucket: Bucket, *shards: Tensor):
        ctx.bucket = bucket
        ctx.set_materialize_grads(False)
        # An autograd.Function may not return its input itself.
        return tuple(t.view_as(t) for t in bucket.assemble(bucket.start(shards)))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        if all(grad is None for grad in grads):
            return None, *grads
        return None, *ctx.bucket.finish(ctx.bucket.take_apart(ctx.bucket.filled(grads)))


def gathering(buckets: Sequence[Bucket], shards: Mapping[str, Tensor]) -> Weights:
    """How a region comes by the parameters of these buckets, in their order."""
    mine = [shards[name] for bucket in buckets for name in bucket.names]
    sizes = [len(bucket.names) for bucket in buckets]
    rows = [size if bucket.gather.size == 1 else 1 for bucket, size in zip(buckets, sizes)]
    learning = [bucket for bucket in buckets if bucket.learns]
    sums = [len(b.names) if b.gather.size == b.reduce.size == 1 else 1 for b in learning]

    def cut(flat: Sequence, lengths: Sequence[int]) -> list[Sequence]:
        ends = list(accumulate(lengths))
        return [flat[end - n : end] for end, n in zip(ends, lengths, strict=True)]

    def start(shards):
        return [t for bucket, own in zip(buckets, cut(shards, sizes)) for t in bucket.start(own)]

    def assemble(gathered):
        return [t for bucket, own in zip(buckets, cut(gathered, rows)) for t in bucket.assemble(own)]

    def take_apart(grads):
        learned = [(bucket, own) for bucket, own in zip(buckets, cut(grads, sizes)) if bucket.learns]
        rows = [[None] * n if none(own) else b.take_apart(b.filled(own)) for (b, own), n in zip(learned, sums)]
        return [row for of_bucket in rows for row in of_bucket]

    def finish(rows):
        found = {b: b.finish(own) for b, own in zip(learning, cut(rows, sums)) if not none(own)}
        return [g for bucket in buckets for g in found.get(bucket, [None] * len(bucket.names))]

    def none(grads):
        return all(g is None for g in grads)

    layout = tuple(bucket.layout for bucket in buckets)
    return Weights(layout, mine, start, assemble, take_apart, finish, sum(sums))


@dataclass(frozen=True)
class Sharding:
    """A model's parameters on a mesh, for this rank.

    placements: of each parameter, over the device mesh's dimensions.
    copies: how many ranks hold each element of a parameter (and of its gradient).
    buckets: of each parameter group: the layer `prefix.i`, or a parameter outside the layers.
    expert_slots: None where experts are gathered like any weight; else the place of each expert
        in the order (ep rank, index within the rank), tokens being sent to them.
    """

    mesh: DeviceMesh
    placements: Placements
    copies: dict[str, int]
    buckets: dict[str, tuple[Bucket, ...]]
    expert_slots: tuple[int, ...] | None
    world: Group
    sp: Group
    ep: Group


def group_key(name: str) -> str:
    """The group a parameter is gathered with: its layer (the name up to its first number), or itself."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match.group() if match else name


def shard_model(
    specs: Specs, placements: Placements, mesh: DeviceMesh, dtype: torch.dtype, float8: Collection[str] = ()
) -> Sharding:
    """Group the parameters into buckets, and make the process groups they need.

    dtype: what is gathered, but for the parameters named in `float8`.
    Raises ValueError where the placements of experts cannot be served.
    """
    axes = mesh.mesh_dim_names
    sizes = dict(zip(axes, mesh.shape))
    slots = expert_slots(specs, placements, axes, sizes)
    members: dict[tuple[str, tuple[str, ...], tuple[str, ...], bool], list[str]] = {}
    for name, spec in specs.items():
        cut = [a for a, p in zip(axes, placements[name]) if isinstance(p, Shard) and sizes[a] > 1]
        sent_to = spec.experts and slots is not None
        frozen = not spec.lr
        gather = tuple(a for a in cut if not (sent_to and a == "ep"))
        copied = tuple(a for a in axes if sizes[a] > 1 and a not in cut)
        # What is frozen is gathered apart: it has no gradients to reduce.
        members.setdefault((group_key(name), gather, copied, frozen), []).append(name)

    buckets: dict[str, tuple[Bucket, ...]] = {}
    copies: dict[str, int] = {}
    for (key, gather, copied, frozen), names in members.items():
        pieces = []
        for name in names:
            shape = list(specs[name].shape)
            if specs[name].experts and slots is not None:
                shape[0] //= sizes["ep"]
            dims = [p.dim for a, p in zip(axes, placements[name]) if a in gather]
            pieces.append(Pieces(shape, dims, [sizes[a] for a in gather]))
        reduce = group_over(mesh, copied)
        copies.update(dict.fromkeys(names, reduce.size))
        narrow = tuple(name in float8 for name in names)
        bucket = Bucket(tuple(names), tuple(pieces), group_over(mesh, gather), reduce, dtype, not frozen, narrow)
        buckets[key] = (*buckets.get(key, ()), bucket)
    return Sharding(
        mesh, placements, copies, buckets, slots,
        world=group_over(mesh, axes), sp=group_over(mesh, ("sp",)), ep=group_over(mesh, ("ep",)),
    )  # fmt: skip


def expert_slots(
    specs: Specs, placements: Placements, axes: Sequence[str], sizes: Mapping[str, int]
) -> tuple[int, ...] | None:
    """Where a plan keeps experts on `ep` (Shard(0) there), the slot of each; None where it does not."""
    at_ep = axes.index("ep")
    found: dict[tuple[int, ...] | None, str] = {}
    for name, spec in specs.items():
        if not spec.experts or sizes["ep"] == 1:
            continue
        if placements[name][at_ep] != Shard(0):
            found.setdefault(None, name)
            continue
        E = spec.shape[0]
        cuts = [(a, sizes[a]) for a, p in zip(axes, placements[name]) if p == Shard(0)]
        n = 1
        for _, size in cuts:
            n *= size
        if E % n:
            over = " x ".join(f"{a} {size}" for a, size in cuts)
            valid = [d for d in range(1, E + 1) if E % d == 0]
            raise ValueError(
                f"{E} experts are not divisible by {over} ({name}): experts are kept whole, so "
                f"the dimensions that shard them must multiply to one of {valid}"
            )
        # Ownership alternates where an outer dimension cuts the experts too: list who owns which.
        owned: list[list[int]] = [[] for _ in range(sizes["ep"])]
        index = iter(range(E))
        for at in product(*(range(size) for _, size in cuts)):
            ep_rank = at[[a for a, _ in cuts].index("ep")]
            owned[ep_rank] += [next(index) for _ in range(E // n)]
        order = [expert for experts in owned for expert in experts]
        found.setdefault(tuple(order.index(e) for e in range(E)), name)
    if len(found) > 1:
        names = " and ".join(found.values())
        raise ValueError(f"the plan places experts differently ({names}): all must be on `ep` alike, or none")
    return next(iter(found)) if found else None


class Gathered(Mapping):
    """The parameters as a model sees them: reading a name gathers it, whole and in the compute dtype."""

    def __init__(self, shards: Mapping[str, Tensor], buckets: Mapping[str, tuple[Bucket, ...]]):
        self.shards, self.buckets = shards, buckets
        self.seen: dict[str, Tensor] = {}  # a tied table is gathered once, and its gradient reduced once
        self.within: str | None = None  # the layer that runs

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.seen:
            if self.within:
                raise ValueError(
                    f"{name} is read within {self.within}, but a block is given its own layer's parameters: read others "
                    "before ops.scan"
                )
            self.seen.update(gather_group(self.buckets[group_key(name)], self.shards))
        return self.seen[name]

    def __iter__(self):
        return iter(self.shards)

    def __len__(self):
        return len(self.shards)


def gather_group(buckets: tuple[Bucket, ...], shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole parameters of a group, by one all-gather for each bucket. Differentiable in the shards."""
    out: dict[str, Tensor] = {}
    for bucket in buckets:
        out.update(zip(bucket.names, Gather.apply(bucket, *(shards[name] for name in bucket.names))))
    return out


Exchanged = Callable[[Tensor, int], list[list[int]]]


def on_host(sizes: Tensor, rows: int) -> list[list[int]]:
    """How many of this rank's rows go to each rank and how many come from each, [2, ranks], by one copy to the host."""
    found = sizes.cpu().tolist()
    for n in (n for row in found for n in row):
        torch._check(n >= 0)
    return found


def parallel_ops(
    ops: Ops, sharding: Sharding, policy: str, grouped_mm: Callable[..., Tensor],
    exchanged: Exchanged = on_host,
) -> Ops:  # fmt: skip
    """`ops`, with its functions made to mean the same on this rank's part of the batch and sequence.

    policy: what a layer recomputes in the backward (remat.py). Its parameters are `Gathered`.
    exchanged: reads what depends on the data; a forecast, which has none, assumes it.
    """
    sp = sharding.sp

    def mask(segment_ids: Tensor, window: int | None = None, causal: bool = True):
        whole = all_gather(segment_ids, sp).transpose(0, 1).flatten(1) if sp.size > 1 else segment_ids
        return ops.mask(whole, window, causal)

    def attention(q: Tensor, k: Tensor, v: Tensor, m) -> Tensor:
        """Ulysses (arXiv 2309.14509): the whole sequence of some heads, in place of some tokens of all heads."""
        if sp.size == 1:
            return ops.attention(q, k, v, m)
        repeats = kv_repeats(q.shape[2], k.shape[2], sp.size)
        k, v = (t.repeat_interleave(repeats, 2) if repeats > 1 else t for t in (k, v))
        q, k, v = (heads_for_tokens(t, sp) for t in (q, k, v))
        return tokens_for_heads(ops.attention(q, k, v, m), sp)

    def scan(block, p: Gathered, prefix: str, n: int, x: Tensor) -> tuple[Tensor, list]:
        ys, known = [], {}
        declared: set[str] = set()
        read: set[str] = set()
        for layer in range(n):
            key = f"{prefix}.{layer}"
            buckets = p.buckets[key]
            names = [name for bucket in buckets for name in bucket.names]

            run = held(block, layer, key, names, read)
            declared |= {name[len(key) + 1 :] for name in names}

            def gather_and_run(x, *shards, run=run, buckets=buckets, names=names):
                return run(x, *gather_group(buckets, dict(zip(names, shards))).values())

            p.within = key
            try:
                if capturing():
                    learn = [bucket.learns for bucket in buckets for _ in bucket.names]
                    weights = gathering(buckets, p.shards)
                    keep, away = partial(remat, policy=policy), policy == "offload"
                    out = differentiable(run, keep, prefix, x, weights, learn, known, away)
                else:
                    out = remat(gather_and_run, policy)(x, *(p.shards[name] for name in names))
            finally:
                p.within = None
            x, y = out
            ys.append(y)
        if idle := sorted(declared - read):
            raise ValueError(f"{prefix}: no block reads {', '.join(idle)}, which the model declares")
        return x, ys

    experts = partial(ops.experts, grouped_mm=grouped_mm)
    if sharding.expert_slots is not None:
        experts = dispatching_experts(sharding.ep, sharding.expert_slots, grouped_mm, exchanged)
    place = sending_place(ops.place, sharding.world, exchanged) if sharding.world.size > 1 else ops.place
    return replace(ops, mask=mask, attention=attention, place=place, experts=experts, scan=scan)


def kv_repeats(heads: int, kv_heads: int, sp: int) -> int:
    """How often each key/value head is repeated so that `sp` ranks share them evenly, as few times as possible.

    Raises ValueError where the query heads cannot be split.
    """
    if heads % sp:
        valid = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(f"{heads} attention heads are not divisible by sp {sp}: valid sizes of --mesh.sp are {valid}")
    group = heads // kv_heads
    return next(n for n in range(1, group + 1) if group % n == 0 and kv_heads * n % sp == 0)


def heads_for_tokens(x: Tensor, sp: Group) -> Tensor:
    """[B, S/sp, N, D] -> [B, S, N/sp, D]"""
    B, S, N, D = x.shape
    x = all_to_all_equal(x.view(B, S, sp.size, N // sp.size, D).permute(2, 0, 1, 3, 4), sp)
    return x.transpose(0, 1).reshape(B, sp.size * S, N // sp.size, D)


def tokens_for_heads(x: Tensor, sp: Group) -> Tensor:
    """[B, S, N/sp, D] -> [B, S/sp, N, D]"""
    B, S, N, D = x.shape
    x = all_to_all_equal(x.reshape(B, sp.size, S // sp.size, N, D).transpose(0, 1), sp)
    return x.permute(1, 2, 0, 3, 4).reshape(B, S // sp.size, sp.size * N, D)


def sending_place(place: Callable[..., Tensor], world: Group, exchanged: Exchanged = on_host) -> Callable[..., Tensor]:
    """`ops.place` where items are encoded on any rank: outputs go to the ranks that hold their tokens (items.py)."""

    def sending(y: Tensor, batch: Mapping[str, Tensor], name: str) -> Tensor:
        sent, received = exchanged(batch[f"{name}.splits"], y.shape[0])
        n = sum(sent)
        torch._check(n <= y.shape[0])
        # In the order of the ranks; what no token takes comes last, and stays.
        rows = y.index_select(0, batch[f"{name}.order"]).narrow(0, 0, n)
        return place(all_to_all(rows, received, sent, world), batch, name)

    return sending


def dispatching_experts(ep: Group, slots: tuple[int, ...], grouped_mm, exchanged: Exchanged = on_host):
    """`ops.experts` where each ep rank keeps E/ep experts: tokens go to their experts and come back.

    Dropless: the number of rows sent to each rank follows the routing, step by step.
    """
    E = len(slots)
    in_order = slots == tuple(range(E))

    def experts(x: Tensor, weight: Tensor, index: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        slot = index if in_order else torch.tensor(slots, device=index.device)[index]
        order, inverse, counts = sort_by_expert(slot, E)  # rows grouped by ep rank, then by its expert
        arriving = all_to_all_equal(counts.view(ep.size, E // ep.size), ep)  # [from rank, my expert]
        # One copy to the host, the only one of the layer: the sizes of what follows depend on it.
        sent, received = exchanged(torch.stack([counts.view(ep.size, -1).sum(1), arriving.sum(1)]), index.numel())
        rows = permute(x, order, inverse, index.shape[1])
        rows = all_to_all(rows, received, sent, ep)  # grouped by rank they came from, then by expert

        expert = torch.arange(E // ep.size, device=x.device).repeat(ep.size)
        expert = torch.repeat_interleave(expert, arriving.flatten(), output_size=rows.shape[0])
        here, back, mine = sort_by_expert(expert, E // ep.size)
        done = grouped_mlp(permute(rows, here, back), mine, gate, up, down, grouped_mm)
        rows = all_to_all(permute(done, back, here), sent, received, ep)
        return combine(rows, weight, order, inverse)

    return experts

"""Where each element of a sharded tensor lives: arithmetic only, no communication.

DTensor's rule, followed to the letter: mesh dimensions shard one after the other, outermost
first, each cutting what the former left into pieces of ceil(length / n), so that the last
pieces can be short or empty.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

Placements = Mapping[str, tuple[Placement, ...]]  # of each parameter, by name: one for each mesh dimension


def chunk_lengths(length: int, n: int) -> list[int]:
    """`length` cut into n pieces of ceil(length / n), the last ones short or empty."""
    full = -(-length // n)
    return [max(0, min(full, length - i * full)) for i in range(n)]


def coordinate(rank: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Where a rank is on a mesh of `sizes`, whose ranks count row-major."""
    at: list[int] = []
    for size in reversed(sizes):
        rank, here = divmod(rank, size)
        at.insert(0, here)
    return tuple(at)


def shard_slices(
    shape: Sequence[int], placements: Sequence[Placement], sizes: Sequence[int], coordinate: Sequence[int]
) -> tuple[slice, ...]:
    """What the rank at `coordinate` of a mesh of `sizes` holds of a tensor of `shape`."""
    start, length = [0] * len(shape), list(shape)
    for placement, n, at in zip(placements, sizes, coordinate, strict=True):
        if isinstance(placement, Shard):
            lengths = chunk_lengths(length[placement.dim], n)
            start[placement.dim] += sum(lengths[:at])
            length[placement.dim] = lengths[at]
    return tuple(slice(s, s + n) for s, n in zip(start, length))


def check_placements(name: str, shape: Sequence[int], placements: object, dims: int) -> tuple[Placement, ...]:
    """A plan's answer for one parameter, made a tuple. Raises ValueError naming the parameter."""
    if not isinstance(placements, (list, tuple)) or len(placements) != dims:
        raise ValueError(
            f"the plan answers {placements!r} for {name}: it must return {dims} placements, one for each mesh dimension"
        )
    out = []
    for placement in placements:
        if type(placement) is Replicate:
            out.append(placement)
        elif type(placement) is Shard:
            dim = placement.dim + len(shape) if placement.dim < 0 else placement.dim
            if not 0 <= dim < len(shape):
                raise ValueError(
                    f"the plan shards dimension {placement.dim} of {name}, which has shape {tuple(shape)}: "
                    f"valid dimensions are 0 to {len(shape) - 1}"
                )
            out.append(Shard(dim))
        else:
            raise ValueError(f"the plan answers {placement!r} for {name}: a placement is Shard(dim) or Replicate()")
    return tuple(out)


def cut(placements: Placements, sizes: Sequence[int]) -> set[str]:
    """The tensors of which the ranks of a mesh of `sizes` hold parts."""
    return {n for n, of in placements.items() if any(p.is_shard() and size > 1 for p, size in zip(of, sizes, strict=True))}


class Pieces:
    """How one tensor is cut over the ranks of a group, and put together again.

    shape: the assembled tensor's shape. dims, sizes: the dimension that each mesh dimension
    of the group cuts, and its size, outermost first. Ranks count row-major over `sizes`.
    `padded` is the largest piece's shape; every piece is sent padded to it, since
    collectives want equal sizes.
    """

    def __init__(self, shape: Sequence[int], dims: Sequence[int], sizes: Sequence[int]):
        self.shape, self.dims, self.sizes = tuple(shape), tuple(dims), tuple(sizes)
        self.ranks = math.prod(sizes)
        padded, even = list(shape), True
        for dim, n in zip(self.dims, self.sizes):
            even = even and padded[dim] % n == 0
            padded[dim] = -(-padded[dim] // n)
        self.padded, self.numel = tuple(padded), math.prod(padded)
        self.flat = even and all(dim == 0 for dim in dims)

    def shape_of(self, rank: int) -> tuple[int, ...]:
        """Of one rank's piece."""
        at = coordinate(rank, self.sizes)
        cut = shard_slices(self.shape, [Shard(dim) for dim in self.dims], self.sizes, at)
        return tuple(s.stop - s.start for s in cut)

    def pad(self, piece: Tensor) -> Tensor:
        """A piece -> [numel]."""
        return _filled_up(piece, range(piece.ndim), self.padded).reshape(-1)

    def unpad(self, flat: Tensor, shape: Sequence[int]) -> Tensor:
        """[numel] -> the piece of `shape` that was padded."""
        piece = flat.reshape(self.padded)
        for dim, size in enumerate(shape):
            piece = _first(piece, dim, size)
        return piece

    def assemble(self, rows: Tensor) -> Tensor:
        """[ranks, numel] -> the whole tensor."""
        if self.flat:
            return rows.reshape(self.shape)
        return _joined(rows.reshape(*self.sizes, *self.padded), 0, self.shape, self.dims, self.sizes)

    def take_apart(self, whole: Tensor) -> Tensor:
        """The whole tensor -> [ranks, numel], each row padded."""
        if self.flat:
            return whole.reshape(self.ranks, self.numel)
        return _cut(whole, 0, self.padded, self.dims, self.sizes).reshape(self.ranks, self.numel)


# Both take the ranks of a mesh dimension at once, as one dimension of a tensor: `b` such are in front already. Of the
# pieces of a cut all are full but the last that holds anything: where that is cut again, it is taken by itself.


def _joined(x: Tensor, b: int, shape: Sequence[int], dims: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """[..., *sizes, *padded] -> [..., *shape]."""
    if not dims:
        for i, length in enumerate(shape):
            x = _first(x, b + i, length)
        return x
    dim, length, cut_again = dims[0], shape[dims[0]], dims[0] in dims[1:]
    full = -(-length // sizes[0])
    n = length // full if cut_again else sizes[0]
    whole = _joined(_first(x, b, n), b + 1, _with(shape, dim, full), dims[1:], sizes[1:])
    whole = whole.movedim(b, b + dim).flatten(b + dim, b + dim + 1)
    if n * full < length:
        short = _joined(x.select(b, n), b, _with(shape, dim, length - n * full), dims[1:], sizes[1:])
        return torch.cat([whole, short], b + dim)
    return _first(whole, b + dim, length)


def _cut(x: Tensor, b: int, padded: Sequence[int], dims: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """[..., *shape] -> [..., *sizes, *padded]."""
    if not dims:
        return _filled_up(x, range(b, x.ndim), padded)
    at, cut_again = b + dims[0], dims[0] in dims[1:]
    length = x.shape[at]
    full = -(-length // sizes[0])
    n = length // full if cut_again else sizes[0]
    whole = _filled_up(_first(x, at, min(n * full, length)), [at], [n * full])
    rows = _cut(whole.unflatten(at, (n, full)).movedim(at, b), b + 1, padded, dims[1:], sizes[1:])
    if n * full < length:
        short = _cut(x.narrow(at, n * full, length - n * full), b, padded, dims[1:], sizes[1:])
        rows = torch.cat([rows, short.unsqueeze(b)], b)
    return _filled_up(rows, [b], [sizes[0]])


def _first(x: Tensor, dim: int, length: int) -> Tensor:
    return x if x.shape[dim] == length else x.narrow(dim, 0, length)


def _filled_up(x: Tensor, dims: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Zeros at the end of these dimensions, up to these lengths."""
    more = [0] * (2 * x.ndim)
    for dim, length in zip(dims, lengths, strict=True):
        more[2 * (x.ndim - 1 - dim) + 1] = length - x.shape[dim]
    return F.pad(x, more) if any(more) else x


def _with(shape: Sequence[int], dim: int, length: int) -> list[int]:
    return [length if i == dim else n for i, n in enumerate(shape)]

"""Where each element of a sharded tensor lives: arithmetic only, no communication.

DTensor's rule, followed to the letter: mesh dimensions shard one after the other, outermost
first, each cutting what the former left into pieces of ceil(length / n), so that the last
pieces can be short or empty.
"""

from collections.abc import Mapping, Sequence
from itertools import product

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


class Pieces:
    """How one tensor is cut over the ranks of a group, and put together again.

    shape: the assembled tensor's shape. dims, sizes: the dimension that each mesh dimension
    of the group cuts, and its size, outermost first. Ranks count row-major over `sizes`.
    `padded` is the largest piece's shape; every piece is sent padded to it, since
    collectives want equal sizes.
    """

    def __init__(self, shape: Sequence[int], dims: Sequence[int], sizes: Sequence[int]):
        self.shape, self.dims, self.sizes = tuple(shape), tuple(dims), tuple(sizes)
        placements = [Shard(dim) for dim in dims]
        self.shapes = [
            tuple(s.stop - s.start for s in shard_slices(shape, placements, sizes, at))
            for at in product(*map(range, sizes))
        ]
        self.padded = self.shapes[0]  # the first rank's pieces are never the short ones
        self.numel = 1
        for size in self.padded:
            self.numel *= size
        self.flat = all(dim == 0 for dim in dims) and all(s == self.padded for s in self.shapes)

    def pad(self, piece: Tensor) -> Tensor:
        """A piece -> [numel]."""
        short = [full - size for full, size in zip(self.padded, piece.shape)]
        if any(short):
            piece = F.pad(piece, [n for size in reversed(short) for n in (0, size)])
        return piece.reshape(-1)

    def unpad(self, flat: Tensor, shape: Sequence[int]) -> Tensor:
        """[numel] -> the piece of `shape` that was padded."""
        piece = flat.reshape(self.padded)
        for dim, size in enumerate(shape):
            piece = piece.narrow(dim, 0, size)
        return piece

    def assemble(self, rows: Tensor) -> Tensor:
        """[ranks, numel] -> the whole tensor."""
        if self.flat:
            return rows.reshape(self.shape)
        pieces = [self.unpad(row, shape) for row, shape in zip(rows.unbind(0), self.shapes, strict=True)]
        for dim, n in zip(reversed(self.dims), reversed(self.sizes)):
            pieces = [torch.cat(pieces[i : i + n], dim) for i in range(0, len(pieces), n)]
        return pieces[0]

    def take_apart(self, whole: Tensor) -> Tensor:
        """The whole tensor -> [ranks, numel], each row padded."""
        if self.flat:
            return whole.reshape(len(self.shapes), self.numel)
        pieces = [whole]
        for dim, n in zip(self.dims, self.sizes):
            pieces = [q for p in pieces for q in p.split(chunk_lengths(p.shape[dim], n), dim)]
        return torch.stack([self.pad(piece) for piece in pieces])

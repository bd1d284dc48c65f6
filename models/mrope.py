"""Positions of multimodal rope (arXiv 2409.12191): text counts along all axes alike, a piece of another modality
spreads over them, and what follows goes on after its largest height or width.

So says transformers 5, which the models are held to; the paper counts the time too, which is another number for
a video of more steps than rows and columns."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def grid(t: int, h: int, w: int, step: float = 1) -> Tensor:
    """The coordinates [t*h*w, 3] of a grid of tokens, time slowest; `step` apart in time, rounded down."""
    axes = torch.meshgrid((torch.arange(t) * step).long(), torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([axis.flatten() for axis in axes], -1)


def coordinates(pieces: Iterable[int | Tensor]) -> Tensor:
    """Pieces of a row in their order -> [S, 3] int64. A piece is so many tokens of text, or coordinates [n, 3]
    counted from the piece's start."""
    start, out = 0, []
    for piece in pieces:
        own = torch.arange(piece)[:, None].expand(-1, 3) if isinstance(piece, int) else piece
        if len(own):
            out.append(own + start)
            start += int(own[:, 1:].max()) + 1
    return torch.cat(out) if out else torch.zeros(0, 3, dtype=torch.long)


def by_document(segments: Tensor, of_document: Callable[[int, Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """Coordinates [B, S, 3]: of_document(row, here [S] bool) [n, 3] for each segment of segments [B, S], in the batch's
    order, and 0 in padding."""
    out = torch.zeros(*segments.shape, 3, dtype=dtype)
    for row, of_row in enumerate(segments):
        for segment in of_row.unique_consecutive().tolist():
            if segment >= 0:
                here = of_row == segment
                out[row, here] = of_document(row, here).to(dtype)
    return out

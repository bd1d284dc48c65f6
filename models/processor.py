"""What the families take of what transformers' processors give."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..ops import fill_batch

# Kind of picture -> the names of its patches [patches, ...] and grids [n, 3] of time, height and width.
PICTURES = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


def text(inputs: Mapping) -> dict[str, Tensor]:
    """input_ids, segment_ids and position_ids of text, all [B, S], and labels where they are given."""
    kept = {name: inputs[name] for name in ("input_ids", "labels", "segment_ids", "attention_mask") if name in inputs}
    given = inputs.get("position_ids")
    if given is not None and (given.ndim == 2 or len(given) == 4):
        kept["position_ids"] = given if given.ndim == 2 else given[0]
    batch = fill_batch(kept)
    batch.pop("attention_mask", None)
    return batch


def coordinates(inputs: Mapping) -> Tensor | None:
    """position_ids [B, S, 3], given as transformers has them: [B, S], [3, B, S], or [4, B, S] with those of text
    first. None where none are given."""
    given = inputs.get("position_ids")
    if given is None:
        return None
    return given[-3:].movedim(0, -1) if given.ndim == 3 else given[..., None].expand(-1, -1, 3)


def grids(inputs: Mapping, kind: str) -> Tensor:
    """The grids [n, 3] of a kind of PICTURES. Raises ValueError for grids without patches, or patches without."""
    pixels, grid = PICTURES[kind]
    if (inputs.get(pixels) is None) != (inputs.get(grid) is None):
        raise ValueError(f"{pixels} and {grid} belong together: only one of them is given")
    return torch.zeros(0, 3, dtype=torch.long) if inputs.get(grid) is None else torch.as_tensor(inputs[grid])

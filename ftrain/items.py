"""What encoders take: images, frames, sounds, ..., packed without regard to rows, shared out evenly over all ranks.

An item goes to any rank, and its outputs from there to the ranks that hold its tokens (`Ops.place`). So the encoders'
work is balanced over the whole global batch, and no rank holds more of a sequence than its own tokens. Balancing
after the fact, as in OrchMLLM (arXiv 2503.23830).
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Item(NamedTuple):
    """One piece of an encoder's input: nothing in it looks at another item.

    fields: name -> [U, ...], U units (patches, frames, ...).
    slots: int64 [O], for each output the token that takes it, as row * S + column; -1: none does.
    Of one encoder, O / U is the same for every item.
    """

    fields: dict[str, Tensor]
    slots: Tensor

    @property
    def units(self) -> int:
        return len(next(iter(self.fields.values())))

    @property
    def outputs(self) -> int:
        """How many tokens take one."""
        return int((self.slots >= 0).sum())

    def moved(self, where: Callable[[Tensor], Tensor]) -> "Item":
        """The item with where(slots) in place of its slots; -1 stays."""
        return self._replace(slots=torch.where(self.slots < 0, -1, where(self.slots)))


class Packing(NamedTuple):
    """How well items were shared out: units in all, units of the rank with most, units each rank computes, ranks."""

    units: int
    most: int
    padded: int
    ranks: int

    @property
    def waste(self) -> float:
        """The part of what is computed that is padding."""
        return 1 - self.units / (self.padded * self.ranks)

    @property
    def imbalance(self) -> float:
        """The work of the rank with most, over the mean."""
        return self.most * self.ranks / self.units if self.units else 1.0


def bucket(units: int) -> int:
    """The smallest 2^k or 3 * 2^k that is not less: few sizes to compile for, at most half of it more than needed."""
    size = 1 << max(units - 1, 0).bit_length()
    return size * 3 // 4 if size >= 4 and size * 3 // 4 >= units else size


def share_out(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices of the items for each rank: the dearest first, each to the rank with least so far."""
    loads, out = [(0, rank) for rank in range(ranks)], [[] for _ in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + costs[index], rank))
        out[rank].append(index)
    return out


def pack(
    name: str, items: Sequence[Item], blank: Item, shape: tuple[int, int],
    home: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None, rank: int = 0, ranks: int = 1,
) -> tuple[dict[str, Tensor], Packing]:  # fmt: skip
    """This rank's fields of the batch for the encoder `name`, from the items of the global microbatch.

    blank: what packs are filled up with, the smallest possible item, all of whose slots are -1.
    shape: (B, S), this rank's part of the tokens. home: slots -> (the rank that holds each, where in its B * S).
    -> `name.FIELD` [P, ...] for each field, `name.item` [P] (0, 1, ..., -1 in padding), `name.source` [B, S] (the row,
    among those that arrive, that a token takes, or -1) and, where there are several ranks, `name.order` (the outputs
    by the rank they go to) and `name.splits` [2, ranks] (how many rows are sent to each, and received from each).
    P is the same on every rank, and one `blank` at least: where nobody has an item all still take the same steps.
    Raises ValueError where an item does not fit `blank`, or a token is given two outputs.
    """
    for item in items:
        _check(name, item, blank)
    given = share_out([item.units for item in items], ranks)
    loads = [sum(items[i].units for i in of_rank) for of_rank in given]
    padded = bucket(-(-max(max(loads), 1) // blank.units)) * blank.units

    def filled(of_rank: list[int], load: int) -> list[Item]:
        return [items[i] for i in of_rank] + [blank] * ((padded - load) // blank.units)

    mine = filled(given[rank], loads[rank])
    out = {f"{name}.{field}": torch.cat([item.fields[field] for item in mine]) for field in blank.fields}
    numbers = [*range(len(given[rank])), *[-1] * (len(mine) - len(given[rank]))]
    out[f"{name}.item"] = torch.tensor(numbers).repeat_interleave(torch.tensor([item.units for item in mine]))

    # Every rank knows where all items are and go to, so that nobody has to ask.
    source = np.full(shape[0] * shape[1], -1)
    splits, arrived = np.zeros((2, ranks), np.int64), 0
    for sender, (of_rank, load) in enumerate(zip(given, loads, strict=True)):
        slots = torch.cat([item.slots for item in filled(of_rank, load)]).numpy()
        to, at = home(slots) if home else (np.zeros_like(slots), slots)
        to = np.where(slots < 0, ranks, to)
        order = np.argsort(to, kind="stable")
        here = order[to[order] == rank]
        # One rank alone takes outputs where they lie; several send them in order.
        source[at[here]] = here if ranks == 1 else arrived + np.arange(len(here))
        arrived += len(here)
        splits[1, sender] = len(here)
        if sender == rank and ranks > 1:
            out[f"{name}.order"] = torch.from_numpy(order)
            splits[0] = np.bincount(to, minlength=ranks + 1)[:ranks]
    if (source >= 0).sum() != arrived:
        raise ValueError(f"two outputs of {name} go to the same token")
    out[f"{name}.source"] = torch.from_numpy(source).view(shape)
    if ranks > 1:
        out[f"{name}.splits"] = torch.from_numpy(splits)
    return out, Packing(sum(loads), max(loads), padded, ranks)


def _check(name: str, item: Item, blank: Item) -> None:
    for field, like in blank.fields.items():
        if field not in item.fields:
            raise ValueError(f"an item of {name} lacks {field!r}: it has {', '.join(item.fields)}")
        found = item.fields[field]
        if found.shape[1:] != like.shape[1:] or found.dtype != like.dtype or len(found) != item.units:
            raise ValueError(
                f"{name}.{field} of an item is {found.dtype} {list(found.shape)}: it must be {like.dtype} "
                f"{[item.units, *like.shape[1:]]}"
            )
    if not item.units or item.units % blank.units or len(item.slots) * blank.units != item.units * len(blank.slots):
        raise ValueError(
            f"an item of {name} has {item.units} units and {len(item.slots)} outputs: it must have a multiple of "
            f"{blank.units} units, and {len(blank.slots)} outputs for each of them"
        )


def on_one_device(batch: Mapping, blanks: Mapping[str, Item]) -> dict[str, Tensor]:
    """A global batch, with its `items`, as one process takes it whole."""
    batch = dict(batch)
    items = batch.pop("items", {})
    if blanks:
        shape = tuple(batch["segment_ids"].shape)
        for name, blank in blanks.items():
            batch |= pack(name, items.get(name, ()), blank, shape)[0]
    return batch


def seat(items: Sequence[Item], tokens: Tensor, name: str = "item") -> list[Item]:
    """Items whose slots count their outputs (0, 1, ..., through all items) -> with slots that are `tokens` [outputs].

    Raises ValueError where there are more or fewer outputs than tokens for them.
    """
    outputs = sum(item.outputs for item in items)
    if outputs != len(tokens):
        raise ValueError(f"{name}: {outputs} outputs of the encoder for {len(tokens)} placeholder tokens")
    return [item.moved(lambda slots: tokens[slots.clamp(min=0)]) if outputs else item for item in items]


def in_rows_of(item: Item, S: int, was: int, down: int = 0) -> Item:
    """The item in rows of S tokens instead of `was`, and so many rows further down."""
    return item.moved(lambda slots: (slots // was + down) * S + slots % was)

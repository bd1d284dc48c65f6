"""Going on from prompts, with images and sounds in them or not, on the mesh that trains the model."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .collectives import all_reduce
from .data import local_batch, padded
from .items import in_rows_of
from .job import Job
from .loss import IGNORE
from .ops import Output, fill_batch
from .parallel import Gathered
from .state import State
from .step import local

# What changes while a row grows; all else is that of the prompt.
_GROWS = ("input_ids", "position_ids", "segment_ids")


def generate(
    job: Job, state: State, prompt: Sequence[int], n: int, *, stop: Sequence[int] = (), temperature: float = 0.8,
    seed: int = 0,
) -> list[int]:  # fmt: skip
    """`complete` of one prompt of text."""
    batch = fill_batch({"input_ids": torch.tensor([list(prompt)])})
    return complete(job, state, batch, n, stop, temperature=temperature, seed=seed)[0]


def forward(job: Job, state: State, batch: Mapping) -> Output:
    """The model on this rank's part of a global batch, without gradients. Every rank must call it."""
    (part,) = job.microbatches(_with_labels(batch))
    device = state.step.device
    with torch.no_grad():
        params = Gathered(local(state.params), job.sharding.buckets)
        return job.model.forward(params, {name: t.to(device) for name, t in part.items()}, job.ops)


@torch.no_grad()
def complete(
    job: Job, state: State, batch: Mapping, n: int, stop: Sequence[int] = (), *, temperature: float = 0.0, seed: int = 0
) -> list[list[int]]:
    """Up to `n` tokens after each row of a global batch (`Data`), without the token of `stop` that ended them.

    Rows may be of different lengths, filled up on the right (`collate` of prepared prompts, with their items); of a
    row of several segments the last goes on. The same on every mesh. Every rank must call it.
    Without a cache: each token is one forward of all rows. Meant for scores and for a look, not for serving.
    temperature: 0 takes the likeliest token.
    """
    sp, device = job.sharding.sp, state.step.device
    B, S = batch["segment_ids"].shape
    ends = [int(row.nonzero().max()) + 1 if row.any() else 0 for row in batch["segment_ids"] >= 0]
    if not all(ends):
        raise ValueError(f"row {ends.index(0)} of the prompts is empty: there is nothing to go on from")
    whole = _widened(batch, max(S, max(ends) + n))
    text = {name: whole[name] for name in _GROWS}
    (fixed,) = job.microbatches(whole)
    params = Gathered(local(state.params), job.sharding.buckets)
    (b, s), rows = fixed["segment_ids"].shape, range(B)
    mine = range(job.batch_rank * b, (job.batch_rank + 1) * b)
    out: list[list[int]] = [[] for _ in rows]
    running = set(rows)
    for _ in range(n):
        (grown,) = local_batch(text, job.batch_rank, job.batch_ranks, sp.rank, sp.size)
        part = {**fixed, **grown, "max_position": text["position_ids"].max()}
        result = job.model.forward(params, {name: t.to(device) for name, t in part.items()}, job.ops)
        if result.unembedding is None:
            raise ValueError(f"a model of family {job.model.family} has no logits: it cannot go on from a text")
        # The one rank that holds a row's last token takes the next, and tells the others.
        tokens = torch.zeros(B, dtype=torch.int64, device=device)
        for row in running & set(mine):
            column = ends[row] - 1 - sp.rank * s
            if 0 <= column < s:
                logits = (result.hidden[row - mine.start, column] @ result.unembedding.t()).float().cpu()
                tokens[row] = _chosen(logits, temperature, (seed, row, ends[row]))
        for row, token in enumerate(all_reduce(tokens, job.sharding.world).tolist()):
            if row not in running:
                continue
            if token in stop:
                running.remove(row)
                continue
            out[row].append(token)
            end = ends[row]
            here = text["segment_ids"][row] == text["segment_ids"][row, end - 1]
            text["position_ids"][row, end] = text["position_ids"][row][here].max() + 1
            text["input_ids"][row, end] = token
            text["segment_ids"][row, end] = text["segment_ids"][row, end - 1]
            ends[row] += 1
        if not running:
            break
    return out


def _widened(batch: Mapping, width: int) -> dict:
    """The batch with longer rows, tensors of its own."""
    S = batch["segment_ids"].shape[1]
    items = {
        name: [in_rows_of(item, width, S) for item in of_encoder] for name, of_encoder in batch.get("items", {}).items()
    }
    tensors = {name: t for name, t in _with_labels(batch).items() if name != "items"}
    wide = {
        name: t if name.startswith("row_") else padded(name, t, len(t), width).clone() for name, t in tensors.items()
    }
    return wide | ({"items": items} if items else {})


def _with_labels(batch: Mapping) -> dict:
    return {"labels": torch.full_like(batch["segment_ids"], IGNORE), **batch}


def _chosen(logits: Tensor, temperature: float, seed: tuple[int, int, int]) -> Tensor:
    """A token: of the seed, the row and the place alone, so that it is the same on every mesh."""
    if not temperature:
        return logits.argmax()
    generator = torch.Generator().manual_seed(hash(seed) & (1 << 62) - 1)  # of integers: the same in every process
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[0]

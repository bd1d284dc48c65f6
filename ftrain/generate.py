"""A short sample from the model as it stands, on the mesh that trains it."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from .collectives import all_gather
from .job import Job
from .ops import Output
from .parallel import Gathered
from .state import State
from .step import local


@torch.no_grad()
def generate(
    job: Job, state: State, prompt: Sequence[int], n: int, *, stop: Sequence[int] = (), temperature: float = 0.8,
    seed: int = 0,
) -> list[int]:  # fmt: skip
    """Up to `n` tokens after `prompt`, ended early by a token of `stop`. Every rank must call it.

    Without a cache: each token is one forward of the whole row. Meant for a look, not for serving.
    temperature: 0 takes the likeliest token.
    """
    sp, device = job.sharding.sp, state.step.device
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    width = -(-(len(ids) + n) // sp.size) * sp.size
    params = Gathered(local(state.params), job.sharding.buckets)
    positions = torch.arange(width)
    columns = slice(sp.rank * width // sp.size, (sp.rank + 1) * width // sp.size)
    for _ in range(n):
        row = torch.tensor(ids + [0] * (width - len(ids)))
        batch = {"input_ids": row, "position_ids": positions, "segment_ids": torch.zeros_like(row)}
        # Every rank computes the same row; what stands after the last token is not seen by it.
        batch = {name: t[None, columns].to(device) for name, t in batch.items()}
        batch["max_position"] = torch.tensor(len(ids) - 1, device=device)
        out = job.model.forward(params, batch, job.ops)
        hidden = all_gather(out.hidden[0].contiguous(), sp).flatten(0, 1)[len(ids) - 1]
        logits = (hidden @ out.unembedding.t()).float().cpu()
        if temperature:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            token = logits.argmax(-1, keepdim=True)
        # Rounding may differ between ranks, and the rows may not.
        token = token.to(device)
        dist.broadcast(token, 0)
        ids.append(int(token))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


def forward(job: Job, state: State, batch: Mapping) -> Output:
    """The model on this rank's part of a global batch, without gradients. Every rank must call it."""
    raise NotImplementedError


def complete(
    job: Job, state: State, batch: Mapping, n: int, stop: Sequence[int] = (), *, temperature: float = 0.0, seed: int = 0
) -> list[list[int]]:
    """Up to `n` tokens after each row of a global batch (`Data`), without the token of `stop` that ended them.

    Rows may be of different lengths, filled up on the right (`collate` of prepared prompts, with their items); of a
    row of several segments the last goes on. The same on every mesh. Every rank must call it.
    Without a cache: each token is one forward of all rows. temperature: 0 takes the likeliest token.
    """
    raise NotImplementedError

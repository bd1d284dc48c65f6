"""Images drawn code by code, each from the hidden state before it: what is to be learned, and drawing on one device."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..items import Item
from ..kv import remembering
from ..loss import IGNORE
from ..ops import plain
from . import decoder
from .decoder import DecoderConfig


def next_codes(segment_ids: Tensor, images: Sequence[Item]) -> Tensor:
    """Labels [B, S] of images whose codes stand at their slots: at the token before each, the code, else -100.

    Raises ValueError where the text has no token before an image's first.
    """
    labels, segments = torch.full_like(segment_ids, IGNORE).flatten(), segment_ids.flatten()
    for item in images:
        before = item.slots - 1
        if int(item.slots[0]) % segment_ids.shape[1] == 0 or segments[before[0]] != segments[item.slots[0]]:
            raise ValueError("an image that is drawn has no token before it, whose hidden state its first code follows")
        labels = labels.index_put((before,), item.fields["codes"])
    return labels.view_as(segment_ids)


@torch.no_grad()
def draw(
    p: Mapping[str, Tensor], cfg: DecoderConfig, prompt: Mapping[str, Tensor], without: Tensor | None, n: int,
    embed: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor], *,
    guidance: float = 5.0, temperature: float = 1.0, seed: int = 0,
) -> Tensor:  # fmt: skip
    """-> codes [B, n], each drawn from the logits that follow those before it.

    prompt: input_ids, segment_ids and position_ids, all [B, S]; a row ends with its last column.
    without: input_ids [B, S] of the same prompts with nothing in them, for classifier-free guidance
        (arXiv 2207.12598): logits are those without, plus `guidance` times what the prompt adds. None: no guidance.
    embed: codes [rows] -> [rows, H], the decoder's input. head: its output [rows, H] -> logits [rows, codes].
    temperature: 0 takes the likeliest code.
    Raises ValueError for rope that is another for longer rows.
    """
    if cfg.rope.by_length:
        raise ValueError(f"rope_type {cfg.rope.type!r} turns earlier tokens again as a row grows: it cannot draw")
    ids, segments, positions = (prompt[name] for name in ("input_ids", "segment_ids", "position_ids"))
    B = len(ids)
    if without is not None:
        ids, segments, positions = torch.cat([ids, without]), segments.repeat(2, 1), positions.repeat(2, 1)
    batch = {"input_ids": ids, "segment_ids": segments, "position_ids": positions}
    generator = torch.Generator(ids.device).manual_seed(seed)
    ops, drawn = remembering(plain(), cfg.layers), []
    for _ in range(n):
        logits = head(decoder.forward(p, batch, cfg, ops).hidden[:, -1]).float()
        if without is not None:
            logits = logits[B:] + (logits[:B] - logits[B:]) * guidance
        if temperature:
            drawn.append(torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator)[:, 0])
        else:
            drawn.append(logits.argmax(-1))
        codes = drawn[-1] if without is None else drawn[-1].repeat(2)
        batch = {
            "input_ids": ids[:, -1:],
            "embeddings": embed(codes)[:, None],
            "placed": torch.ones_like(ids[:, -1:], dtype=torch.bool),
            "segment_ids": batch["segment_ids"][:, -1:],
            "position_ids": batch["position_ids"][:, -1:] + 1,
        }
    return torch.stack(drawn, 1)

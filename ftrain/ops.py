"""What a model calls for anything whose meaning depends on how it is run.

`Ops` is a record of pure functions. `plain()` is the reference: one device, readable.
`parallel.py` derives another record from it for a mesh and a plan, `precision.py` supplies
other `linear`s. A model never knows which one it was handed.

Shapes: B rows, S tokens a row (of this rank), T = B*S, H hidden, N query heads,
K key/value heads, D head size, E experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention, attention_mask, same_segment
from .experts import local_experts


@dataclass(frozen=True)
class Ops:
    """The functions a model is written with.

    linear(x, w, b=None): x [..., in], w [out, in], b [out] -> [..., out].
    mask(segment_ids, window=None, causal=True): [B, S] -> what `attention` wants to know about who
        sees whom: within one segment, only back, and at most `window` tokens. Make it once.
    attention(q, k, v, mask): q [B, S, N, D], k and v [B, S, K, D] -> [B, S, N, D]. The sequence
        may be spread over ranks: S is this rank's part of it.
    local_mask(segment_ids, of_keys=None): [B, S], [B, L] -> what `local_attention` wants to know:
        a query sees all keys of its own segment. Equal numbers stand in one run.
    local_attention(q, k, v, mask): among what this rank holds and no other: an encoder's items,
        or queries on a context that every rank of their row has. q [B, S, N, D], k and v [B, L, K, D].
    place(y, batch, name): y [M, ...], an encoder's outputs -> [B, S, ...]: each at its token
        (`Item.slots` of the items named `name`), zeros at all others.
    experts(x, weight, index, gate, up, down): each token through its chosen experts, x [T, H],
        weight and index [T, k], gate and up [E, I, H], down [E, H, I] -> [T, H];
        an expert is down(silu(gate x) * up x).
    scan(block, p, prefix, n, x): for layer 0..n-1, `x, y = block(q, x, layer)` with q the
        layer's parameters (names without `prefix.layer.`); -> (x, [y of each layer]).
        Recomputation and gathering of weights are scan's business.
    """

    linear: Callable[..., Tensor]
    mask: Callable[..., Any]
    attention: Callable[..., Tensor]
    local_mask: Callable[..., Any]
    local_attention: Callable[..., Tensor]
    place: Callable[..., Tensor]
    experts: Callable[..., Tensor]
    scan: Callable[..., tuple[Tensor, list]]


class Router(NamedTuple):
    """What the load-balancing losses need of one MoE layer, summed over this rank's valid tokens."""

    counts: Tensor  # [E] tokens sent to each expert, all k choices counted
    prob: Tensor  # [E] router probability given to each expert
    z: Tensor  # [] squared logsumexp of the router logits


class Output(NamedTuple):
    """What a model's forward returns. Logits are hidden @ unembedding.T: the loss computes them
    in chunks, so that they never exist at once. A model without logits has None for both."""

    hidden: Tensor | None = None  # [B, S, H], after the final norm
    unembedding: Tensor | None = None  # [V, H]
    router: Router | None = None  # stacked over the MoE layers: [L, E], [L, E], [L]
    # Losses other than the next token's, by name: sums over this rank's targets, which `targets` counts.
    losses: Mapping[str, Tensor] = MappingProxyType({})


def layer_params(p: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The parameters under `prefix.`, by their names after it."""
    return {name[len(prefix) + 1 :]: t for name, t in p.items() if name.startswith(prefix + ".")}


def plain_scan(block, p: Mapping[str, Tensor], prefix: str, n: int, x: Tensor) -> tuple[Tensor, list]:
    """`Ops.scan` as a loop."""
    ys = []
    for layer in range(n):
        x, y = block(layer_params(p, f"{prefix}.{layer}"), x, layer)
        ys.append(y)
    return x, ys


def plain_place(y: Tensor, batch: Mapping[str, Tensor], name: str) -> Tensor:
    """`Ops.place` with all outputs at hand: `batch["name.source"]` [B, S] is the output that each token takes, or -1."""
    rows = y.flatten(1)
    rows = torch.cat([rows.new_zeros(1, rows.shape[1]), rows])
    # As from a table whose first row is nobody's: the gradient is added in a fixed order.
    return F.embedding(batch[f"{name}.source"] + 1, rows, padding_idx=0).unflatten(-1, y.shape[1:])


def plain() -> Ops:
    """One device, the parameters' own dtype."""
    return Ops(
        linear=F.linear, mask=attention_mask, attention=attention, local_mask=same_segment, local_attention=attention,
        place=plain_place, experts=local_experts, scan=plain_scan,
    )  # fmt: skip


def fill_batch(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with `position_ids` and `segment_ids`, both [B, S], derived where absent.

    Segments come from `attention_mask` (0 is padding: segment -1), else from `position_ids`
    that restart, as transformers reads them, else each row is one document.
    """
    ids = batch["input_ids"]
    B, S = ids.shape
    out = dict(batch)
    positions = batch.get("position_ids")
    attended = batch.get("attention_mask")
    if "segment_ids" not in out:
        if attended is not None:
            out["segment_ids"] = attended.to(torch.long) - 1
        elif positions is not None:
            jumps = positions.expand(B, S).diff(dim=-1) != 1
            out["segment_ids"] = F.pad(jumps.to(torch.long).cumsum(-1), (1, 0))
        else:
            out["segment_ids"] = torch.zeros_like(ids)
    if positions is None:
        positions = torch.arange(S, device=ids.device)
    out["position_ids"] = positions.expand(B, S)
    return out

"""What a model calls for anything whose meaning depends on how it is run.

`Ops` is a record of pure functions. `plain()` is the reference: one device, readable.
`parallel.py` derives another record from it for a mesh and a plan, `precision.py` supplies
other `linear`s. A model never knows which one it was handed.

Shapes: B rows, S tokens a row (of this rank), T = B*S, H hidden, N query heads,
K key/value heads, D head size, E experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import attention, attention_mask
from .experts import local_experts


@dataclass(frozen=True)
class Ops:
    """The functions a model is written with.

    linear(x, w, b=None): x [..., in], w [out, in], b [out] -> [..., out].
    mask(segment_ids, window=None): [B, S] -> what `attention` wants to know about who sees
        whom: causal, within one segment, and at most `window` tokens back. Make it once.
    attention(q, k, v, mask): q [B, S, N, D], k and v [B, S, K, D] -> [B, S, N, D].
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
    experts: Callable[..., Tensor]
    scan: Callable[..., tuple[Tensor, list]]


class Router(NamedTuple):
    """What the load-balancing losses need of one MoE layer, summed over this rank's valid tokens."""

    counts: Tensor  # [E] tokens sent to each expert, all k choices counted
    prob: Tensor  # [E] router probability given to each expert
    z: Tensor  # [] squared logsumexp of the router logits


class Output(NamedTuple):
    """What a language model's forward returns. Logits are hidden @ unembedding.T: the loss
    computes them in chunks, so that they never exist at once."""

    hidden: Tensor  # [B, S, H], after the final norm
    unembedding: Tensor  # [V, H]
    router: Router | None = None  # stacked over the MoE layers: [L, E], [L, E], [L]


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


def plain() -> Ops:
    """One device, the parameters' own dtype."""
    return Ops(
        linear=F.linear, mask=attention_mask, attention=attention, experts=local_experts, scan=plain_scan
    )


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

"""What a layer keeps for its backward, and what it computes again."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .nodes import MOVES, is_ours

POLICIES = ("none", "selective", "full", "offload")

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

# Decided once, for rows were moved by it. Integers read from tensors shape all that follows. Which experts a token
# goes to must not be chosen again: a compiler rounds a recomputation otherwise, and close choices would fall otherwise.
ONCE = {aten._local_scalar_dense.default, aten.topk.default}
# Products worth their memory when recomputing selectively, and rows that crossed the network.
COSTLY = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_mm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    c10d.all_to_all_single.default,
}
# Gathering weights, and what only rearranges or casts them: never kept, so that a layer's weights are
# released after use whatever the policy.
GATHER = MOVES | {c10d.all_gather_into_tensor.default, c10d.wait_tensor.default}


def _keep(policy: str, ctx, op, *args, **kwargs) -> CheckpointPolicy:
    if op in ONCE:
        keep = True
    elif policy == "full":
        keep = False
    elif policy in ("selective", "offload"):
        keep = op in COSTLY or is_ours(op)
    else:
        keep = op not in GATHER
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.MUST_RECOMPUTE


def remat(layer: Callable, policy: str) -> Callable:
    """`layer`, keeping for its backward only what the policy says.

    none: all but the gathered weights. selective: matrix products, attention and rows that
    crossed the network. full: the layer's input. offload: as selective, and where the step is compiled it waits on the
    host (offload.py).
    """
    if policy not in POLICIES:
        raise ValueError(f"--remat {policy}: valid policies are {', '.join(POLICIES)}")
    contexts = partial(create_selective_checkpoint_contexts, partial(_keep, policy))
    return partial(checkpoint, layer, use_reentrant=False, context_fn=contexts, preserve_rng_state=False)


@contextmanager
def naming_changes(layer: str) -> Iterator[None]:
    """Turns torch's complaint about a kept result that was changed in place into a ValueError that says where."""
    try:
        yield
    except RuntimeError as error:
        if "has been mutated" not in str(error):
            raise
        of_torch = str(Path(torch.__file__).parent)
        at = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(of_torch)][-1]
        raise ValueError(
            f"{layer}: {at.filename}, line {at.lineno} ({at.line}): its result is changed in place, but the backward "
            "needs it as it was: use operators without a trailing _; F.rms_norm has such inside, F.layer_norm has none"
        ) from error

"""What a layer keeps for its backward, and what it computes again."""

from collections.abc import Callable
from functools import partial

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
    if op in ONCE or torch.Tag.nondeterministic_seeded in op.tags:  # drawn again, they would be other numbers
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

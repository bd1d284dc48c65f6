"""What VeOmni 0.1.12 lacks to run on CPUs with gloo; import it before any other part of veomni.

Kernels are replaced, by the plainest code that computes the same, and nothing else: sharding, dispatch,
sequence parallelism, losses, clipping and the optimizer are VeOmni's own.
"""

import sys
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def stand_in(name: str, **members) -> None:
    """A module that imports find in place of one that needs triton or CUDA."""
    module = ModuleType(name)
    vars(module).update(members, __path__=[])
    sys.modules[name] = module


# Grouped products: rows of `a` belong to group g up to ends[g].


def groups(ends: Tensor) -> list[slice]:
    at = [0, *ends.tolist()]
    return [slice(start, stop) for start, stop in zip(at, at[1:])]


def rows_times_group(a: Tensor, b: Tensor, cumsum_M: Tensor, max_M: int, transpose_a=False, transpose_b=False):
    """a [rows, K], b [G, K, N] (or [G, N, K] transposed) -> [rows, N]"""
    assert not transpose_a
    return torch.cat([a[rows] @ (w.t() if transpose_b else w) for rows, w in zip(groups(cumsum_M), b)])


def group_by_group(a: Tensor, b: Tensor, c: Tensor, cumsum_K: Tensor, max_K: int, transpose_a=True, transpose_b=False):
    """a [rows, M], b [rows, N] -> c [G, M, N], written in place"""
    assert transpose_a and not transpose_b
    for rows, out in zip(groups(cumsum_K), c):
        out.copy_(a[rows].t() @ b[rows])


# Flash attention: q, k, v [B, S, heads, D]; in the varlen form B is folded into S.


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale=None, causal=False, **_):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, *_, softmax_scale=None, causal=False, **__):
    of_q, of_k = (groups(ends[1:]) for ends in (cu_seqlens_q, cu_seqlens_k))
    rows = [flash_attn_func(q[None, a], k[None, b], v[None, b], softmax_scale, causal)[0] for a, b in zip(of_q, of_k)]
    return torch.cat(rows)


KERNELS = "veomni.ops.kernels.moe._kernels.kernel"
stand_in(f"{KERNELS}.group_gemm", group_gemm_same_nk=rows_times_group, group_gemm_same_mn=group_by_group)
stand_in(f"{KERNELS}.moe", expert_histogram=None, moe_gather=None, moe_scatter=None)  # only without ep

import veomni.utils.device  # noqa: E402

veomni.utils.device.get_dist_comm_backend = lambda: "gloo"  # it knows no backend for CPUs

import veomni.ops.kernels.attention.flash as flash  # noqa: E402
import veomni.ops.kernels.moe as moe  # noqa: E402
from veomni.ops.kernel_registry import KERNEL_REGISTRY, HardwareRequirement, KernelSpec  # noqa: E402


def fused_experts():
    from veomni.ops.kernels.moe.group_gemm import group_gemm_fused_moe_forward

    return moe._make_moe_experts_adapter(group_gemm_fused_moe_forward)


# The "triton" experts under a name that CPUs may ask for: moe_implementation="fused_cpu".
KERNEL_REGISTRY.register(KernelSpec("cpu", "moe_experts", "standard", fused_experts, HardwareRequirement("any")))
moe.apply_veomni_fused_moe_patch = lambda fused_moe_kernel="cpu": None

flash._load_veomni_local_flash_kernel = lambda implementation: SimpleNamespace(
    flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func
)

gather = dist.all_gather_into_tensor


def all_gather_into_tensor(output: Tensor, input: Tensor, *args, **kwargs):
    """gloo refuses [ranks, n] as the output for [n], which NCCL takes."""
    return gather(output.view(-1), input.view(-1), *args, **kwargs)


dist.all_gather_into_tensor = all_gather_into_tensor
torch.cpu.empty_cache = lambda: None  # torch.cpu lacks it

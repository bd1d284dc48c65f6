"""Model FLOPs, and what the machine could do: their ratio is the MFU."""

import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import fx

from .specs import Specs

# Dense bf16 peak of one device, FLOP/s, from its maker's data sheet; the first name that fits.
PEAKS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "MI300X": 1307e12}


def flops_per_token(specs: Specs, cfg, seq_len: int) -> float:
    """FLOPs of forward and backward for one token of a row of `seq_len`, recomputation not counted.

    6 for each element the token is multiplied with (arXiv 2001.08361, section 2.1), and causal
    attention at half: its two products over the seq_len / 2 tokens before, forward and twice backward.
    """
    matmul = sum(spec.numel * spec.active for spec in specs.values() if len(spec.shape) > 1)
    attention = cfg.layers * cfg.heads * cfg.head_dim * seq_len
    return 6 * (matmul + attention)


def graph_flops(nodes: Iterable[fx.Node]) -> int:
    """FLOPs of a captured graph's products and attention, from its nodes' shapes (`Program.line` has those of all its
    regions): attention within documents counts at half, as causal.

    What is recomputed counts too: for the model's FLOPs capture under a policy that recomputes no product.
    Raises ValueError where a product's size depends on the data.
    """
    return sum(map(node_flops, nodes))


def flop_formula(op) -> Callable[..., int] | None:
    """(*args, out_val=) -> FLOPs of an operator (an OpOverload); None of one that is neither a product nor attention."""
    from torch.utils.flop_counter import flop_registry

    packet = getattr(op, "overloadpacket", None)
    return OWN_FLOPS.get(str(packet)) or flop_registry.get(packet)


def node_flops(node: fx.Node) -> int:
    """Those of one operator."""
    count = flop_formula(node.target)
    if not count:
        return 0
    args = [n.meta["val"] if isinstance(n, fx.Node) else n for n in node.args]
    of = count(*args, out_val=node.meta["val"])
    if not isinstance(of, int):
        raise ValueError(f"{node.name}: how large it is depends on the data")
    return of


def _attention(q, k, *_, out_val) -> int:
    """Two products of [S, D] with [S, D] for each head, half of each needed; [B, S, N, D]."""
    B, S, N, D = q.shape
    return 2 * B * N * S * S * D


# By operator, of those that torch does not count.
OWN_FLOPS = {
    "aten.addmm_": lambda total, a, b, out_val: 2 * a.shape[0] * a.shape[1] * b.shape[1],
    "ftrain.by_document": _attention,
    "ftrain.by_document_backward": lambda grad, q, *args, out_val: 2 * _attention(q, *args, out_val=out_val),
    "ftrain.grouped_mm": lambda x, w, offsets, out_val: 2 * x.shape[0] * w.shape[1] * w.shape[2],
    "ftrain.grouped_outer": lambda a, b, offsets, out_val: 2 * a.shape[0] * a.shape[1] * b.shape[1],
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of this rank's device: known of a GPU by its name (None of an unknown one), measured on a CPU."""
    if device.type != "cpu":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        return next((peak for known, peak in PEAKS.items() if known in name), None)
    a = torch.randn(1024, 1024, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + 1
    while (start := time.perf_counter()) < end:  # a busy machine has quiet moments
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def native_bf16() -> bool:
    """Whether this CPU multiplies bf16 itself; others emulate it, at a fraction of fp32's speed."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def emulated(t: torch.Tensor) -> bool:
    """Whether products of such tensors are better taken in fp32, and rounded after: bf16 on a CPU that has none of its
    own. They add up in fp32 anyway, and what such a CPU does instead takes five times as long."""
    return t.dtype == torch.bfloat16 and t.device.type == "cpu" and not native_bf16()


def peak_memory(device: torch.device) -> int:
    """The most bytes this rank has held: of its GPU's memory, or of the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # getrusage would count what the launcher held before this program replaced it
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        import resource
        import sys

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""What torchtitan 0.3.0 lacks to run on CPUs with gloo; import it before any part of torchtitan.

A device module is made up, attention is its own ScaledDotProductAttention (its flex and varlen attention have no
backward on CPUs), and gradients are summed without a scaled reduction, which gloo has not. Nothing else is replaced.
"""

from types import SimpleNamespace

import torch
import torch._utils
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule


def nothing(*args, **kwargs) -> None:
    return None


DEVICE = SimpleNamespace(
    synchronize=nothing, set_device=nothing, reset_peak_memory_stats=nothing, empty_cache=nothing,
    current_device=lambda: 0, device_count=lambda: 1, get_device_name=lambda *_: "cpu",
    get_device_properties=lambda *_: SimpleNamespace(total_memory=1 << 34), memory_stats=lambda *_: {},
    set_rng_state=torch.set_rng_state, current_stream=torch.cpu.current_stream, stream=torch.cpu.stream,
    Stream=torch.cpu.Stream,
)  # fmt: skip

device_module = torch._utils._get_device_module
torch._utils._get_available_device_type = lambda: "cpu"
torch._utils._get_device_module = lambda kind: DEVICE if kind == "cpu" else device_module(kind)
if not hasattr(dist, "set_timeout"):  # of a later torch
    dist.set_timeout = nothing

import torchtitan.models.common.attention as attention  # noqa: E402
import torchtitan.models.qwen3 as qwen3  # noqa: E402
import torchtitan.tools.utils as utils  # noqa: E402

utils.get_local_device = lambda: torch.device("cpu")
qwen3.get_attention_config = lambda backend: attention.ScaledDotProductAttention.Config()
attention.ScaledDotProductAttention.sdpa_backends = [
    attention.SDPBackend.FLASH_ATTENTION,
    attention.SDPBackend.MATH,
]


def parallelize(model, **how):
    """parallelize_qwen3, whose gradients gloo can reduce."""
    model = qwen3.parallelize_qwen3(model, **how)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    return model

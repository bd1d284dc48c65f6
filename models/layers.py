"""What layers of every modality are made of: projections, norms, gated MLPs; the specs of each beside its function.

q: a layer's parameters, by name. H hidden, I inner size.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import Ops
from ..specs import ParamSpec, normal, ones, zeros
from . import fields

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu, "silu": F.silu,
}  # fmt: skip


def activation(hf: Mapping, key: str = "hidden_act", default: str = "gelu") -> str:
    """The name of an activation, one of ACTIVATIONS. Raises ValueError for another."""
    name = fields.read(hf, key, default)
    if name not in list(ACTIVATIONS):  # a list, because the value may be anything that JSON can hold
        fields.refuse(key, name, f"one of {', '.join(ACTIVATIONS)}")
    return name


def projection(name: str, out: int, into: int, bias: bool, std: float) -> dict[str, ParamSpec]:
    specs = {f"{name}.weight": ParamSpec((out, into), normal(std))}
    if bias:
        specs[f"{name}.bias"] = ParamSpec((out,), zeros, decay=False)
    return specs


def project(q: Mapping[str, Tensor], name: str, x: Tensor, ops: Ops) -> Tensor:
    """x [..., in] -> [..., out]."""
    return ops.linear(x, q[f"{name}.weight"], q.get(f"{name}.bias"))


def norm_specs(name: str, size: int, bias: bool = True) -> dict[str, ParamSpec]:
    """Of a LayerNorm; without a bias, of an RMSNorm."""
    specs = {f"{name}.weight": ParamSpec((size,), ones, decay=False)}
    if bias:
        specs[f"{name}.bias"] = ParamSpec((size,), zeros, decay=False)
    return specs


def layer_norm(q: Mapping[str, Tensor], name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    """Over the last dimension; torch's kernel does it in fp32 whatever x is."""
    return F.layer_norm(x, x.shape[-1:], q[f"{name}.weight"], q[f"{name}.bias"], eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last dimension, in fp32 whatever x is."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def swiglu_specs(prefix: str, hidden: int, inner: int, bias: bool, std: float) -> dict[str, ParamSpec]:
    return {
        **projection(f"{prefix}.gate_proj", inner, hidden, bias, std),
        **projection(f"{prefix}.up_proj", inner, hidden, bias, std),
        **projection(f"{prefix}.down_proj", hidden, inner, bias, std),
    }


def swiglu(q: Mapping[str, Tensor], x: Tensor, ops: Ops) -> Tensor:
    """A gated MLP (arXiv 2002.05202), called `mlp`: x [..., H] -> [..., H]."""
    inner = F.silu(project(q, "mlp.gate_proj", x, ops)) * project(q, "mlp.up_proj", x, ops)
    return project(q, "mlp.down_proj", inner, ops)

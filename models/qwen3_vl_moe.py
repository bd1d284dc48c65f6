"""Qwen3-VL with a mixture of experts in place of most MLPs. Checked against transformers'
`Qwen3VLMoeForConditionalGeneration`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..ops import Ops, Output
from ..specs import ParamSpec, Within
from . import qwen3_moe, qwen3_vl
from .encoders import qwen3_vision as vision
from .qwen3_moe import MoeConfig
from .qwen3_vl import LARGE, NAMES, Sight, blanks, examples, prepare  # noqa: F401 - the family sees as Qwen3-VL does


@dataclass(frozen=True, kw_only=True)
class Qwen3VLMoeConfig(MoeConfig, Sight):
    pass


def config(hf: Mapping) -> Qwen3VLMoeConfig:
    # Each token's weights sum to 1, whatever the config says.
    base = qwen3_moe.config({**qwen3_vl.text_config(hf), "norm_topk_prob": True})
    return Qwen3VLMoeConfig(**{**vars(base), **NAMES, **qwen3_vl.sight(hf, base)})


def specs(cfg: Qwen3VLMoeConfig) -> dict[str, ParamSpec]:
    of_decoder = {name: _kept(name, spec) for name, spec in qwen3_moe.specs(cfg).items()}
    return vision.specs(cfg.vision, "model.visual") | of_decoder


def _kept(name: str, spec: ParamSpec) -> ParamSpec:
    """The published checkpoints keep all experts of a layer in two tensors, each expert's input first."""
    if not spec.experts:
        return spec
    stem, projection = name.removesuffix("_proj.weight").rsplit(".", 1)
    rows = spec.shape[1]
    if projection == "down":
        within = Within(f"{stem}.down_proj", rows, turned=True)
    else:
        within = Within(f"{stem}.gate_up_proj", 2 * rows, rows * (projection == "up"), turned=True)
    return replace(spec, parts=(), within=within)


def forward(p: Mapping[str, Tensor], batch: Mapping[str, Tensor], cfg: Qwen3VLMoeConfig, ops: Ops) -> Output:
    return qwen3_moe.forward(p, qwen3_vl.see(p, batch, cfg, ops), cfg, ops)


def _qwen3_vl_moe(hidden: int, inner: int, layers: int, heads: int, expert_inner: int) -> dict:
    text = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": 4}
    return qwen3_vl.published("Qwen3VLMoe", text | _experts(128, 8, expert_inner), LARGE, tied=False)


def _experts(experts: int, top_k: int, inner: int) -> dict:
    return {
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": inner,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


PRESETS = {
    "qwen3-vl-moe-tiny": qwen3_vl.tiny("Qwen3VLMoe", **_experts(4, 2, 20)),
    "Qwen3-VL-30B-A3B": _qwen3_vl_moe(2048, 6144, 48, 32, 768),
    "Qwen3-VL-235B-A22B": _qwen3_vl_moe(4096, 12288, 94, 64, 1536),
}

"""Small transformers models of each family, and their weights under our names: for tests to compare with."""

import torch
import transformers

from ftrain.model import families


def first_preset(family: str) -> dict:
    """The config that a family is tested with, which `shrink` makes small."""
    presets = families()[family].PRESETS
    assert presets, f"models/{family}.py has no preset: a family needs one to be tested"
    return next(iter(presets.values()))


def twin(hf: dict, seed: int = 0, dtype=torch.float32):
    """The transformers model of a config, with weights large enough that every part of it matters."""
    config = transformers.AutoConfig.for_model(**hf)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + noise / 4 if name.endswith("norm.weight") else noise * (0.5 if p.ndim == 1 else 0.2))
    return model.eval()


def our_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5 fuses gate and up of the experts, we keep them apart; all other names are the same."""
    out = {}
    for name, t in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            out[f"{stem}gate_proj.weight"], out[f"{stem}up_proj.weight"] = t.chunk(2, dim=1)
        elif name.endswith("experts.down_proj"):
            out[f"{name}.weight"] = t
        else:
            out[name] = t
    return out


def weights(model) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone().requires_grad_() for n, t in our_names(dict(model.named_parameters())).items()}


def gradients(model) -> dict[str, torch.Tensor]:
    """Of the parameters that have one."""
    return our_names({name: p.grad for name, p in model.named_parameters() if p.grad is not None})

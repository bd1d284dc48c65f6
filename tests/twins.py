"""Small transformers models of each family, and their weights under our names: for tests to compare with."""

import torch
import transformers

from ftrain.model import families, logits


def first_preset(family: str) -> dict:
    """The config that a family is tested with, which `shrink` makes small."""
    presets = families()[family].PRESETS
    assert presets, f"models/{family}.py has no preset: a family needs one to be tested"
    return next(iter(presets.values()))


def twin(hf: dict, seed: int = 0, dtype=torch.float32):
    """The transformers model of a config, with weights large enough that every part of it matters."""
    config = transformers.AutoConfig.for_model(**hf)
    of_text = type(config) in transformers.AutoModelForCausalLM._model_mapping
    auto = transformers.AutoModelForCausalLM if of_text else transformers.AutoModelForMultimodalLM
    model = auto.from_config(config, dtype=dtype, attn_implementation="eager", experts_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            norm = p.ndim == 1 and name.endswith("weight")
            p.copy_(1 + noise / 4 if norm else noise * (0.5 if p.ndim == 1 else 0.2))
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


def relative(ours: torch.Tensor, theirs: torch.Tensor, floor: float = 0.0) -> float:
    """The largest difference, relative to the largest element of `theirs` (or to `floor`, where that is larger)."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} is not {tuple(theirs.shape)}"
    return float((ours - theirs).abs().max() / max(float(theirs.abs().max()), floor, 1e-30))


def parity(model, theirs, inputs: dict, rename=our_names, tolerance: float = 3e-5, **extra) -> tuple[float, float]:
    """Hold our logits and every gradient to the twin's, on a random cotangent: -> the largest error of each.

    inputs: as from the processor, what both are given. extra: what only the twin is given.
    rename: the twin's named parameters (or their gradients) -> under our names, in our layout.
    """
    params = {n: t.detach().clone().requires_grad_() for n, t in rename(dict(theirs.named_parameters())).items()}
    assert {n: tuple(t.shape) for n, t in params.items()} == {n: spec.shape for n, spec in model.specs.items()}
    ours, expected = logits(model, params, inputs), theirs(**inputs, **extra, use_cache=False).logits
    seen = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones(ours.shape[:2]).bool()
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)) * seen[..., None]
    theirs.zero_grad()
    (expected * cotangent).sum().backward()
    (ours * cotangent).sum().backward()
    of_logits = relative(ours[seen], expected[seen])
    assert of_logits <= tolerance, f"logits are off by {of_logits}"
    return of_logits, same_gradients(params, theirs, rename, tolerance)


def same_gradients(params: dict, theirs, rename=our_names, tolerance: float = 3e-5) -> float:
    """Hold our parameters' gradients to the twin's, every one: -> the largest error."""
    found = rename({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()})
    sizes = torch.stack([g.abs().max() for g in found.values()])
    floor = 0.1 * float(sizes[sizes > 0].median())  # of what took part: towers without input did not
    worst = 0.0
    for name, grad in found.items():
        mine = params[name].grad
        error = relative(torch.zeros_like(grad) if mine is None else mine, grad, floor)
        assert error <= tolerance, f"the gradient of {name} is off by {error}"
        worst = max(worst, error)
    return worst


def together(rows: list[dict], side: str) -> dict:
    """Rows as one batch, padded on one side."""
    S = max(row["input_ids"].shape[1] for row in rows)
    out = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        parts = [row[name] for row in rows if name in row]
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            more = [S - part.shape[1] for part in parts]
            pads = [(n, 0) if side == "left" else (0, n) for n in more]
            parts = [torch.nn.functional.pad(part, pad) for part, pad in zip(parts, pads, strict=True)]
        out[name] = torch.cat(parts)
    return out

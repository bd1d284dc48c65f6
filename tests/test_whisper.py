"""Whisper's encoder against transformers' `WhisperEncoder`: outputs and every gradient, sounds packed side by side."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import twins
from ftrain.items import pack, seat
from ftrain.models.encoders import whisper
from ftrain.models.omni import raw_items
from ftrain.ops import layer_params, plain


def make_twin(hf: dict) -> WhisperEncoder:
    theirs = WhisperEncoder._from_config(WhisperConfig(**hf), attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            norm = p.ndim == 1 and name.endswith("weight")
            p.copy_(1 + noise / 4 if norm else noise * (0.5 if p.ndim == 1 else 0.2))
            p.requires_grad_()  # the positions as well
    return theirs


def cut(theirs: WhisperEncoder, sound: torch.Tensor) -> torch.Tensor:
    """The twin on a sound that is shorter than it wants, by its modules: with as many positions as there are."""
    h = F.gelu(theirs.conv2(F.gelu(theirs.conv1(sound.T[None])))).mT
    h = h + theirs.embed_positions.weight[: h.shape[1]]
    for layer in theirs.layers:
        h = layer(h, None)
    return theirs.layer_norm(h)[0]


def hold(hf: dict, sounds: list[torch.Tensor], by=cut) -> tuple[float, float]:
    """Outputs and gradients of all sounds in one pack, against the twin on one after the other."""
    cfg, theirs = whisper.config(hf), make_twin({k: v for k, v in hf.items() if k != "stack"})
    p = {f"ear.{n}": t.detach().clone().requires_grad_() for n, t in theirs.named_parameters()}
    specs = whisper.specs(cfg, "ear")
    assert {n: tuple(t.shape) for n, t in p.items()} == {n: spec.shape for n, spec in specs.items()}
    assert [n for n, spec in specs.items() if not spec.lr] == ["ear.embed_positions.weight"]
    items = raw_items(SimpleNamespace(module=whisper, cfg=cfg), sounds)
    tokens = torch.arange(sum(len(item.slots) for item in items))
    batch, _ = pack("ear", seat(items, tokens), whisper.blank(cfg), (1, len(tokens)))
    encoded = whisper.encode(p, "ear", layer_params(batch, "ear"), cfg, plain())
    ours = plain().place(encoded, batch, "ear")[0]
    found = [by(theirs, sound) for sound in sounds]
    found = [F.pad(h, (0, 0, 0, -len(h) % cfg.stack)).unflatten(0, (-1, cfg.stack)).flatten(1) for h in found]
    assert [len(h) for h in found] == [len(item.slots) for item in items]
    expected = torch.cat(found)
    assert expected.shape[1] == cfg.width
    of_outputs = twins.relative(ours.detach(), expected.detach())
    assert of_outputs <= 3e-5, f"outputs are off by {of_outputs}"
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (ours * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    return of_outputs, twins.same_gradients(p, theirs, lambda of: {f"ear.{n}": t for n, t in of.items()})


@st.composite
def configs(draw) -> dict:
    heads = draw(st.integers(1, 3))
    return {
        "d_model": heads * 2 * draw(st.integers(2, 4)),
        "encoder_layers": draw(st.integers(1, 3)),
        "encoder_attention_heads": heads,
        "encoder_ffn_dim": draw(st.integers(5, 20)),
        "num_mel_bins": draw(st.integers(3, 9)),
        "max_source_positions": 20,
        "stack": draw(st.integers(1, 3)),
    }


@settings(max_examples=10, deadline=None)
@given(configs(), st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_parity(hf, lengths):
    generator = torch.Generator().manual_seed(2)
    hold(hf, [torch.randn(n, hf["num_mel_bins"], generator=generator) for n in lengths])


def test_thirty_seconds():
    hf = {"d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 40, "num_mel_bins": 80}
    sounds = torch.randn(2, 3000, 80, generator=torch.Generator().manual_seed(3))
    hold(hf, list(sounds), lambda theirs, sound: theirs(sound.T[None]).last_hidden_state[0])


def test_sounds_that_do_not_fit():
    cfg = whisper.config({"num_mel_bins": 5, "max_source_positions": 20})
    with pytest.raises(ValueError, match=r"\[7, 4\].*\[frames, 5\]"):
        whisper.items(torch.zeros(7, 4), cfg)
    with pytest.raises(ValueError, match="41 frames: it must have 1 to 40"):
        whisper.items(torch.zeros(41, 5), cfg)
    with pytest.raises(ValueError, match="stack = 0"):
        whisper.config({"stack": 0})

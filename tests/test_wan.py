"""Wan's diffusion transformer against diffusers' `WanTransformer3DModel`, and sampling against its Euler scheduler."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import relative, same_gradients

import ftrain
from ftrain import checkpoint
from ftrain.job import make_job
from ftrain.mesh import Mesh
from ftrain.model import find_model
from ftrain.models import flow, wan
from ftrain.ops import plain
from ftrain.plan import find_plan
from ftrain.pretrained import export
from ftrain.ranks import run_ranks
from ftrain.safetensors_io import read_header
from ftrain.state import init_state

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")
TINY = wan.PRESETS["wan-tiny"]
# Of gradients in fp32, at most 5e-5 in 200 draws; in fp64, with both sides' casts to fp32 left out, 1e-13.
ROUNDING = 1e-4


def twin(hf: dict, seed: int = 0):
    """diffusers' model, with weights large enough that every part of it matters."""
    model = diffusers.WanTransformer3DModel.from_config(hf)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            norm = "norm" in name and name.endswith("weight")
            p.copy_(1 + noise / 4 if norm else noise * (0.5 if p.ndim == 1 else 0.2))
    return model.eval()


def ours(theirs) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in theirs.named_parameters()}


def inputs(cfg, tokens: tuple[int, int, int], rows: int = 2, context: int = 4, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, cfg.channels, *(n * p for n, p in zip(tokens, cfg.patch, strict=True)))
    return {
        "latents": torch.randn(shape, generator=generator),
        "noise": torch.randn(shape, generator=generator),
        "time": torch.rand(rows, generator=generator),
        "context": torch.randn(rows, context, cfg.text, generator=generator),
    }


def loss_of(theirs, given: dict) -> torch.Tensor:
    """The twin's velocity's squared error, summed over each row: [B]."""
    time = given["time"][:, None, None, None, None]
    noised = (1 - time) * given["latents"] + time * given["noise"]
    found = theirs(noised, given["time"] * 1000, given["context"]).sample
    return (found - (given["noise"] - given["latents"])).square().flatten(1).sum(1)


def padded(batch: dict, tokens: int) -> dict:
    """With so many tokens of padding, which are not zero, at the end of each row."""
    fill = {"segment_ids": -1, "position_ids": 1}
    out = dict(batch)
    for name in ("latents", "noise", "position_ids", "segment_ids"):
        more = torch.full_like(batch[name][:, :1], fill.get(name, 5)).repeat_interleave(tokens, 1)
        out[name] = torch.cat([batch[name], more], 1)
    return out


# Heads and their size. Norms of only two elements have no gradient but their rounding's.
HEADS = [(2, 8), (3, 2), (2, 4), (1, 6), (3, 10), (1, 14), (2, 24)]
small = st.fixed_dictionaries({
    "num_layers": st.integers(1, 3),
    "ffn_dim": st.integers(3, 30),
    "in_channels": st.integers(1, 4),
    "patch_size": st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2)),
    "text_dim": st.integers(2, 9),
    "freq_dim": st.sampled_from([2, 10, 16]),
    "cross_attn_norm": st.booleans(),
    "eps": st.sampled_from([1e-6, 1e-2]),
})  # fmt: skip


@settings(max_examples=8, deadline=None)
@given(small, st.sampled_from(HEADS), st.tuples(*[st.integers(1, 3)] * 3), st.integers(1, 6), st.integers(0, 2**16))
def test_velocity_loss_and_every_gradient_are_the_twins(hf, heads, tokens, context, seed):
    hf = {**TINY, **hf, "out_channels": hf["in_channels"]}
    hf["num_attention_heads"], hf["attention_head_dim"] = heads
    model, theirs = find_model(hf), twin(hf, seed)
    params, given = ours(theirs), inputs(model.cfg, tokens, context=context, seed=seed)
    assert {name: tuple(p.shape) for name, p in params.items()} == {n: s.shape for n, s in model.specs.items()}
    batch = model.prepare(given)

    noised = (given["time"] * 1000, given["context"])
    expected = theirs(given["noise"], *noised).sample
    found = wan.velocity(params, {**batch, "noised": batch["noise"]}, model.cfg, plain())
    assert found.shape == batch["latents"].shape
    assert relative(wan.unpatchify(found.detach(), given["noise"].shape[2:], model.cfg), expected.detach()) < 3e-5
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * cotangent).sum().backward()
    (found * wan.patchify(cotangent, model.cfg)).sum().backward()
    same_gradients(params, theirs, dict, ROUNDING)

    params = ours(theirs)
    theirs.zero_grad()
    out = model.forward(params, padded(batch, 3), plain())
    expected = loss_of(theirs, given).sum()
    assert relative(out.losses["loss"].detach(), expected.detach()) < 1e-5
    out.losses["loss"].backward()
    expected.backward()
    same_gradients(params, theirs, dict, ROUNDING)
    assert out.hidden is None and out.unembedding is None
    assert int(model.targets(padded(batch, 3))["loss"]) == given["latents"].numel()


def test_rows_are_told_their_own_time_and_text():
    model, theirs = find_model(TINY), twin(TINY)
    given = inputs(model.cfg, (2, 2, 3), rows=3)
    rows = [{name: t[i : i + 1] for name, t in given.items()} for i in range(3)]
    with torch.no_grad():
        alone = [model.forward(ours(theirs), model.prepare(row), plain()).losses["loss"] for row in rows]
        torch.testing.assert_close(torch.stack(alone), loss_of(theirs, given), rtol=1e-5, atol=0)


def test_segments_of_a_row_do_not_see_each_other():
    model = find_model(TINY)
    params, batch = ours(twin(TINY)), model.prepare(inputs(model.cfg, (2, 2, 2), rows=1))
    with torch.no_grad():
        whole = wan.velocity(params, {**batch, "noised": batch["noise"]}, model.cfg, plain())
        batch["segment_ids"][:, 4:] = 1
        apart = wan.velocity(params, {**batch, "noised": batch["noise"]}, model.cfg, plain())
        for part in (slice(4), slice(4, None)):
            alone = {name: t if name.startswith("row_") else t[:, part] for name, t in batch.items()}
            alone["segment_ids"] = torch.zeros_like(alone["segment_ids"])
            found = wan.velocity(params, {**alone, "noised": alone["noise"]}, model.cfg, plain())
            torch.testing.assert_close(apart[:, part], found, rtol=1e-5, atol=1e-5)
    assert (apart - whole).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_of_a_dtype_give_that_dtype_and_an_fp32_loss(dtype):
    model = find_model(TINY)
    generator = torch.Generator().manual_seed(0)
    params = {n: spec.init(spec.shape, generator).to(dtype) for n, spec in model.specs.items()}
    batch = model.prepare(inputs(model.cfg, (1, 3, 3)))
    assert wan.velocity(params, {**batch, "noised": batch["noise"]}, model.cfg, plain()).dtype == dtype
    loss = model.forward(params, batch, plain()).losses["loss"]
    assert loss.dtype == torch.float32
    assert 0.5 < float(loss / model.targets(batch)["loss"]) < 20


@pytest.mark.parametrize("shards", [False, True])
def test_a_diffusers_directory_is_opened_and_written(tmp_path, shards):
    theirs = twin(TINY)
    theirs.save_pretrained(tmp_path / "a", max_shard_size="40KB" if shards else "1GB")
    assert (tmp_path / "a" / "diffusion_pytorch_model.safetensors.index.json").exists() == shards
    model, params = ftrain.load_pretrained(tmp_path / "a")
    assert model.family == "wan" and model.cfg == find_model("wan-tiny").cfg
    assert all(torch.equal(params[name], p) for name, p in theirs.named_parameters())

    export(tmp_path / "a", tmp_path / "b", file_bytes=40_000 if shards else 1 << 30)
    files = sorted((tmp_path / "b").glob("diffusion_pytorch_model-*.safetensors"))
    assert (len(files) > 1) == shards
    again, info = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(p, dict(again.named_parameters())[name]) for name, p in theirs.named_parameters())
    export(tmp_path / "a", tmp_path / "c", "bf16")
    dtypes = {entry.dtype for file in (tmp_path / "c").glob("*.safetensors") for entry in read_header(file).values()}
    assert dtypes == {"BF16"}


def test_the_variant_beside_the_weights_is_left_alone(tmp_path):
    theirs = twin(TINY)
    theirs.save_pretrained(tmp_path)
    twin(TINY, seed=1).save_pretrained(tmp_path, variant="fp16")
    _, params = ftrain.load_pretrained(tmp_path)
    assert all(torch.equal(params[name], p) for name, p in theirs.named_parameters())


@pytest.mark.parametrize(
    "name, billions", [("wan-tiny", 0.0001), ("Wan2.1-T2V-1.3B", 1.419), ("Wan2.1-T2V-14B", 14.289)]
)
def test_presets_have_the_twins_parameters(name, billions):
    model = find_model(name)
    with torch.device("meta"):
        theirs = diffusers.WanTransformer3DModel.from_config(model.hf)
    assert {n: tuple(p.shape) for n, p in theirs.named_parameters()} == {n: s.shape for n, s in model.specs.items()}
    assert sum(p.numel() for p in theirs.parameters()) / 1e9 == pytest.approx(billions, rel=0.001, abs=1e-4)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"image_dim": 1280}, "image_dim = 1280 .* null: image to video is not implemented"),
        ({"added_kv_proj_dim": 48}, "added_kv_proj_dim = 48 .* null: image to video is not implemented"),
        ({"pos_embed_seq_len": 514}, "pos_embed_seq_len = 514 .* null: image to video is not implemented"),
        ({"in_channels": 36, "out_channels": 16}, "out_channels = 16 .* in_channels = 36: image to video is not"),
        ({"qk_norm": "layer_norm"}, "qk_norm = 'layer_norm' .* 'rms_norm_across_heads'"),
        ({"patch_size": [2, 2]}, r"patch_size = \[2, 2\] .* three positive integers: time, height, width"),
        ({"attention_head_dim": 7}, "attention_head_dim = 7 .* even"),
        ({"num_layers": 0}, "num_layers = 0 .* a positive integer"),
        ({"_class_name": "FluxTransformer2DModel"}, "'FluxTransformer2DModel' is not supported: supported are .*wan"),
    ],
)
def test_what_is_no_such_model_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        find_model({**TINY, **change})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"noise": None}, "the inputs lack noise"),
        ({"latents": torch.zeros(2, 4, 1, 2, 2)}, r"latents are \[2, 4, 1, 2, 2\]: they must be \[B, 3, T"),
        ({"latents": torch.zeros(2, 3, 1, 3, 2)}, r"latents are .* multiples of the patch's \[1, 2, 2\]"),
        ({"latents": torch.zeros(2, 3, 65, 2, 2)}, "latents are .* at most 64 times that"),
        ({"noise": torch.zeros(1, 3, 1, 2, 2)}, r"noise is \[1, 3, 1, 2, 2\]: it must be as the latents"),
        ({"time": torch.tensor([0.5, 500.0])}, r"time is \[0.5, 500.0\]: it must be 2 numbers from 0 to 1"),
        ({"context": torch.zeros(2, 4, 7)}, r"context is \[2, 4, 7\]: it must be \[2, L, 22\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, words):
    model = find_model(TINY)
    given = {n: t for n, t in (inputs(model.cfg, (1, 1, 1)) | change).items() if t is not None}
    with pytest.raises(ValueError, match=words):
        model.prepare(given)


def test_patches_lie_as_in_the_convolution_and_come_back():
    cfg = find_model({**TINY, "patch_size": [2, 1, 3]}).cfg
    x = torch.randn(2, 3, 4, 5, 6)
    tokens = wan.patchify(x, cfg)
    assert tokens.shape == (2, 2 * 5 * 2, 3 * 6)
    assert torch.equal(tokens[1, 2 * 5 + 3 * 2 + 1].view(3, 2, 1, 3), x[1, :, 2:4, 3:4, 3:6])
    assert torch.equal(wan.unpatchify(tokens, (4, 5, 6), cfg), x)


@pytest.mark.parametrize("shift, guidance", [(1.0, 1.0), (3.0, 4.0)])
def test_samples_are_those_of_the_twin_and_its_euler_scheduler(shift, guidance):
    model, theirs = find_model(TINY), twin(TINY)
    given = inputs(model.cfg, (2, 2, 1))
    x, context, negative = given["noise"], given["context"], torch.zeros(2, 6, model.cfg.text)
    found = wan.sample(ours(theirs), x, context, model.cfg, plain(), 5, shift, guidance, negative)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=list(np.linspace(1, 1 / 5, 5)))
    np.testing.assert_allclose(scheduler.sigmas, flow.schedule(5, shift), rtol=1e-6)
    with torch.no_grad():
        for time in scheduler.timesteps:
            v = theirs(x, time.expand(2), context).sample
            if guidance != 1:
                without = theirs(x, time.expand(2), negative).sample
                v = without + guidance * (v - without)
            x = scheduler.step(v, time, x).prev_sample
    assert relative(found, x) < 1e-4
    with pytest.raises(ValueError, match="guidance = 2 needs the negative texts"):
        wan.sample({}, x, context, model.cfg, plain(), guidance=2)


def test_a_small_model_learns_to_draw():
    """Two texts, an image for each: what is drawn for a text is its image."""
    model = find_model(TINY)
    generator = torch.Generator().manual_seed(0)
    params = {n: spec.init(spec.shape, generator).requires_grad_() for n, spec in model.specs.items()}
    images, texts = torch.randn(2, 3, 1, 4, 4, generator=generator), torch.randn(2, 2, 22, generator=generator)
    adam = torch.optim.Adam(params.values(), lr=5e-3)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 800)
    for _ in range(800):
        which = torch.randint(2, (16,), generator=generator)
        batch = model.prepare({
            "latents": images[which], "context": texts[which],
            "noise": torch.randn(16, 3, 1, 4, 4, generator=generator), "time": torch.rand(16, generator=generator),
        })  # fmt: skip
        adam.zero_grad()
        (model.forward(params, batch, plain()).losses["loss"] / model.targets(batch)["loss"]).backward()
        adam.step()
        slower.step()
    drawn = wan.sample(params, torch.randn(2, 3, 1, 4, 4, generator=generator), texts, model.cfg, plain(), 20)
    assert float((drawn - images).square().mean()) < 0.1 < 1 < float((drawn - images.flip(0)).square().mean())


def test_examples_are_prepared():
    model = find_model(TINY)
    shapes = [tuple(model.prepare(x)["latents"].shape) for x in model.examples(torch.Generator().manual_seed(0))]
    assert shapes == [(1, 6, 12), (1, 12, 12)]


def test_what_was_trained_is_as_diffusers_opens_it(tmp_path):
    model = find_model(TINY)

    def save_it(rank: int):
        job = make_job(model, find_plan("fsdp_sp"), Mesh(2, 1, 1))
        state = init_state(model.specs, job.placements, job.device_mesh, seed=0)
        return checkpoint.save(str(tmp_path / "run"), state, model, {})

    saved = run_ranks(2, save_it)[0]
    _, params = ftrain.load_pretrained(saved)
    for directory in (saved, export(saved, tmp_path / "exported")):
        theirs = diffusers.WanTransformer3DModel.from_pretrained(directory)
        assert theirs.config.ffn_dim == TINY["ffn_dim"]
        assert all(torch.equal(params[name], p) for name, p in theirs.named_parameters())

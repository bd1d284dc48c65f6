"""Janus against transformers': images seen, images drawn, its VQ model, and drawing itself."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
import twins
from ftrain import load_pretrained, logits
from ftrain.equivalence import mixed_batch
from ftrain.items import on_one_device
from ftrain.model import find_model, param_counts
from ftrain.models import janus
from ftrain.models.decoders import codes as head
from ftrain.models import vq
from ftrain.ops import plain
from ftrain.pretrained import export
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = janus.PRESETS["janus-tiny"]
TOLERANCE = 3e-5
FEW = settings(max_examples=6, deadline=None)


def changed(hf=TINY, text=(), vision=(), vq=(), **top):
    """The config with other values in its parts."""
    parts = {"text_config": dict(text), "vision_config": dict(vision), "vq_config": dict(vq)}
    return {**hf, **{name: {**hf[name], **part} for name, part in parts.items()}, **top}


def both(hf, seed=0):
    """-> (ours, the twin): weights large enough that every part matters."""
    theirs = transformers.JanusForConditionalGeneration(transformers.AutoConfig.for_model(**hf))
    theirs.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            is_norm = "norm" in name and name.endswith("weight")
            p.copy_(1 + noise / 4 if is_norm else noise * (0.5 if p.ndim == 1 else 0.2))
    return find_model(hf), theirs.eval()


def leaves(theirs):
    return {name: p.detach().clone().requires_grad_() for name, p in theirs.named_parameters()}


def trained(tensors):
    return {name: t for name, t in tensors.items() if not name.startswith(janus.VQ)}


def rows(model, kinds, seed=0, left=False):
    """Examples of these kinds as the rows of one batch, filled up with padding: processor-like inputs."""
    found = [model.examples(torch.Generator().manual_seed(seed + i))[kind] for i, kind in enumerate(kinds)]
    longest = max(one["input_ids"].shape[1] for one in found)
    out = {"input_ids": [], "attention_mask": [], "image_generated": []}
    for one in found:
        ids = one["input_ids"][0]
        more = (longest - len(ids), 0) if left else (0, longest - len(ids))
        out["input_ids"].append(F.pad(ids, more, value=model.cfg.padding))
        out["attention_mask"].append(F.pad(torch.ones_like(ids), more))
        images = int((ids == model.cfg.image_token).sum()) // model.cfg.image_tokens
        out["image_generated"].append(one.get("image_generated", torch.full((images,), "generated_codes" in one)))
    out = {"input_ids": torch.stack(out["input_ids"]), "attention_mask": torch.stack(out["attention_mask"]),
           "image_generated": torch.cat(out["image_generated"])}  # fmt: skip
    for key in ("pixel_values", "generated_codes"):
        if parts := [one[key] for one in found if key in one]:
            out[key] = torch.cat(parts)
    return out


def run_twin(theirs, inputs):
    """-> (logits, logits of image codes) of the twin, whose own forward takes no images to be drawn."""
    ids, drawn = inputs["input_ids"], inputs["image_generated"]
    n, H = theirs.config.vision_config.num_image_tokens, theirs.config.text_config.hidden_size
    images = torch.zeros(len(drawn), n, H)
    if "pixel_values" in inputs:
        seen = theirs.model.get_image_features(inputs["pixel_values"]).pooler_output
        images = images.index_put(((~drawn).nonzero()[:, 0],), seen)
    if "generated_codes" in inputs:
        embedded = theirs.prepare_embeddings_for_image_generation(inputs["generated_codes"])
        images = images.index_put((drawn.nonzero()[:, 0],), embedded)
    at = (ids == theirs.config.image_token_id)[..., None]
    embeds = theirs.get_input_embeddings()(ids).masked_scatter(at, images)
    hidden = theirs.model.language_model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], use_cache=False)
    hidden = hidden.last_hidden_state
    return theirs.lm_head(hidden), theirs.model.generation_head(hidden)


def hold(model, theirs, inputs):
    """Hold logits of text and of codes, the image loss and every gradient to the twin's: -> the largest errors."""
    params = leaves(theirs)
    batch = on_one_device(model.prepare(inputs), model.blanks)
    out = model.forward(params, batch, plain())
    text = out.hidden @ out.unembedding.T
    of_codes = head.logits(params, janus.HEAD, out.hidden, model.cfg.image, plain())
    their_text, their_codes = run_twin(theirs, inputs)
    seen = inputs["attention_mask"].bool()
    if not inputs["image_generated"].any():  # then the twin's own forward can say it all
        own = theirs(**{k: inputs[k] for k in ("input_ids", "attention_mask", "pixel_values") if k in inputs}).logits
        assert twins.relative(their_text[seen], own[seen]) < 1e-6
    errors = [twins.relative(text[seen], their_text[seen]), twins.relative(of_codes[seen], their_codes[seen])]

    # Each code is the target of the position before it.
    n, at = model.cfg.image_tokens, (inputs["input_ids"] == model.cfg.image_token).flatten().nonzero()[:, 0]
    before = at.view(-1, n)[inputs["image_generated"]].flatten() - 1
    targets = inputs.get("generated_codes", torch.zeros(0, dtype=torch.long)).flatten()
    loss = F.cross_entropy(their_codes.flatten(0, 1)[before], targets, reduction="sum")
    errors.append(abs(float(out.losses["image"] - loss)) / max(float(loss), 1.0))
    assert int(model.targets({"labels": batch["input_ids"], **batch})["image"]) == len(targets)
    assert max(errors) <= TOLERANCE, errors

    cotangent = torch.randn(text.shape, generator=torch.Generator().manual_seed(1)) * seen[..., None]
    theirs.zero_grad()
    ((their_text * cotangent).sum() + 3 * loss).backward()
    ((text * cotangent).sum() + 3 * out.losses["image"]).backward()
    assert all(params[name].grad is None for name in params if name.startswith(janus.VQ))
    return max(errors), twins.same_gradients(params, theirs, trained)


@st.composite
def configs(draw):
    hidden = 24
    kv = draw(st.sampled_from([1, 2]))
    patch, side = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    act = draw(st.sampled_from(["gelu", "gelu_pytorch_tanh", "relu"]))
    return changed(
        text={
            "hidden_size": hidden, "num_attention_heads": kv * draw(st.sampled_from([1, 2])),
            "num_key_value_heads": kv, "num_hidden_layers": draw(st.integers(1, 2)),
            "attention_bias": draw(st.booleans()), "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
        },
        vision={
            "hidden_size": 12, "num_attention_heads": draw(st.sampled_from([1, 2, 3])),
            "num_hidden_layers": draw(st.integers(1, 3)), "mlp_ratio": draw(st.sampled_from([1.5, 2.0])),
            "image_size": patch * side, "patch_size": patch,
            "num_image_tokens": side**2, "num_channels": draw(st.sampled_from([1, 3])), "hidden_act": act,
            "attention_bias": draw(st.booleans()), "layer_norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
            "projection_dim": hidden, "depth": draw(st.integers(1, 3)),
        },
        vq={
            "num_embeddings": draw(st.sampled_from([5, 37])), "embed_dim": draw(st.sampled_from([1, 6])),
            "projection_dim": hidden, "image_token_embed_dim": hidden, "num_hidden_layers": draw(st.integers(1, 3)),
            "hidden_act": draw(st.sampled_from(["gelu", "silu"])),
        },
        tie_word_embeddings=draw(st.booleans()),
    )  # fmt: skip


@FEW
@given(configs(), st.lists(st.integers(0, 4), min_size=1, max_size=3), st.booleans(), st.integers(0, 99))
def test_logits_and_every_gradient_are_the_twins(hf, kinds, left, seed):
    model, theirs = both(hf, seed)
    hold(model, theirs, rows(model, kinds, seed, left))


@pytest.mark.parametrize("kinds", [[0], [1], [2], [3], [4], [4, 0, 3, 1]], ids=str)
def test_every_kind_of_sample_is_the_twins(kinds):
    model, theirs = both(TINY)
    hold(model, theirs, rows(model, kinds))


def test_an_image_depends_on_its_own_pixels_and_codes_alone():
    model, theirs = both(TINY)
    params, inputs = leaves(theirs), rows(model, [1, 3])
    first = logits(model, params, inputs)
    pixels = logits(model, params, inputs | {"pixel_values": inputs["pixel_values"] + 1})
    drawn = logits(model, params, inputs | {"generated_codes": (inputs["generated_codes"] + 1) % model.cfg.image.codes})
    assert torch.equal(first[1], pixels[1]) and not torch.allclose(first[0], pixels[0])
    assert torch.equal(first[0], drawn[0]) and not torch.allclose(first[1], drawn[1])


@st.composite
def vq_configs(draw):
    multipliers = draw(st.lists(st.integers(1, 2), min_size=1, max_size=3))
    return {
        "num_embeddings": 11, "embed_dim": draw(st.integers(2, 5)), "latent_channels": draw(st.integers(1, 7)),
        "base_channels": 32, "channel_multiplier": multipliers, "num_res_blocks": draw(st.integers(1, 2)),
        "in_channels": draw(st.sampled_from([1, 3])), "out_channels": draw(st.sampled_from([1, 3])),
    }  # fmt: skip


@FEW
@given(vq_configs(), st.integers(0, 99))
def test_the_vq_model_is_the_twins(of_vq, seed):
    # Its side in codes is the vision model's side in patches.
    patch = 2 ** (len(of_vq["channel_multiplier"]) - 1)
    vision = {"image_size": 3 * patch, "patch_size": patch, "num_image_tokens": 9}
    model, theirs = both(changed(vq=of_vq, vision=vision), seed)
    theirs = theirs.double()  # many convolutions deep, fp32 loses too much for a tight tolerance
    cfg, params, twin = model.cfg.vq, leaves(theirs), theirs.model.vqmodel
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(2, cfg.into, 3 * patch, 3 * patch, generator=generator, dtype=torch.float64)
    found = vq.encode(params, janus.VQ, pixels, cfg, cosine=False)
    assert torch.equal(found.flatten(), twin.encode(pixels).image_tokens)
    ours, expected = vq.latents(params, janus.VQ, pixels, cfg), twin.quant_conv(twin.encoder(pixels))
    expected = expected.permute(0, 2, 3, 1)
    assert twins.relative(ours, expected) <= 1e-10
    painted, decoded = vq.decode(params, janus.VQ, found, cfg), theirs.decode_image_tokens(found).permute(0, 3, 1, 2)
    assert twins.relative(painted, decoded) <= 1e-10
    cotangents = torch.randn(ours.shape, generator=generator), torch.randn(painted.shape, generator=generator)
    theirs.zero_grad()
    for a, b in ((ours, painted), (expected, decoded)):
        ((a * cotangents[0]).sum() + (b * cotangents[1]).sum()).backward()
    names = {name: name.removeprefix(f"{janus.VQ}.") for name in params if name.startswith(janus.VQ)}
    of_vq = {short: params[name] for name, short in names.items()}
    twins.same_gradients(of_vq, twin, dict, 1e-10)


def test_codes_are_those_of_the_nearest_direction():
    model, theirs = both(TINY)
    params = {name: p.detach() for name, p in theirs.named_parameters()}
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = janus.image_codes(params, pixels, model.cfg)
    z, table = vq.latents(params, janus.VQ, pixels, model.cfg.vq), params[f"{janus.VQ}.quantize.embedding.weight"]
    likeness = F.cosine_similarity(z.flatten(1, 2)[:, :, None], table[None, None], dim=-1)
    assert torch.equal(found, likeness.argmax(-1))
    assert not torch.equal(found, janus.image_codes(params, pixels, model.cfg, cosine=False))
    assert janus.image_pixels(params, found, model.cfg).shape == pixels.shape
    with pytest.raises(ValueError, match="15 codes"):
        janus.image_pixels(params, found[:, :15], model.cfg)


@pytest.mark.parametrize("sampled", [False, True])
def test_drawing_is_the_twins(sampled):
    """Left padding, guidance, greedy and sampled: the twin's `generate` draws the same codes."""
    model, theirs = both(TINY)
    params = {name: p.detach() for name, p in theirs.named_parameters()}
    begin = 4
    ids = torch.tensor([[2, 2, 0, 17, 9, begin], [0, 8, 7, 6, 5, begin], [2, 0, 3, 250, 11, begin]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 2).long()}
    theirs.generation_config.generation_kwargs = {"boi_token_id": begin}
    theirs.generation_config.pad_token_id, theirs.generation_config.bos_token_id = 2, 0
    torch.manual_seed(5)
    expected = theirs.generate(
        **inputs, generation_mode="image", do_sample=sampled, guidance_scale=3.0, top_k=0, top_p=1.0, temperature=1.0
    )
    found = janus.generate_image(
        params, inputs, model.cfg, guidance=3.0, temperature=1.0 if sampled else 0.0, seed=5
    )  # fmt: skip
    assert torch.equal(found, expected)
    assert len(found.unique()) > 5
    other = janus.generate_image(params, inputs, model.cfg, guidance=1, temperature=0)
    assert other.shape == found.shape and not torch.equal(other, found)


def test_what_is_drawn_is_what_the_forward_finds_likeliest():
    """The memory of keys and values changes nothing: teacher-forced, every drawn code is the likeliest."""
    model, theirs = both(TINY)
    params = {name: p.detach() for name, p in theirs.named_parameters()}
    prompt = torch.tensor([[0, 17, 9, 4]])
    drawn = janus.generate_image(params, {"input_ids": prompt}, model.cfg, guidance=1, temperature=0)
    ids = torch.cat([prompt, torch.full((1, model.cfg.image_tokens), model.cfg.image_token)], 1)
    batch = on_one_device(model.prepare({"input_ids": ids, "generated_codes": drawn}), model.blanks)
    hidden = model.forward(params, batch, plain()).hidden
    of_codes = head.logits(params, janus.HEAD, hidden, model.cfg.image, plain()).argmax(-1)
    assert torch.equal(of_codes[batch["image.labels"] >= 0], drawn[0])


@pytest.mark.parametrize("tied", [False, True])
def test_the_published_format_goes_in_and_out(tied, tmp_path):
    _, theirs = both(changed(tie_word_embeddings=tied))
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = load_pretrained(tmp_path / "theirs")
    inputs = rows(model, [2, 1])
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected, _ = run_twin(theirs, inputs)
        assert twins.relative(logits(model, params, inputs)[seen], expected[seen]) <= TOLERANCE
        exported = export(tmp_path / "theirs", tmp_path / "ours")
        again = type(theirs).from_pretrained(exported, attn_implementation="eager").eval()
        assert torch.equal(run_twin(again, inputs)[0][seen], expected[seen])


def test_a_config_that_says_nothing_of_tying_is_not_tied(tmp_path):
    """So transformers 4 wrote those of the published checkpoints."""
    both(TINY)[1].save_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    del hf["tie_word_embeddings"], hf["text_config"]["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(hf))
    model, params = load_pretrained(tmp_path)
    assert not model.cfg.tied and "lm_head.weight" in params


@pytest.mark.parametrize("name", janus.PRESETS)
def test_presets_have_the_twins_parameters(name):
    model = find_model(name)
    with torch.device("meta"):
        theirs = transformers.JanusForConditionalGeneration(transformers.AutoConfig.for_model(**model.hf))
    shapes = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    assert {name: spec.shape for name, spec in model.specs.items()} == shapes
    assert {name for name, spec in model.specs.items() if not spec.lr} == set(shapes) - set(trained(shapes))
    total, active = param_counts(model.specs)
    assert total == sum(p.numel() for p in theirs.parameters()) and active < total


def test_a_batch_of_many_kinds_learns():
    """What is trained gets a gradient, from labels of text and of images; text before an image has no label."""
    model = find_model("janus-tiny")
    batch = mixed_batch(model, 5, seed=0, kinds=range(5))
    packed = on_one_device(batch, model.blanks)
    generator = torch.Generator().manual_seed(0)
    params = {n: s.init(s.shape, generator).requires_grad_(s.lr > 0) for n, s in model.specs.items()}
    out = model.forward(params, packed, plain())
    text = F.cross_entropy((out.hidden @ out.unembedding.T).flatten(0, 1), packed["labels"].flatten())
    (text + out.losses["image"]).backward()
    assert {name for name, p in params.items() if p.grad is not None} == set(trained(params))
    assert int(model.targets(packed)["image"]) == 2 * model.cfg.image_tokens

    ids = torch.tensor([[0, 5, *[model.cfg.image_token] * 16, 6]])
    drawn = {"generated_codes": torch.arange(16)[None], "labels": F.pad(ids[:, 1:], (0, 1), value=-100)}
    batch = model.prepare({"input_ids": ids, **drawn})
    assert batch["labels"].tolist() == [[5, *[-100] * 16, 6, -100]]
    assert batch["image.labels"].tolist() == [[-100, *range(16), -100, -100]]


IMAGE = [299] * 16
PIXELS, CODES = torch.zeros(1, 3, 8, 8), torch.zeros(1, 16, dtype=torch.long)


@pytest.mark.parametrize(
    "ids, more, says",
    [
        ([0, *IMAGE[1:]], {"pixel_values": PIXELS}, "15 placeholder tokens"),
        ([0, *IMAGE], {}, "0 outputs of the encoder for 16 placeholder"),
        ([0, 1], {"pixel_values": PIXELS}, "16 outputs of the encoder for 0 placeholder"),
        ([0, *IMAGE], {"pixel_values": PIXELS[..., :6]}, r"\[1, 3, 8, 6\]"),
        ([0, *IMAGE[:8], 1, *IMAGE[:8]], {"pixel_values": PIXELS}, "not in one run"),
        ([0, *IMAGE, *IMAGE], {"pixel_values": PIXELS, "generated_codes": CODES}, "image_generated"),
        ([0, *IMAGE], {"generated_codes": CODES, "image_generated": torch.ones(2)}, "of 2 images: the tokens have 1"),
        ([0, *IMAGE, *IMAGE], {"generated_codes": CODES}, "of 1 images, for 2"),
        ([0, *IMAGE], {"generated_codes": CODES[:, :9]}, r"\[1, 9\]"),
        ([0, *IMAGE], {"generated_codes": CODES + 37}, "from 37 to 37: they must be 0 to 36"),
        ([*IMAGE, 0], {"generated_codes": CODES}, "no token before it"),
    ],
)
def test_inputs_that_do_not_match_are_refused(ids, more, says):
    model = find_model("janus-tiny")
    with pytest.raises(ValueError, match=says):
        model.prepare({"input_ids": torch.tensor([ids]), **more})


@pytest.mark.parametrize(
    "parts, says",
    [
        ({"text": {"model_type": "gemma"}}, "text_config.model_type = 'gemma'"),
        ({"image_token_id": 300}, "image_token_id = 300"),
        ({"vision": {"projection_dim": 31}}, "vision_config.projection_dim = 31"),
        ({"vq": {"projection_dim": 31}}, "vq_config.projection_dim = 31"),
        ({"vq": {"image_token_embed_dim": 31}}, "vq_config.image_token_embed_dim = 31"),
        ({"vision": {"num_image_tokens": 15}}, "num_image_tokens = 15"),
        ({"vision": {"num_attention_heads": 5}}, "hidden_size = 24"),
        ({"vision": {"use_qk_norm": True}}, "use_qk_norm = True"),
        ({"vision": {"hidden_act": "swish7"}}, "hidden_act = 'swish7'"),
        ({"vision": {"attention_dropout": 0.1}}, "attention_dropout = 0.1"),
        ({"vq": {"base_channels": 48}}, "base_channels = 48"),
        ({"vq": {"channel_multiplier": []}}, "channel_multiplier = \\[\\]"),
        ({"vq": {"double_latent": True}}, "double_latent = True"),
    ],
)
def test_configs_that_make_no_sense_are_refused(parts, says):
    with pytest.raises(ValueError, match=says):
        find_model(changed(**parts))


def test_guidance_needs_a_padding_token():
    model = find_model(changed(text={"pad_token_id": None}))
    with pytest.raises(ValueError, match="pad_token_id"):
        janus.generate_image({}, {"input_ids": torch.zeros(1, 3, dtype=torch.long)}, model.cfg)

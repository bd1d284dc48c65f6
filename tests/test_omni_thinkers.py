"""The thinkers of Qwen2.5-Omni and Qwen3-Omni-MoE against their transformers twins."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import twins
from ftrain.model import find_model, logits
from ftrain.models import qwen2_5_omni, qwen3_omni_moe
from ftrain.pretrained import export, load_pretrained

CLASSES = {
    "qwen2_5_omni": transformers.Qwen2_5OmniThinkerForConditionalGeneration,
    "qwen3_omni_moe": transformers.Qwen3OmniMoeThinkerForConditionalGeneration,
}
MODULES = {"qwen2_5_omni": qwen2_5_omni, "qwen3_omni_moe": qwen3_omni_moe}
WHOLE = {
    "qwen2_5_omni": transformers.Qwen2_5OmniForConditionalGeneration,
    "qwen3_omni_moe": transformers.Qwen3OmniMoeForConditionalGeneration,
}
PROCESSORS = {
    "qwen2_5_omni": transformers.Qwen2_5OmniProcessor,
    "qwen3_omni_moe": transformers.Qwen3OmniMoeProcessor,
}
TINY = {family: twins.first_preset(family) for family in CLASSES}
both = pytest.mark.parametrize("family", CLASSES)
TEXT_ONLY, IMAGE, AUDIO, VIDEO, FILM, MIXED, FILM_MIXED = range(7)  # kinds of examples


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rename(tensors: dict, root: str = "thinker.") -> dict:
    """The names of the published files, which transformers reads but does not use."""
    stems = {"model.audio_tower.": "audio_tower.", "model.visual.": "visual.", "model.language_model.": "model."}
    out = {}
    for name, t in twins.our_names(tensors).items():
        stem = next((stem for stem in stems if name.startswith(stem)), "")
        out[root + stems.get(stem, "") + name.removeprefix(stem)] = t
    return out


def make_twin(hf: dict, seed: int = 0):
    return twins.twin(hf["thinker_config"], seed)


def params_of(theirs, root: str = "thinker.") -> dict:
    return {name: t.detach() for name, t in rename(dict(theirs.named_parameters()), root).items()}


def hold(hf: dict, inputs: dict, tolerance: float = 3e-5) -> tuple[float, float]:
    """Parity of the positions, the logits and every gradient."""
    model, theirs = find_model(hf), make_twin(hf)
    heard = inputs.get("feature_attention_mask")
    expected = theirs.model.get_rope_index(
        inputs["input_ids"], inputs.get("image_grid_thw"), inputs.get("video_grid_thw"), inputs["attention_mask"],
        inputs.get("use_audio_in_video", False), None if heard is None else heard.sum(1),
        inputs.get("video_second_per_grid"),
    )[0]  # fmt: skip
    seen = inputs["attention_mask"].bool()
    assert torch.equal(model.prepare(inputs)["position_ids"][seen], expected.permute(1, 2, 0)[seen])
    return twins.parity(model, theirs, inputs, rename, tolerance)


def together(rows: list[dict], side: str = "right") -> dict:
    """Rows as one batch, padded on one side; sounds padded to the longest."""
    S = max(row["input_ids"].shape[1] for row in rows)
    out = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        parts = [row[name] for row in rows if name in row]
        if name == "use_audio_in_video":
            out[name] = True
            continue
        if name in ("input_ids", "attention_mask"):
            more = [S - part.shape[1] for part in parts]
            pads = [(n, 0) if side == "left" else (0, n) for n in more]
            parts = [torch.nn.functional.pad(part, pad) for part, pad in zip(parts, pads, strict=True)]
        if name in ("input_features", "feature_attention_mask"):
            F = max(part.shape[-1] for part in parts)
            parts = [torch.nn.functional.pad(part, (0, F - part.shape[-1])) for part in parts]
        out[name] = torch.cat(parts)
    return out


@st.composite
def configs(draw, family: str) -> dict:
    """A small config of the family in the form it is published in, its parts' sizes drawn."""
    small = st.integers(1, 2)
    of_height, of_width = draw(small), draw(small)
    pairs = draw(st.integers(of_height + of_width, 6)) if family == "qwen2_5_omni" else draw(st.integers(5, 7))
    kv_heads, layers, depth = draw(small), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, tower_heads, ear_heads = kv_heads * draw(small), draw(small), draw(small)
    hidden = heads * 2 * pairs
    thinker = TINY[family]["thinker_config"]
    text = {
        **thinker["text_config"],
        "vocab_size": 80,
        "hidden_size": hidden,
        "intermediate_size": draw(st.integers(5, 30)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rope_scaling": {"rope_type": "default", "mrope_section": [pairs - of_height - of_width, of_height, of_width]},
    }
    visual = {
        **thinker["vision_config"],
        "depth": depth,
        "num_heads": tower_heads,
        "hidden_size": tower_heads * 4 * draw(st.integers(1, 3)),
        "intermediate_size": draw(st.integers(5, 20)),
        "out_hidden_size": hidden,
        "patch_size": 2,
        "spatial_merge_size": (merge := draw(st.integers(1, 3))),
        "temporal_patch_size": draw(small),
    }
    audio = {
        **thinker["audio_config"],
        "encoder_layers": draw(small),
        "encoder_attention_heads": ear_heads,
        "d_model": ear_heads * 2 * draw(st.integers(2, 6)),
        "encoder_ffn_dim": draw(st.integers(5, 20)),
        "num_mel_bins": draw(st.integers(2, 20)),
        "output_dim": hidden,
    }
    if family == "qwen2_5_omni":
        visual |= {
            "window_size": 2 * merge * draw(st.integers(1, 3)) + draw(st.integers(0, 1)),
            "fullatt_block_indexes": draw(st.lists(st.integers(0, depth - 1), unique=True)),
        }
        audio |= {"n_window": 2 * draw(st.integers(1, 8))}
        more = {"audio_token_index": 73, "image_token_index": 74, "video_token_index": 75}
        more["seconds_per_chunk"] = draw(small)
    else:
        experts = draw(st.integers(2, 5))
        text |= {
            "head_dim": 2 * pairs,
            "attention_bias": draw(st.booleans()),
            "num_experts": experts,
            "num_experts_per_tok": draw(st.integers(2, experts)),  # of one alone the weight has no gradient
            "moe_intermediate_size": draw(st.integers(3, 12)),
            "mlp_only_layers": draw(st.lists(st.integers(0, layers - 1), unique=True, max_size=layers - 1)),
            "norm_topk_prob": draw(st.booleans()),
        }
        visual |= {
            "num_position_embeddings": draw(st.integers(1, 60)),
            "deepstack_visual_indexes": sorted(draw(st.lists(st.integers(0, depth - 1), unique=True, max_size=layers))),
        }
        # The published one: of others the twin's positions do not always agree with its own encoder.
        window = 50
        audio |= {"n_window": window, "n_window_infer": 2 * window * draw(st.integers(1, 3)) + draw(st.integers(0, 9))}
        audio["downsample_hidden_size"] = draw(st.integers(1, 4))
        more = {"audio_token_id": 73, "image_token_id": 74, "video_token_id": 75}
    more |= {"vision_start_token_id": 76, "vision_end_token_id": 77}
    more |= {"audio_start_token_id": 78, "audio_end_token_id": 79}
    more |= {"position_id_per_seconds": draw(st.integers(8, 30)), "tie_word_embeddings": draw(st.booleans())}
    return {
        **TINY[family],
        "thinker_config": {**thinker, **more, "text_config": text, "vision_config": visual, "audio_config": audio},
    }


@both
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_parity(family, data):
    hf = data.draw(configs(family))
    examples = find_model(hf).examples(drawn(data.draw(st.integers(0, 99))))
    kind = data.draw(st.sampled_from([IMAGE, AUDIO, VIDEO, FILM, MIXED, FILM_MIXED]))
    hold(hf, examples[kind], 1e-4)  # what is summed over all frames and pitches rounds more in the smallest towers


@both
@pytest.mark.parametrize("kind", range(7))
def test_every_kind_of_sample(family, kind):
    hold(TINY[family], find_model(TINY[family]).examples(drawn(5))[kind])


@both
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kinds", [[TEXT_ONLY, MIXED, AUDIO, VIDEO], [FILM_MIXED, IMAGE, FILM]])
def test_padding(family, side, kinds):
    rows = find_model(TINY[family]).examples(drawn(6))
    hold(TINY[family], together([rows[kind] for kind in kinds], side))


def of_sounds(family: str, lengths: list[int], hf: dict | None = None) -> dict:
    """A row of text with sounds of these many frames."""
    model = find_model(hf or TINY[family])
    audio, token, marks = model.cfg.audio, model.cfg.tokens["audio"], model.cfg.marks[2:]
    tower = MODULES[family].TOWERS["audio"]
    ids = [5, 6, 7]
    for length in lengths:
        ids += [marks[0], *[token] * tower.outputs(length, audio), marks[1], 8]
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    features = torch.randn(len(lengths), audio.mels, max(lengths), generator=drawn(2))  # padding is not to be heard
    ids = torch.tensor([ids])
    heard = {"input_features": features, "feature_attention_mask": mask}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **heard}


@pytest.mark.parametrize(
    ("family", "lengths"),
    [("qwen2_5_omni", [3, 4, 5, 6, 7, 8]), ("qwen2_5_omni", [20, 21, 23, 60]), ("qwen2_5_omni", [19])]
    + [("qwen3_omni_moe", [9, 33, 7, 1]), ("qwen3_omni_moe", [100, 12, 99]), ("qwen3_omni_moe", [200, 201, 300, 530])],
)
def test_lengths_of_sounds(family, lengths):
    """Chunks that are full, nearly empty, or all there is; windows of several."""
    hold(TINY[family], of_sounds(family, lengths))


@pytest.mark.parametrize("window", [49, 51, 52])
@pytest.mark.parametrize("lengths", [[310, 230], [16, 16, 8]])
def test_chunks_without_room_between_them(window, lengths):
    """Where a chunk is a multiple of what an output is made of, nothing but its number keeps it from the next."""
    thinker = TINY["qwen3_omni_moe"]["thinker_config"]
    audio = {**thinker["audio_config"], "n_window": window}
    hf = {**TINY["qwen3_omni_moe"], "thinker_config": {**thinker, "audio_config": audio}}
    hold(hf, of_sounds("qwen3_omni_moe", lengths, hf))


@both
def test_what_is_padded_is_not_heard(family):
    inputs = of_sounds(family, [40, 17])
    loud = inputs | {"input_features": inputs["input_features"] + 9 * (1 - inputs["feature_attention_mask"])[:, None]}
    items = [find_model(TINY[family]).prepare(given)["items"]["audio"] for given in (inputs, loud)]
    assert all(torch.equal(a.fields["features"], b.fields["features"]) for a, b in zip(*items, strict=True))


@both
def test_films_alternate_as_in_the_processor(family):
    """The examples' order of sight and sound is that of transformers' processor."""
    model, texts = find_model(TINY[family]), []
    for seed in range(5):
        row = model.examples(drawn(seed))[FILM]
        frames = int(row["feature_attention_mask"].sum())
        tower = MODULES[family].TOWERS["audio"]
        fake = SimpleNamespace(
            audio_bos_token="", audio_eos_token="", audio_token="A", video_token="V",
            video_processor=SimpleNamespace(merge_size=model.cfg.visual.merge),
        )  # fmt: skip
        fake.get_chunked_index = lambda *given, of=fake: PROCESSORS[family].get_chunked_index(of, *given)
        seen = {key: row[key].numpy() for key in ("video_grid_thw", "video_second_per_grid")}
        texts.append(PROCESSORS[family].replace_video_with_audio_token(
            fake, seen, 0, {"num_audio_tokens": [tower.outputs(frames, model.cfg.audio)]}, 0,
            position_id_per_seconds=model.cfg.rate, seconds_per_chunk=(model.cfg.chunk or 0) / model.cfg.rate,
        ))  # fmt: skip
        names = {model.cfg.tokens["audio"]: "A", model.cfg.tokens["video"]: "V"}
        assert texts[-1] == "".join(names.get(token, "") for token in row["input_ids"][0].tolist())
    assert any("AV" in text for text in texts)  # more than one after the other


@both
def test_documents_in_one_row_are_apart(family):
    """Samples in one row, told apart by segment_ids, give what each gives alone."""
    model = find_model(TINY[family])
    examples = model.examples(drawn(7))
    rows = [examples[kind] for kind in (FILM_MIXED, TEXT_ONLY, MIXED)]
    params = params_of(make_twin(TINY[family]))
    lengths = torch.tensor([row["input_ids"].shape[1] for row in rows])
    packed = together(rows) | {"input_ids": torch.cat([row["input_ids"] for row in rows], 1)}
    del packed["attention_mask"]
    packed["segment_ids"] = torch.arange(len(rows)).repeat_interleave(lengths)[None]
    alone = torch.cat([logits(model, params, row) for row in rows], 1)
    assert twins.relative(logits(model, params, packed), alone) < 1e-5


@both
@pytest.mark.parametrize("axes", [1, 3, 4])
def test_given_positions(family, axes):
    model = find_model(TINY[family])
    inputs = model.examples(drawn(8))[FILM_MIXED]
    expected = model.prepare(inputs)["position_ids"]
    text = torch.arange(expected.shape[1])[None]
    given = {1: text, 3: expected.movedim(-1, 0), 4: torch.cat([text[None], expected.movedim(-1, 0)])}[axes]
    found = model.prepare(inputs | {"position_ids": given})
    assert torch.equal(found["position_ids"], text[..., None].expand(-1, -1, 3) if axes == 1 else expected)
    assert (found["segment_ids"] == 0).all()


@both
def test_positions_of_text_alone(family):
    model = find_model(TINY[family])
    batch = model.prepare({"input_ids": torch.tensor([[3, 4, 5]])})
    assert batch["items"] == {"visual": [], "audio": []}
    assert batch["position_ids"].tolist() == [[[0] * 3, [1] * 3, [2] * 3]]


def test_positions_of_a_film():
    """Qwen2.5-Omni counts whole steps, and the two marks at either end as one; Qwen3-Omni counts fractions."""
    for family, step, first, after in (("qwen2_5_omni", 2, 2, [0, 0, 1]), ("qwen3_omni_moe", 2.5, 3, [0, 1, 2])):
        model = find_model(TINY[family])
        look, looked, listen, listened = model.cfg.marks
        tower = model.cfg.visual
        patches = tower.channels * tower.frames * tower.patch**2
        ids = [7, look, listen, 315, 313, 313, 315, listened, looked, 7]
        frames = 8 if family == "qwen2_5_omni" else 16
        batch = model.prepare({
            "input_ids": torch.tensor([ids]),
            "pixel_values_videos": torch.randn(8, patches), "video_grid_thw": torch.tensor([[2, 2, 2]]),
            "video_second_per_grid": [0.5], "input_features": torch.randn(1, 11, frames),
            "feature_attention_mask": torch.ones(1, frames),
        })  # fmt: skip
        time, row, _ = batch["position_ids"][0].T.tolist()
        marks = [0, 1, first - 1]
        assert time[:7] == [*marks, first, first, first + 1, first + step]
        assert row[:7] == [*marks, first, first, first + 1, first]
        assert time[7:] == row[7:] == [first + step + 1 + n for n in after]


# --- Files


def as_published(theirs, hf: dict, directory) -> None:
    """What transformers writes of a thinker, as part of the larger model that is published."""
    theirs.save_pretrained(directory)
    path = directory / "model.safetensors"
    tensors = {f"thinker.{name}": t for name, t in load_file(path).items()}
    others = {f"{part}some.weight": torch.zeros(3) for part in MODULES[hf["model_type"]].IGNORED}
    save_file(tensors | others, path, {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**hf, "thinker_config": config, "talker_config": {"a": 1}}))


@both
@pytest.mark.parametrize("tied", [False, True])
def test_published_files(family, tied, tmp_path):
    """The larger model's directory is read, but for its other parts, and what is exported is read by transformers."""
    hf = {**TINY[family], "thinker_config": {**TINY[family]["thinker_config"], "tie_word_embeddings": tied}}
    theirs = make_twin(hf)
    as_published(theirs, hf, tmp_path / "theirs")
    model, params = load_pretrained(tmp_path / "theirs")
    assert model.cfg == find_model(hf).cfg  # the published form and transformers' own say the same
    inputs = model.examples(drawn(9))[MIXED]
    with torch.no_grad():
        expected = theirs(**inputs).logits
        assert twins.relative(logits(model, params, inputs), expected) < 1e-5
        export(tmp_path / "theirs", tmp_path / "ours")
        again = CLASSES[family].from_pretrained(
            tmp_path / "ours", attn_implementation="eager", experts_implementation="eager"
        )
        assert twins.relative(again(**inputs).logits, expected) < 1e-6
    path = tmp_path / "theirs" / "model.safetensors"
    save_file(load_file(path) | {"talking.weight": torch.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="1 extra: talking.weight"):
        load_pretrained(tmp_path / "theirs")


@both
def test_a_thinkers_own_files(family, tmp_path):
    """A thinker that was saved alone: its names begin with nothing, and its model_type is its own."""
    theirs = make_twin(TINY[family])
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = load_pretrained(tmp_path / "theirs")
    assert model.family == family and model.hf["model_type"] == f"{family}_thinker"
    inputs = model.examples(drawn(9))[FILM_MIXED]
    with torch.no_grad():
        expected = theirs(**inputs).logits
        assert twins.relative(logits(model, params, inputs), expected) < 1e-5
        export(tmp_path / "theirs", tmp_path / "ours")
        again = CLASSES[family].from_pretrained(
            tmp_path / "ours", attn_implementation="eager", experts_implementation="eager"
        )
        assert twins.relative(again(**inputs).logits, expected) < 1e-6


@both
def test_the_presets_are_the_whole_model_without_its_voice(family):
    """What is trained from a preset has a config that the class of the larger model takes, too."""
    config = transformers.AutoConfig.for_model(**TINY[family])
    names = {name.removeprefix("thinker.") for name, _ in WHOLE[family]._from_config(config).named_parameters()}
    assert names == {name for name, _ in make_twin(TINY[family]).named_parameters()}


@pytest.mark.parametrize("name", [*qwen2_5_omni.PRESETS, *qwen3_omni_moe.PRESETS])
def test_presets(name):
    model = find_model(name)
    with torch.device("meta"), contextlib.redirect_stderr(None):
        theirs = CLASSES[model.family](transformers.AutoConfig.for_model(**model.hf["thinker_config"]))
    shapes = {n: tuple(p.shape) for n, p in rename(dict(theirs.named_parameters())).items()}
    assert shapes == {n: spec.shape for n, spec in model.specs.items()}


# --- What is refused


@both
def test_wrong_inputs(family):
    model = find_model(TINY[family])
    right = model.examples(drawn(1))[MIXED]
    for kind, token in model.cfg.tokens.items():
        short = {**right, "input_ids": right["input_ids"].where(right["input_ids"] != token, 5)}
        with pytest.raises(ValueError, match=f"{kind}: .* outputs of the encoder for 0 placeholder tokens"):
            model.prepare(short)
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        with pytest.raises(ValueError, match=f"{pixels} and {kind}_grid_thw belong together"):
            model.prepare({name: t for name, t in right.items() if name != pixels})
    with pytest.raises(ValueError, match="feature_attention_mask is missing"):
        model.prepare({name: t for name, t in right.items() if name != "feature_attention_mask"})
    with pytest.raises(ValueError, match=r"feature_attention_mask is \[1, 3\]"):
        model.prepare(right | {"feature_attention_mask": torch.ones(1, 3)})
    with pytest.raises(ValueError, match=r"must be \[frames, 11\]"):
        model.prepare(right | {"input_features": right["input_features"][:, :5]})
    with pytest.raises(ValueError, match="video_second_per_grid has 2 numbers"):
        model.prepare(right | {"video_second_per_grid": [1.0, 2.0]})
    ids = right["input_ids"].clone()
    first, last = (ids[0] == model.cfg.tokens["video"]).nonzero()[[0, -1], 0]
    ids[0, first], ids[0, last + 1] = ids[0, last + 1].item(), ids[0, first].item()  # as many, further on
    broken = ids[:, :first].tolist()[0] + [model.cfg.tokens["video"], 5] + ids[0, first + 2 :].tolist()
    with pytest.raises(ValueError, match="ends within an image or a video"):
        model.prepare(right | {"input_ids": torch.tensor([broken]), "attention_mask": torch.ones(1, len(broken))})


WRONG = [
    ({}, {}, {"output_dim": 40}, "output_dim = 40"),
    ({}, {}, {"d_model": 25}, "d_model = 25"),
    ({}, {}, {"activation_function": "relu"}, "activation_function = 'relu'"),
    ({}, {}, {"dropout": 0.1}, "dropout = 0.1"),
    ({}, {}, {"scale_embedding": True}, "scale_embedding = True"),
    ({}, {}, {"max_source_positions": 3}, "max_source_positions = 3"),
    ({}, {"out_hidden_size": 40}, {}, "out_hidden_size = 40"),
    ({"audio_config": None}, {}, {}, "lacks 'audio_config'"),
    ({"vision_config": None}, {}, {}, "lacks 'vision_config'"),
    ({"text_config": None}, {}, {}, "lacks 'text_config'"),
    ({"position_id_per_seconds": 0}, {}, {}, "position_id_per_seconds = 0"),
]
OF_2_5 = [({}, {}, {"n_window": 5}, "n_window = 5"), ({"image_token_index": 313}, {}, {}, "_token_index = 313")]
OF_3 = [
    ({}, {}, {"n_window_infer": 99}, "n_window_infer = 99"),
    ({"image_token_id": 320}, {}, {}, "image_token_id = 320"),
]


@pytest.mark.parametrize(
    ("family", "wrong"),
    [(f, w) for f, own in (("qwen2_5_omni", OF_2_5), ("qwen3_omni_moe", OF_3)) for w in [*WRONG, *own]],
)
def test_wrong_configs(family, wrong):
    outside, visual, audio, says = wrong
    thinker = dict(TINY[family]["thinker_config"])
    thinker["vision_config"] = {**thinker["vision_config"], **visual}
    thinker["audio_config"] = {**thinker["audio_config"], **audio}
    with pytest.raises(ValueError, match=says):
        find_model({**TINY[family], "thinker_config": {**thinker, **outside}})

"""Qwen2-VL and Qwen2.5-VL against their transformers twins, and their pictures against transformers' processor."""

import contextlib

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import twins
from ftrain.model import find_model, logits
from ftrain.models import qwen2_5_vl, qwen2_vl
from ftrain.models.encoders import qwen2_5_vision, qwen2_vision
from ftrain.pretrained import export, load_pretrained

CLASSES = {
    "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
}
TINY = {family: twins.first_preset(family) for family in CLASSES}
both = pytest.mark.parametrize("family", CLASSES)


def make_twin(hf: dict, seed: int = 0):
    config = transformers.AutoConfig.for_model(**hf)
    model = CLASSES[hf["model_type"]]._from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            scale = 1 + noise / 4 if p.ndim == 1 and name.endswith("weight") else noise * (0.5 if p.ndim == 1 else 0.2)
            p.copy_(scale)
    return model.eval()


def rename(tensors: dict) -> dict:
    """The names of the published files, which transformers writes but does not use."""
    stems = {"model.visual.": "visual.", "model.language_model.": "model."}
    for theirs, ours in stems.items():
        tensors = {ours + n.removeprefix(theirs) if n.startswith(theirs) else n: t for n, t in tensors.items()}
    return tensors


@st.composite
def configs(draw, family: str) -> dict:
    """A small config of the family in the form it is published in, its parts' sizes drawn."""
    head_dim, kv_heads = 2 * draw(st.integers(3, 6)), draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 2))
    time, height = draw(st.integers(1, head_dim // 2 - 2)), 1
    hidden, tower_heads, merge, patch = heads * head_dim, draw(st.integers(1, 2)), draw(st.integers(1, 3)), 2
    tower_width, depth = tower_heads * 4 * draw(st.integers(1, 3)), draw(st.integers(1, 3))
    vision = {
        "depth": depth,
        "num_heads": tower_heads,
        "patch_size": patch,
        "spatial_merge_size": merge,
        "temporal_patch_size": draw(st.integers(1, 2)),
    }
    if family == "qwen2_vl":
        vision |= {"embed_dim": tower_width, "hidden_size": hidden, "mlp_ratio": draw(st.integers(1, 3))}
    else:
        vision |= {
            "hidden_size": tower_width,
            "out_hidden_size": hidden,
            "intermediate_size": draw(st.integers(5, 20)),
            "window_size": patch * merge * draw(st.integers(1, 3)) + draw(st.integers(0, 1)),
            "fullatt_block_indexes": draw(st.lists(st.integers(0, depth - 1), unique=True)),
            "tokens_per_second": draw(st.sampled_from([2, 4])),
        }
    return {
        **TINY[family],
        "vocab_size": 64,
        "image_token_id": 62,
        "video_token_id": 63,
        "hidden_size": hidden,
        "intermediate_size": 24,
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rope_scaling": {"type": "mrope", "mrope_section": [time, height, head_dim // 2 - time - height]},
        "tie_word_embeddings": draw(st.booleans()),
        "vision_config": {**TINY[family]["vision_config"], **vision},
    }


def hold(hf: dict, rows: list[dict], side: str = "right", tolerance: float = 3e-5) -> tuple[float, float]:
    """Parity on a batch of rows; the twin computes positions itself."""
    model, theirs = find_model(hf), make_twin(hf)
    inputs = twins.together(rows, side)
    return twins.parity(model, theirs, inputs, rename, tolerance)


@both
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_parity(family, data):
    hf = data.draw(configs(family))
    examples = find_model(hf).examples(torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    of_logits, of_gradients = hold(hf, [examples[data.draw(st.integers(0, len(examples) - 1))]])
    assert max(of_logits, of_gradients) < 3e-5


@both
@pytest.mark.parametrize("kind", range(5))
def test_every_kind_of_sample(family, kind):
    hold(TINY[family], [find_model(TINY[family]).examples(torch.Generator().manual_seed(5))[kind]])


@both
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(family, side):
    hold(TINY[family], find_model(TINY[family]).examples(torch.Generator().manual_seed(6)), side)


@both
def test_positions_of_videos_are_the_twins(family):
    model, theirs = find_model(TINY[family]), make_twin(TINY[family])
    ids = torch.tensor([[5, 6, 7] + [511] * 24 + [8, 9] + [511] * 12 + [3]])
    grids = torch.tensor([[2, 6, 8], [1, 6, 8]])
    inputs = {"input_ids": ids, "pixel_values_videos": torch.randn(144, 96), "video_grid_thw": grids}
    more = {"second_per_grid_ts": torch.tensor([0.7, 1.3])} if family == "qwen2_5_vl" else {}
    expected = theirs.model.get_rope_index(ids, 2 * (ids == 511), video_grid_thw=grids, **more)[0]
    found = model.prepare(inputs | more)["position_ids"]
    assert torch.equal(found.movedim(-1, 0), expected)
    assert found[0, 3:27, 0].unique().tolist() == [3, 4]  # 2 * 0.7 a step, rounded down
    assert found[0, 27].tolist() == [7, 7, 7]


def test_text_after_a_long_video():
    """`second_per_grid_ts` sets the steps, and text goes on after the largest row or column: the twin's rule."""
    ids = torch.tensor([[5] + [511] * 6 + [8]])
    inputs = {"input_ids": ids, "pixel_values_videos": torch.randn(24, 96), "video_grid_thw": torch.tensor([[3, 4, 2]])}
    for family, time, after in (("qwen2_vl", [1, 2, 3], 3), ("qwen2_5_vl", [1, 6, 11], 3)):
        found = find_model(TINY[family]).prepare(inputs | {"second_per_grid_ts": [2.5]})["position_ids"][0]
        assert found[1:7].tolist() == [[t, row, 1] for t in time for row in (1, 2)]
        assert found[7].tolist() == [after] * 3


@both
def test_documents_in_one_row_are_apart(family):
    """Samples in one row, told apart by segment_ids, give what each gives alone."""
    model = find_model(TINY[family])
    rows = model.examples(torch.Generator().manual_seed(7))[1:4]
    params = {n: t.detach() for n, t in rename(dict(make_twin(TINY[family]).named_parameters())).items()}
    lengths = torch.tensor([row["input_ids"].shape[1] for row in rows])
    seen = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
    packed = {name: torch.cat(parts) for name in seen if (parts := [row[name] for row in rows if name in row])}
    packed["input_ids"] = torch.cat([row["input_ids"] for row in rows], 1)
    packed["segment_ids"] = torch.arange(len(rows)).repeat_interleave(lengths)[None]
    alone = torch.cat([logits(model, params, row) for row in rows], 1)
    assert twins.relative(logits(model, params, packed), alone) < 1e-5


@both
@pytest.mark.parametrize("axes", [1, 3, 4])
def test_given_positions(family, axes):
    model = find_model(TINY[family])
    inputs = model.examples(torch.Generator().manual_seed(8))[2]
    expected = model.prepare(inputs)["position_ids"]
    text = torch.arange(expected.shape[1])[None]
    given = {1: text, 3: expected.movedim(-1, 0), 4: torch.cat([text[None], expected.movedim(-1, 0)])}[axes]
    found = model.prepare(inputs | {"position_ids": given})
    assert torch.equal(found["position_ids"], text[..., None].expand(-1, -1, 3) if axes == 1 else expected)
    assert (found["segment_ids"] == 0).all()


@both
@pytest.mark.parametrize("tied", [False, True])
def test_files(family, tied, tmp_path):
    """transformers' directory is read, and what is exported of it is read by transformers."""
    hf = TINY[family] | {"tie_word_embeddings": tied}
    theirs = make_twin(hf)
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = load_pretrained(tmp_path / "theirs")
    assert model.cfg == find_model(hf).cfg  # the published form and transformers' own say the same
    inputs = model.examples(torch.Generator().manual_seed(9))[2]
    with torch.no_grad():
        expected = theirs(**inputs).logits
        assert twins.relative(logits(model, params, inputs), expected) < 1e-5
        export(tmp_path / "theirs", tmp_path / "ours")
        again = CLASSES[family].from_pretrained(tmp_path / "ours", attn_implementation="eager")
        assert torch.equal(again(**inputs).logits, expected)


PUBLISHED = {
    "Qwen2-VL-2B": 2_208_985_600,
    "Qwen2-VL-7B": 8_291_375_616,
    "Qwen2-VL-72B": 73_405_560_320,
    "Qwen2.5-VL-3B": 3_754_622_976,
    "Qwen2.5-VL-7B": 8_292_166_656,
    "Qwen2.5-VL-32B": 33_452_718_336,
    "Qwen2.5-VL-72B": 73_410_777_344,
}


@pytest.mark.parametrize("name", [*qwen2_vl.PRESETS, *qwen2_5_vl.PRESETS])
def test_presets(name):
    model = find_model(name)
    count = sum(spec.numel for spec in model.specs.values())
    assert count == PUBLISHED.get(name, count)
    with torch.device("meta"), contextlib.redirect_stderr(None):
        theirs = CLASSES[model.family]._from_config(transformers.AutoConfig.for_model(**model.hf))
    shapes = {n: tuple(p.shape) for n, p in rename(dict(theirs.named_parameters())).items()}
    assert shapes == {n: spec.shape for n, spec in model.specs.items()}


@pytest.mark.parametrize("size", [(32, 48), (30, 50), (9, 7), (200, 3), (500, 700)])
def test_pictures_are_the_processors(size):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    cfg = qwen2_vl.config(TINY["qwen2_vl"]).vision
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    limits = {"shortest_edge": 4 * 8**2, "longest_edge": 1280 * 8**2}
    processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=limits)
    theirs = processor(picture, return_tensors="pt")
    (item,) = qwen2_vision.items(picture, cfg)
    t, h, w = theirs["image_grid_thw"][0].tolist()
    assert item.fields["patches"].shape == (t * h * w, 96) and len(item.slots) == h * w // 4
    assert float((item.fields["patches"] - theirs["pixel_values"]).abs().max()) < 1e-6
    expected = qwen2_vision.from_processor(theirs["pixel_values"], theirs["image_grid_thw"], cfg)[0]
    assert torch.equal(item.fields["position"], expected.fields["position"]) and torch.equal(item.slots, expected.slots)


def test_a_video_is_its_frames_two_at_a_time():
    cfg = qwen2_5_vl.config(TINY["qwen2_5_vl"]).vision
    video = np.random.default_rng(0).integers(0, 256, (3, 24, 40, 3), np.uint8)
    frames = qwen2_5_vision.items(video, cfg, tokens=(1, 15))
    assert [len(frame.slots) for frame in frames] == [15, 15]
    assert sorted(torch.cat([frame.slots for frame in frames]).tolist()) == list(range(30))
    (still,) = qwen2_5_vision.items(video[2], cfg, tokens=(1, 15))
    assert torch.equal(still.fields["patches"], frames[1].fields["patches"])  # the last frame is repeated
    pixels = frames[0].fields["patches"].unflatten(1, (3, 2, 4, 4))[0]  # the first patch: the upper left corner
    normal = (video[:2, :4, :4] / 255 - qwen2_vision.MEAN) / qwen2_vision.DEVIATION
    assert np.allclose(pixels.numpy(), normal.transpose(3, 0, 1, 2), atol=1e-6)


def test_windows_stand_together():
    cfg = qwen2_5_vl.config(TINY["qwen2_5_vl"]).vision
    grid = torch.tensor([[1, 10, 6]])
    (item,) = qwen2_5_vision.from_processor(torch.arange(60)[:, None].expand(-1, 96), grid, cfg)
    assert item.fields["window"].unique_consecutive().tolist() == list(range(6))  # 3 x 2 windows of 4 x 4 patches
    came_from = item.fields["patches"][:, 0].view(-1, 4)
    assert torch.equal(came_from[:, 0] // 4, item.slots.float())  # slots follow their groups
    inside = item.fields["position"][item.fields["window"] == 3]
    assert inside.amin(0).tolist() == [4, 4] and inside.amax(0).tolist() == [7, 5]


@both
def test_no_item_for_text(family):
    model = find_model(TINY[family])
    batch = model.prepare({"input_ids": torch.tensor([[3, 4, 5]])})
    assert batch["items"] == {"visual": []} and batch["position_ids"].tolist() == [[[0] * 3, [1] * 3, [2] * 3]]


@both
def test_wrong_inputs(family):
    model = find_model(TINY[family])
    right = model.examples(torch.Generator().manual_seed(1))[2]
    short = {**right, "input_ids": right["input_ids"].where(right["input_ids"] != 510, 5)}
    with pytest.raises(ValueError, match="image: .* outputs of the encoder for 0 placeholder tokens"):
        model.prepare(short)
    with pytest.raises(ValueError, match="pixel_values and image_grid_thw belong together"):
        model.prepare({n: t for n, t in right.items() if n != "pixel_values"})
    with pytest.raises(ValueError, match="there must be .* of 96 numbers each"):
        model.prepare(right | {"pixel_values": right["pixel_values"][:-1]})
    ids = torch.tensor([[510, 3, 510]])
    apart = {"input_ids": ids, "pixel_values": torch.randn(8, 96), "image_grid_thw": torch.tensor([[1, 2, 4]])}
    with pytest.raises(ValueError, match="do not stand together"):
        model.prepare(apart)
    with pytest.raises(ValueError, match="positive multiples of 2"):
        model.prepare(apart | {"pixel_values": torch.randn(9, 96), "image_grid_thw": torch.tensor([[1, 3, 3]])})
    with pytest.raises(ValueError, match="is no picture"):
        qwen2_vision.items(np.zeros((4, 4)), model.cfg.vision)
    with pytest.raises(ValueError, match="200 times"):
        qwen2_vision.items(np.zeros((4, 1000, 3), np.uint8), model.cfg.vision)


def test_wrong_number_of_times():
    model = find_model(TINY["qwen2_5_vl"])
    inputs = model.examples(torch.Generator().manual_seed(1))[3]
    with pytest.raises(ValueError, match="second_per_grid_ts has 2 numbers for 1 videos"):
        model.prepare(inputs | {"second_per_grid_ts": [1.0, 2.0]})


WRONG = [
    ({"image_token_id": 512}, {}, "image_token_id = 512"),
    ({"video_token_id": 510}, {}, "_token_id = 510"),
    ({"rope_scaling": None}, {}, "mrope_section"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 1, 1]}}, {}, "mrope_section"),
    ({"vision_config": None}, {}, "lacks 'vision_config'"),
    ({}, {"num_heads": 3}, "num_heads = 3"),
    ({}, {"hidden_act": "relu"}, "hidden_act = 'relu'"),
    ({}, {"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn'"),
    ({}, {"patch_size": [4, 4]}, r"patch_size = \[4, 4\]"),
]
OF_2 = [({}, {"hidden_size": 40}, "hidden_size = 48")]
OF_2_5 = [
    ({}, {"out_hidden_size": 40}, "hidden_size = 48"),
    ({}, {"window_size": 7}, "window_size = 7"),
    ({}, {"fullatt_block_indexes": 1}, "fullatt_block_indexes = 1"),
    ({}, {"tokens_per_second": 0}, "tokens_per_second = 0"),
]


@pytest.mark.parametrize(
    ("family", "wrong"),
    [(f, w) for f, own in (("qwen2_vl", OF_2), ("qwen2_5_vl", OF_2_5)) for w in [*WRONG, *own]],
)
def test_wrong_configs(family, wrong):
    outside, vision, says = wrong
    hf = {**TINY[family], "vision_config": {**TINY[family]["vision_config"], **vision}, **outside}
    with pytest.raises(ValueError, match=says):
        find_model(hf)

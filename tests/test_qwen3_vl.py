"""Qwen3-VL and Qwen3-VL-MoE against their transformers twins; experts that share tensors of the checkpoint."""

import contextlib

import numpy as np
import pytest
import torch
import transformers
from checkpoints import META, filled, placed, restored
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import twins
from ftrain.checkpoint import save
from ftrain.model import find_model, logits
from ftrain.models import qwen3_vl, qwen3_vl_moe
from ftrain.models.encoders import qwen3_vision
from ftrain.pretrained import export, init_from, load_pretrained
from ftrain.ranks import run_ranks
from ftrain.specs import stored
from ftrain.state import whole

TINY = {family: twins.first_preset(family) for family in ("qwen3_vl", "qwen3_vl_moe")}
both = pytest.mark.parametrize("family", TINY)
IMAGE, VIDEO = 508, 509  # TINY's placeholder tokens


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def configs(draw, family: str) -> dict:
    """A small config of the family in the form it is published in, its parts' sizes drawn."""
    kv_heads, pairs = draw(st.integers(1, 2)), draw(st.integers(3, 6))
    of_height, of_width = draw(st.integers(0, pairs // 3)), draw(st.integers(0, pairs // 3))
    layers, depth, tower_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    deepstack = draw(st.lists(st.integers(0, depth - 1), unique=True, max_size=layers))
    hidden = draw(st.integers(9, 24))
    text = {
        **TINY[family]["text_config"],
        "vocab_size": 64,
        "hidden_size": hidden,
        "intermediate_size": draw(st.integers(5, 30)),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * pairs,
        "attention_bias": draw(st.booleans()),
        "rope_scaling": {"rope_type": "default", "mrope_section": [pairs - of_height - of_width, of_height, of_width]},
    }
    if family == "qwen3_vl_moe":
        experts = draw(st.integers(2, 5))
        text |= {
            "num_experts": experts,
            "num_experts_per_tok": draw(st.integers(2, experts)),  # of one alone the weight is 1, without gradient
            "moe_intermediate_size": draw(st.integers(3, 12)),
            "mlp_only_layers": draw(st.lists(st.integers(0, layers - 1), unique=True, max_size=layers - 1)),
            "norm_topk_prob": draw(st.booleans()),  # which the twin does not read
        }
    seen = {
        **TINY[family]["vision_config"],
        "depth": depth,
        "num_heads": tower_heads,
        "hidden_size": tower_heads * 4 * draw(st.integers(1, 3)),
        "intermediate_size": draw(st.integers(5, 20)),
        "out_hidden_size": hidden,
        "patch_size": draw(st.integers(1, 3)),
        "in_channels": draw(st.integers(1, 3)),
        "spatial_merge_size": draw(st.integers(1, 3)),
        "temporal_patch_size": draw(st.integers(1, 2)),
        "num_position_embeddings": draw(st.integers(1, 60)),
        "deepstack_visual_indexes": sorted(deepstack),
    }
    return {
        **TINY[family],
        "image_token_id": 62,
        "video_token_id": 63,
        "tie_word_embeddings": draw(st.booleans()),
        "text_config": text,
        "vision_config": seen,
    }


@both
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_parity(family, data):
    hf = data.draw(configs(family))
    model = find_model(hf)
    example = model.examples(drawn(data.draw(st.integers(0, 99))))[data.draw(st.integers(0, 4))]
    twins.parity(model, twins.twin(hf), example, tolerance=1e-4)


@both
@pytest.mark.parametrize("kind", range(5))
def test_every_kind_of_sample(family, kind):
    """And positions are the twin's, number by number."""
    model, theirs = find_model(TINY[family]), twins.twin(TINY[family])
    inputs = model.examples(drawn(5))[kind]
    if kind:
        given = {name: t for name, t in inputs.items() if not name.startswith("pixel")}
        at = model.prepare(inputs)["position_ids"].movedim(-1, 0)
        assert torch.equal(at, theirs.model.get_rope_index(**given)[0])
    twins.parity(model, theirs, inputs)


@both
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(family, side):
    model = find_model(TINY[family])
    inputs = twins.together(model.examples(drawn(6)), side)
    twins.parity(model, twins.twin(TINY[family]), inputs)


def test_frames_are_spans_of_their_own():
    ids = torch.tensor([[5, *[VIDEO] * 6, 7, 8, *[VIDEO] * 6, 9]])
    inputs = {"input_ids": ids, "pixel_values_videos": torch.randn(48, 96), "video_grid_thw": torch.tensor([[2, 6, 4]])}
    batch = find_model(TINY["qwen3_vl"]).prepare(inputs)
    at = batch["position_ids"][0]
    assert at[1:7].tolist() == [[1, 1 + row, 1 + column] for row in range(3) for column in range(2)]
    assert at[[7, 8, 9]].tolist() == [[4] * 3, [5] * 3, [6] * 3] and at[-1].tolist() == [9] * 3
    first, second = batch["items"]["visual"]
    assert first.slots.tolist() == [*range(1, 7)] and second.slots.tolist() == [*range(9, 15)]


@both
def test_documents_in_one_row_are_apart(family):
    """Samples in one row, told apart by segment_ids, give what each gives alone."""
    model = find_model(TINY[family])
    rows = model.examples(drawn(7))[1:4]
    params = twins.weights(twins.twin(TINY[family]))
    lengths = torch.tensor([row["input_ids"].shape[1] for row in rows])
    seen = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    packed = {name: torch.cat([row[name] for row in rows if name in row]) for name in seen}
    packed["input_ids"] = torch.cat([row["input_ids"] for row in rows], 1)
    packed["segment_ids"] = torch.arange(len(rows)).repeat_interleave(lengths)[None]
    alone = torch.cat([logits(model, params, row) for row in rows], 1)
    assert twins.relative(logits(model, params, packed), alone) < 1e-5


@both
def test_no_item_for_text(family):
    batch = find_model(TINY[family]).prepare({"input_ids": torch.tensor([[3, 4, 5]])})
    assert batch["items"] == {"visual": []} and batch["position_ids"].tolist() == [[[0] * 3, [1] * 3, [2] * 3]]


@both
def test_files(family, tmp_path):
    """transformers' directory is read, and what is exported of it is read by transformers."""
    theirs = twins.twin(TINY[family])
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = load_pretrained(tmp_path / "theirs")
    assert model.cfg == find_model(TINY[family]).cfg == find_model(theirs.config).cfg
    assert_same_weights(params, theirs)
    export(tmp_path / "theirs", tmp_path / "ours")
    assert_opened_by_transformers(tmp_path / "ours", theirs)


def assert_same_weights(params, theirs):
    wanted = twins.weights(theirs)
    assert params.keys() == wanted.keys()
    for name, t in wanted.items():
        assert torch.equal(params[name], t), name


def assert_opened_by_transformers(directory, theirs):
    again, report = transformers.AutoModelForMultimodalLM.from_pretrained(directory, output_loading_info=True)
    assert type(again) is type(theirs) and not any(report.values())
    for (name, t), mine in zip(theirs.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, t), name


def publish(directory, theirs) -> dict:
    """transformers' directory in the layout that Qwen3-VL-MoE is published in, which transformers no longer writes."""
    theirs.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    tensors = {n: t.transpose(1, 2).contiguous() if ".experts." in n else t for n, t in tensors.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    assert_opened_by_transformers(directory, theirs)
    return tensors


@pytest.mark.parametrize("plan, sizes", [("ddp", (1, 1, 1)), ("fsdp_ep", (1, 1, 2)), ("fsdp_sp_ep", (2, 1, 2))])
def test_published_experts_are_read_by_slices_and_written_as_published(tmp_path, plan, sizes, one_thread):
    theirs = twins.twin(TINY["qwen3_vl_moe"])
    published = publish(tmp_path / "theirs", theirs)
    model, params = load_pretrained(tmp_path / "theirs")
    assert_same_weights(params, theirs)
    assert {name: tuple(t.shape) for name, t in published.items()} == stored(model.specs)

    def on_rank(rank):
        state = init_from(tmp_path / "theirs", model, *placed(plan, sizes, model=model))
        for name, t in twins.weights(theirs).items():
            assert torch.equal(whole(state.params[name]), t), name
        save(tmp_path, state, model, META, file_bytes=20_000)

    run_ranks(sizes[0] * sizes[2], on_rank)
    written = sorted((tmp_path / "checkpoints" / "step-0").glob("*.safetensors"))
    assert len(written) > 4
    ours = {name: t for path in written for name, t in load_file(path).items()}
    assert ours.keys() == published.keys() and all(torch.equal(ours[name], t) for name, t in published.items())
    assert_opened_by_transformers(tmp_path / "checkpoints" / "step-0", theirs)


def test_a_state_with_shared_tensors_is_restored_on_another_mesh(tmp_path, one_thread):
    model = find_model(TINY["qwen3_vl_moe"])
    run_ranks(2, lambda rank: save(tmp_path, filled("fsdp", (2, 1, 1), model=model), model, META, file_bytes=9000))
    restored(tmp_path / "checkpoints" / "step-3", 4, "fsdp_ep", (2, 1, 2), model=model)


def test_square_experts_are_kept_as_transformers_reads_them(tmp_path):
    """Where the shape does not tell whether a tensor is transposed, transformers takes it that it is not."""
    text = TINY["qwen3_vl_moe"]["text_config"] | {"moe_intermediate_size": 24}  # 2 * 24 is hidden_size
    hf = TINY["qwen3_vl_moe"] | {"text_config": text}
    theirs, model = twins.twin(hf), find_model(hf)
    theirs.save_pretrained(tmp_path / "theirs")

    def on_rank(rank):
        save(tmp_path, init_from(tmp_path / "theirs", model, *placed("ddp", (1, 1, 1), model=model)), model, META)

    run_ranks(1, on_rank)
    assert_opened_by_transformers(tmp_path / "checkpoints" / "step-0", theirs)


def test_experts_of_another_size_are_named(tmp_path):
    twins.twin(TINY["qwen3_vl_moe"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.language_model.layers.1.mlp.experts.gate_up_proj"
    save_file({**tensors, name: torch.zeros(4, 48, 41)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 mis-shaped: .*gate_up_proj is \[4, 48, 41\] instead of \[4, 48, 40\]"):
        load_pretrained(tmp_path)


PUBLISHED = {
    "Qwen3-VL-2B": 2_127_532_032,
    "Qwen3-VL-4B": 4_437_815_808,
    "Qwen3-VL-8B": 8_767_123_696,
    "Qwen3-VL-32B": 33_357_390_064,
    "Qwen3-VL-30B-A3B": 31_070_754_032,
    "Qwen3-VL-235B-A22B": 235_670_022_896,
}


@pytest.mark.parametrize("name", [*qwen3_vl.PRESETS, *qwen3_vl_moe.PRESETS])
def test_presets(name):
    model = find_model(name)
    count = sum(spec.numel for spec in model.specs.values())
    assert count == PUBLISHED.get(name, count)
    with torch.device("meta"), contextlib.redirect_stderr(None):
        config = transformers.AutoConfig.for_model(**model.hf)
        theirs = transformers.AutoModelForMultimodalLM.from_config(config)
    shapes = {n: tuple(t.shape) for n, t in twins.our_names(dict(theirs.named_parameters())).items()}
    assert shapes == {n: spec.shape for n, spec in model.specs.items()}
    assert find_model(config).cfg == model.cfg


@pytest.mark.parametrize("size", [(32, 48), (30, 50), (9, 7), (200, 300)])
def test_pictures_are_the_processors(size):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    cfg = qwen3_vl.config(TINY["qwen3_vl"]).vision
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    limits = {"shortest_edge": 64 * 8**2, "longest_edge": 16384 * 8**2}
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size=limits, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    theirs = processor(picture, return_tensors="pt")
    (item,) = qwen3_vision.items(picture, cfg)
    (other,) = qwen3_vision.from_processor(theirs["pixel_values"], theirs["image_grid_thw"], cfg)
    assert item.fields.keys() == qwen3_vision.blank(cfg).fields.keys()
    assert torch.equal(item.slots, other.slots)
    for name, t in other.fields.items():
        assert item.fields[name].shape == t.shape and float((item.fields[name] - t).abs().max()) < 1e-6, name


def test_all_frames_of_a_video_share_its_tokens():
    cfg = qwen3_vl.config(TINY["qwen3_vl"]).vision
    video = np.random.default_rng(0).integers(0, 256, (5, 80, 80, 3), np.uint8)
    frames = qwen3_vision.items(video, cfg, tokens=(1, 6 * 25))  # five frames and the last again
    assert [len(frame.slots) for frame in frames] == [25] * 3


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("vision_config", {"out_hidden_size": 47}, "out_hidden_size = 47 .* hidden_size = 48"),
        ("vision_config", {"deepstack_visual_indexes": [1, 0]}, r"deepstack_visual_indexes = \[1, 0\] .* growing list"),
        ("vision_config", {"deepstack_visual_indexes": [2]}, "layers, 0 to 1"),
        ("vision_config", {"depth": 3, "deepstack_visual_indexes": [0, 1, 2]}, "at most num_hidden_layers = 2"),
        ("vision_config", {"hidden_act": "relu"}, "hidden_act = 'relu' .* 'gelu_pytorch_tanh'"),
        ("vision_config", {"num_heads": 5}, "num_heads = 5"),
        ("text_config", {"rope_scaling": {"mrope_section": [1, 2, 2]}}, "mrope_section .* sum to head_dim / 2 = 6"),
        (None, {"image_token_id": 512}, "image_token_id = 512 .* below vocab_size = 512"),
        (None, {"vision_config": None}, "lacks 'vision_config'"),
    ],
)
def test_wrong_configs(part, change, message):
    hf = TINY["qwen3_vl"]
    with pytest.raises(ValueError, match=message):
        find_model(hf | ({part: hf[part] | change} if part else change))


def test_wrong_inputs():
    model = find_model(TINY["qwen3_vl"])
    pixels = {"pixel_values_videos": torch.randn(16, 96), "video_grid_thw": torch.tensor([[2, 2, 4]])}
    with pytest.raises(ValueError, match="video: 4 outputs of the encoder for 3 placeholder tokens"):
        model.prepare({"input_ids": torch.tensor([[VIDEO, VIDEO, 3, VIDEO]]), **pixels})
    with pytest.raises(ValueError, match="do not stand together"):
        model.prepare({"input_ids": torch.tensor([[VIDEO, VIDEO, VIDEO, 3, VIDEO]]), **pixels})
    with pytest.raises(ValueError, match="image: 0 outputs of the encoder for 1 placeholder tokens"):
        model.prepare({"input_ids": torch.tensor([[IMAGE, 3]])})

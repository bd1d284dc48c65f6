"""Conversations with images and sounds: what is read, what is learned, how rows are filled, and what is refused."""

import base64
import importlib.util
import io
import json
import sys
import wave
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processors import OF_IMAGES, OF_TEXT, write_model, write_tokenizer
from tokenizers import Tokenizer, processors

from ftrain import media, reader, samples
from ftrain.data import collate, in_one_row
from ftrain.items import Item
from ftrain.model import find_model
from ftrain.tokenizer import load

ALL = samples.KINDS


def picture(seed: int, height: int = 20, width: int = 28) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def lines(path, *records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def turn(question, answer: str = "yes") -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    write_model(folder / "model")
    for i in range(4):
        picture(i, 16 + 8 * i, 24).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def model(ground):
    return find_model(ground / "model")


@pytest.fixture(scope="module")
def read(ground, model):
    return samples.make_reader(model, ground / "model")


def learned(batch: dict, tokenizer) -> list[str]:
    """What the labels say, run by run."""
    labels = batch["labels"][0].tolist()
    runs, current = [], []
    for label in [*labels, -100]:
        if label != -100:
            current.append(label)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs


def batch_of(model, read, ground, messages, prompt=False, **more) -> dict:
    return samples.to_batch(model, read, samples.parse({"messages": messages, **more}, ALL), ground, prompt)


# --- What is learned


def test_labels_are_the_assistants_turns_whatever_images_stand_between(ground, model, read):
    messages = [
        {"role": "system", "content": "be brief"},
        *turn("what is <image>?", "a cat"), *turn("and <image><image>?", "two dogs"), *turn("thanks", "\nbye"),
    ]  # fmt: skip
    batch = batch_of(model, read, ground, messages, images=["0.png", "1.png", "2.png"])
    assert learned(batch, read.tokenizer) == ["a cat<|im_end|>", "two dogs<|im_end|>", "\nbye<|im_end|>"]
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    at = (labels != -100).nonzero()[:, 0]
    assert torch.equal(ids[at + 1], labels[at])  # of each token, the next
    tokens = [int(item.slots.numel()) for item in batch["items"]["visual"]]
    assert sum(tokens) == (ids == 510).sum() and len(tokens) == 3


def test_samples_are_what_transformers_makes_of_them(ground, model, read):
    """The same ids, patches and grid as its processor gives, called by hand."""
    processor = reader.load_processor(ground / "model")
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>hm<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    expected = dict(processor(text=[text], images=[Image.open(ground / "1.png")], return_tensors="pt"))
    expected = model.prepare(expected)
    batch = batch_of(model, read, ground, turn("<image>hm"), images=["1.png"])
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["position_ids"], expected["position_ids"])
    for ours, theirs in zip(batch["items"]["visual"], expected["items"]["visual"], strict=True):
        assert torch.equal(ours.slots, theirs.slots)
        assert all(torch.equal(ours.fields[name], theirs.fields[name]) for name in theirs.fields)


@pytest.mark.parametrize("preset", ["qwen2.5-vl-tiny", "qwen3-vl-tiny", "qwen2.5-omni-tiny", "qwen3-omni-moe-tiny"])
def test_every_familys_processor_is_understood(ground, tmp_path, preset):
    """transformers' own processor, without torchvision, and our model's reading of what it gives."""
    model, hears = find_model(write_model(tmp_path / preset, preset)), "omni" in preset
    read = samples.make_reader(model, tmp_path / preset)
    assert list(read.kinds) == (["image", "audio", "video"] if hears else ["image", "video"])
    write_wav(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.5, 0.5, (9000, 1)), 8000, 2)
    messages = [*turn("<image>" + "<audio>" * hears + "and<image>", "one"), *turn("?", "two")]
    given = {"images": [str(ground / "0.png"), str(ground / "1.png")], "audios": ["a.wav"] * hears}
    batch = batch_of(model, read, tmp_path, messages, **given)
    assert learned(batch, read.tokenizer) == ["one<|im_end|>", "two<|im_end|>"]
    assert len(batch["items"]["visual"]) == 2 and bool(batch["items"].get("audio")) == hears
    ids = batch["input_ids"][0]
    for items in batch["items"].values():
        slots = torch.cat([item.slots for item in items])
        assert len(ids[slots[slots >= 0]].unique()) == 1
    if importlib.util.find_spec("torchvision") is None:
        with pytest.raises(ValueError, match="videos need torchvision"):
            batch_of(model, read, ground, turn("<video>"), videos=[["0.png", "0.png"]])


def test_a_prompt_is_what_comes_before_the_last_answer(ground, model, read):
    messages = [*turn("one <image>", "a"), *turn("two", "b")]
    whole = batch_of(model, read, ground, messages, images=["0.png"])
    prompt = batch_of(model, read, ground, messages, prompt=True, images=["0.png"])
    n = prompt["input_ids"].shape[1]
    assert torch.equal(whole["input_ids"][:, :n], prompt["input_ids"]) and (prompt["labels"] == -100).all()
    assert read.tokenizer.decode(whole["input_ids"][0, n:]) == "b<|im_end|>\n"


def test_a_template_that_renders_the_past_otherwise(tmp_path):
    """As Qwen3's, whose last answer alone has room for thoughts."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.last and m['role'] == 'assistant' %}<think></think>"
        "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    model = find_model("qwen3-moe-tiny")
    read = samples.make_reader(model, write_tokenizer(tmp_path, template))
    batch = batch_of(model, read, tmp_path, [*turn("a", "one"), *turn("b", "two")])
    assert learned(batch, read.tokenizer) == ["one<|im_end|>", "<think></think>two<|im_end|>"]


NOTED = OF_TEXT.replace("<|im_start|>", "{% if loop.revindex0 == 1 %}NOTE {% endif %}<|im_start|>", 1)
THINKING = OF_TEXT.replace(
    "{{ m['content'] }}", "{{ '<think></think>' * (loop.last and m['role'] != 'user') }}{{ m['content'] }}"
)
# As Mistral's first ones, in which what the system says goes before the last message, if that is the user's.
INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ 'sys ' * loop.last }}{{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize(
    "template, thought", [(OF_TEXT, ""), (NOTED, ""), (THINKING, "<think></think>"), (INST, "")],
    ids=["chatml", "noted", "thinking", "inst"],
)  # fmt: skip
def test_only_answers_are_learned_however_the_past_is_rendered(tmp_path, template, thought, end):
    """Where the turns up to an answer look otherwise alone than in the conversation, and where `eos` ends no turn."""
    model, folder = find_model("qwen3-moe-tiny"), write_tokenizer(tmp_path, template)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": end}))
    read = samples.make_reader(model, folder)
    batch = batch_of(model, read, tmp_path, [*turn("hm", "one\n x"), *turn("a b", "<|im_end|>?"), *turn("c", "")])
    found = [answer.removeprefix(" ") for answer in learned(batch, read.tokenizer)]
    assert read.end == end
    assert found == ["one\n x<|im_end|>", "<|im_end|>?<|im_end|>", f"{thought}<|im_end|>"]


def test_the_first_message_may_be_the_assistants_and_every_turn_must_be_shown(tmp_path):
    model = find_model("qwen3-moe-tiny")
    messages = [{"role": "assistant", "content": "hello"}, *turn("a", "one")]
    read = samples.make_reader(model, write_tokenizer(tmp_path / "all"))
    assert learned(batch_of(model, read, tmp_path, messages), read.tokenizer) == ["hello<|im_end|>", "one<|im_end|>"]
    read = samples.make_reader(model, write_tokenizer(tmp_path / "few", "{{ messages[0]['content'] }}"))
    with pytest.raises(ValueError, match=r"the chat template does not show messages\[2\], of the assistant"):
        batch_of(model, read, tmp_path, messages)


@pytest.mark.parametrize("preset", ["omni-tiny", "qwen2-vl-tiny"])
def test_spaces_are_learned_whatever_the_tokenizer_counts(ground, tmp_path, preset):
    """Llama 3's and GPT-2's count none: a token of spaces alone is of no characters."""
    model, folder = find_model(preset), write_model(tmp_path / "model")
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    made.save(str(folder / "tokenizer.json"))
    read = samples.make_reader(model, folder)
    answer = " if x:\n    return  1 "
    assert (11, 11) in read.tokenizer(answer, return_offsets_mapping=True)["offset_mapping"]
    batch = batch_of(model, read, tmp_path, [*turn("  a ", answer), *turn(" ", " ")])
    assert learned(batch, read.tokenizer) == [f"{answer}<|im_end|>", " <|im_end|>"]


def test_a_first_token_that_begins_with_a_space_of_the_template_is_learned(tmp_path):
    template = OF_TEXT.replace("assistant\n", "assistant: ").replace("{{ m['role'] }}\n", "{{ m['role'] }}: ")
    model, folder = find_model("qwen3-moe-tiny"), write_tokenizer(tmp_path, template)
    as_json = json.loads((folder / "tokenizer.json").read_text())
    as_json["model"]["vocab"]["\u0120o"], as_json["model"]["merges"] = 259, [["\u0120", "o"]]
    (folder / "tokenizer.json").write_text(json.dumps(as_json))
    read = samples.make_reader(model, folder)
    batch = batch_of(model, read, tmp_path, turn("o", "one"))
    assert learned(batch, read.tokenizer) == [" one<|im_end|>"]


@pytest.mark.parametrize("preset", ["omni-tiny", "qwen2-vl-tiny"])
def test_templates_may_take_texts_or_lists(ground, tmp_path, preset):
    """Given the other, they would leave out all that is said."""
    model, texts = find_model(preset), []
    picture(0, 4, 6).save(tmp_path / "0.png")
    for number, template in enumerate((OF_TEXT, OF_IMAGES)):
        folder = write_model(tmp_path / str(number))
        (folder / "chat_template.jinja").write_text(template)
        read = samples.make_reader(model, folder)
        batch = batch_of(model, read, tmp_path, turn("see <image>!", "yes"), images=["0.png"])
        assert learned(batch, read.tokenizer) == ["yes<|im_end|>"]
        texts.append(read.tokenizer.decode(batch["input_ids"][0]))
    outer = "<|vision_start|>", "<|vision_end|>"  # only the template of images puts them around one
    assert texts[0] == (texts[1] if preset == "omni-tiny" else texts[1].replace(outer[0], "").replace(outer[1], ""))
    (folder / "chat_template.jinja").write_text("nothing")
    with pytest.raises(ValueError, match="its chat template does not show what messages say"):
        samples.make_reader(model, folder)


def test_a_template_that_leaves_out_images_is_refused(ground, model, tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(OF_IMAGES.replace("<|image_pad|>", ""))
    read = samples.make_reader(model, folder)
    with pytest.raises(ValueError, match="the chat template shows 0 images of 1"):
        batch_of(model, read, ground, turn("<image>"), images=["0.png"])


def test_without_a_template_contents_follow_each_other(tmp_path):
    model = find_model("qwen3-moe-tiny")
    read = samples.make_reader(model, write_tokenizer(tmp_path, None))
    batch = batch_of(model, read, tmp_path, [*turn("a ", "one"), *turn("b ", "two")])
    assert read.tokenizer.decode(batch["input_ids"][0]) == "a one<|im_end|>b two<|im_end|>"
    assert learned(batch, read.tokenizer) == ["one<|im_end|>", "two<|im_end|>"]


def test_compositions_have_a_placeholder_for_each_output(tmp_path):
    model = find_model("omni-tiny")  # patches of 2 x 2, one channel, placeholder 7
    read = samples.make_reader(model, write_tokenizer(tmp_path / "t"))
    picture(0, 4, 6).save(tmp_path / "0.png")
    picture(1, 2, 2).save(tmp_path / "1.png")
    messages = [*turn("see <image>!", "one"), *turn("<image>", "two")]
    batch = batch_of(model, read, tmp_path, messages, images=["0.png", "1.png"])
    assert learned(batch, read.tokenizer) == ["one<|im_end|>", "two<|im_end|>"]
    ids = batch["input_ids"][0]
    assert [len(item.slots) for item in batch["items"]["image"]] == [6, 1]
    assert (ids[torch.cat([item.slots for item in batch["items"]["image"]])] == 7).all() and (ids == 7).sum() == 7
    text = "<|im_start|>user\nsee !<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n<|im_start|>user\n<|im_end|>\n"
    assert read.tokenizer.decode(ids[ids != 7]) == text + "<|im_start|>assistant\ntwo<|im_end|>\n"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=5), st.data())
def test_alignment_finds_every_token(pieces, data):
    """Placeholders (9) become any number of 7s and 8s."""
    plain, expanded, expected = [], [], []
    for number, piece in enumerate(pieces):
        if number:
            plain.append(9)
            expected.append(None)
            expanded += data.draw(st.lists(st.sampled_from([7, 8]), min_size=1, max_size=4))
        for token in piece:
            plain.append(token)
            expected.append(len(expanded))
            expanded.append(token)
    assert reader.aligned(plain, expanded, {9}) == expected


# --- Rows


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(40, 60))
def test_packing_keeps_every_sample_once_within_the_row(lengths, seq_len):
    lengths = np.array(lengths)
    rows = samples.pack(range(len(lengths)), lengths, seq_len)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    fill = sorted(sum(lengths[i] for i in row) for row in rows)
    assert fill[-1] <= seq_len
    assert len(fill) == 1 or fill[0] + fill[1] > seq_len  # no two rows fit into one


def test_samples_in_one_row_are_apart():
    def made(ids, slots, axes):
        S = len(ids)
        positions = torch.arange(S)[None]
        return {
            "input_ids": torch.tensor([ids]), "labels": torch.full((1, S), 5), "segment_ids": torch.zeros(1, S).long(),
            "position_ids": positions[..., None].expand(-1, -1, 3) if axes else positions,
            "items": {"visual": [Item({"x": torch.ones(len(slots))}, torch.tensor(slots))]},
        }  # fmt: skip

    row = in_one_row([made([1, 2, 3], [1, -1], False), made([4, 5], [0, 1], True)])
    assert row["input_ids"].tolist() == [[1, 2, 3, 4, 5]] and row["segment_ids"].tolist() == [[0, 0, 0, 1, 1]]
    assert row["position_ids"][0].tolist() == [[i] * 3 for i in (0, 1, 2, 0, 1)]
    assert [item.slots.tolist() for item in row["items"]["visual"]] == [[1, -1], [3, 4]]
    rows = collate([row, in_one_row([made([6], [0], True)])], 7)
    assert [item.slots.tolist() for item in rows["items"]["visual"]] == [[1, -1], [3, 4], [7]]
    with pytest.raises(ValueError, match="row_text belongs to a whole row"):
        in_one_row([{**row, "row_text": torch.zeros(1, 2)}] * 2)


@pytest.fixture(scope="module")
def data(ground, model):
    records = [{"messages": turn("<image>" * (i % 3) + "?" * i, "!" * (1 + i % 5)), "images": ["0.png", "1.png"][: i % 3]}
               for i in range(20)]  # fmt: skip
    path = lines(ground / "twenty.jsonl", *records)
    return partial(samples.prepare, path, model, ground / "model", cache_dir=ground / "cache")


def test_batches_are_a_pure_function_of_index_and_seed(data):
    made = data(96)
    whole = made.batch(0, 4, 0)
    again, parts = data(96).batch(0, 4, 0), [made.batch(i, 2, 0) for i in (0, 2)]
    for name in ("input_ids", "labels", "position_ids", "segment_ids"):
        assert whole[name].shape[:2] == (4, 96) and torch.equal(whole[name], again[name])
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))
    slots = torch.cat([item.slots for item in whole["items"]["visual"]])
    assert (whole["input_ids"].flatten()[slots] == 510).all() and len(slots) == (whole["input_ids"] == 510).sum()
    assert not torch.equal(whole["input_ids"], made.batch(0, 4, 1)["input_ids"])


def test_an_epoch_has_every_sample_once_and_none_that_is_held_out(data, ground):
    made = data(96)
    tokenizer = load(ground / "model")
    rows = int(made.describe.split(" in ")[1].split(" rows")[0])

    def answers(batches) -> list[str]:
        found = []
        for batch in batches:
            for ids, segments in zip(batch["input_ids"], batch["segment_ids"], strict=True):
                for segment in segments[segments >= 0].unique():
                    text = tokenizer.decode(ids[segments == segment].tolist(), skip_special_tokens=False)
                    found.append(text.count("?"))
        return sorted(found)

    seen, kept = answers([made.batch(0, rows, 3)]), answers(made.heldout(2, None))
    assert len(kept) == 1 and sorted(seen + kept) == list(range(20))


def test_what_is_longer_than_a_row_is_left_out_and_counted(data):
    assert "longer" not in data(96).describe and data(96).digest == data(55).digest
    assert "2 longer than a row left out" in data(55).describe
    with pytest.raises(ValueError, match=r"0 samples fit a row of 20 tokens, two are needed; its shortest \(.*line 1\)"):
        data(20)


def test_lengths_are_cached_by_content(data, monkeypatch):
    data(96)
    calls = []
    real = samples.to_batch
    monkeypatch.setattr(samples, "to_batch", lambda *args: calls.append(1) or real(*args))
    data(96)
    assert len(calls) == 1


# --- Where images and sounds come from


def test_images_come_as_paths_uris_and_base64(ground):
    raw = png(picture(0))
    (ground / "x.png").write_bytes(raw)
    code = base64.b64encode(raw).decode()
    for reference in ("x.png", str(ground / "x.png"), f"file://{ground}/x.png", code, f"data:image/png;base64,{code}",
                      {"bytes": code}, {"path": "x.png", "bytes": None}):  # fmt: skip
        assert np.array_equal(np.asarray(media.image(reference, ground)), np.asarray(picture(0)))


def test_photographs_are_turned_upright(tmp_path):
    """As transformers' own `load_image` does: cameras store what the sensor saw, and how they were held."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture(0).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(np.asarray(media.image("x.png", tmp_path)), np.rot90(np.asarray(picture(0)), -1))


@pytest.mark.parametrize(
    "times, kept, fps",
    [
        ([3 + i / 10 for i in range(21)], [0, 5, 10, 15, 20], 2.0),
        ([0, 1, 2, 3], [0, 1, 2, 3], 1.0),
        ([0.0, 0.5, 10.0, 10.1, 10.2, 10.5, 10.6], [0, 1, 2, 5], 2 * 3 / 21),
        ([0.0, 0.1], [0], 2.0),
    ],
    ids=["fast", "slow", "with a gap", "short"],
)
def test_a_video_has_two_frames_a_second_where_there_are_as_many(tmp_path, monkeypatch, times, kept, fps):
    def frame(i: int, time: float):
        return SimpleNamespace(time=time, to_ndarray=lambda format: np.full((2, 2, 3), i, np.uint8))

    opened = nullcontext(SimpleNamespace(decode=lambda video: map(frame, range(len(times)), times)))
    monkeypatch.setitem(sys.modules, "av", SimpleNamespace(open=lambda stream: opened, FFmpegError=OSError))
    (tmp_path / "x.mp4").write_bytes(b"")
    found = media.video("x.mp4", tmp_path)
    assert found.frames[:, 0, 0, 0].tolist() == kept and found.fps == pytest.approx(fps)


def test_entries_may_name_what_they_show(ground):
    content = [{"type": "image", "image": "0.png"}, {"type": "image"}, {"type": "text", "text": "<image> is text"},
               {"type": "image_url", "image_url": {"url": "2.png"}}]  # fmt: skip
    sample = samples.parse({"messages": turn(content), "images": ["1.png"]}, ALL)
    assert sample.given["image"] == ["0.png", "1.png", "2.png"]
    assert [entry["type"] for entry in sample.messages[0]["content"]] == ["image", "image", "text", "image"]


def write_wav(path, samples_: np.ndarray, rate: int, width: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples_.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        whole = np.round(samples_ * ((1 << 8 * width - 1) - 1)).astype(np.int64)
        whole = whole + 128 if width == 1 else whole
        file.writeframes(whole.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes())


@pytest.mark.parametrize("width, error", [(1, 2e-2), (2, 1e-4), (3, 1e-6), (4, 1e-6)])
@pytest.mark.parametrize("rate", [8000, 16000, 11025])
def test_sounds_are_one_channel_at_the_rate_asked_for(tmp_path, width, error, rate):
    n = rate // 8
    time = np.arange(n) / rate
    tone = 0.5 * np.sin(2 * np.pi * 440 * time) * np.hanning(n)
    write_wav(tmp_path / "a.wav", np.stack([tone, tone], 1), rate, width)
    found = media.sound("a.wav", tmp_path, 16000)
    at = np.arange(len(found)) / 16000
    expected = 0.5 * np.sin(2 * np.pi * 440 * at) * np.interp(at, time, np.hanning(n))
    assert len(found) == round(n * 16000 / rate) and found.dtype == np.float32
    assert np.abs(found - expected).max() < error + 1e-4


def test_a_lower_rate_leaves_out_what_it_cannot_tell():
    time = np.arange(1600) / 16000
    low, high = np.sin(2 * np.pi * 500 * time), np.sin(2 * np.pi * 6000 * time)
    found = media.resampled((low + high) * np.hanning(1600), 16000, 8000)
    assert np.abs(found - (low * np.hanning(1600))[::2]).max() < 1e-3


def test_a_video_may_be_a_list_of_images(ground):
    video = media.video(["0.png", "0.png"], ground)
    assert video.frames.shape == (2, 16, 24, 3) and video.frames.dtype == np.uint8


# --- What is refused


@pytest.mark.parametrize(
    "record, words",
    [
        ({"text": "x"}, 'expected an object with "messages"'),
        ({"messages": turn("<image>")}, 'the messages show 1 <image>, but "images" has 0'),
        ({"messages": turn("x"), "images": ["0.png"]}, 'the messages show 0 <image>, but "images" has 1'),
        ({"messages": turn("x"), "images": "0.png"}, '"images" is of type str: it must be a list'),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message is the assistant's: there is nothing to learn"),
        ({"messages": [{"role": "user"}]}, "messages\\[0\\] has a content of type NoneType: it must be text or a list"),
        ({"messages": turn([{"type": "smell"}])}, "messages\\[0\\] has an entry of type 'smell'; valid|valid are text, image"),
        ({"messages": turn("<image>"), "images": ["no.png"]}, "no.png: there is no such file"),
        ({"messages": turn("<image>"), "images": ["twenty.jsonl"]}, "twenty.jsonl is not an image of a known format"),
        ({"messages": turn("<image>"), "images": ["https://x.org/a.png"]}, "nothing is downloaded while training"),
        ({"messages": turn("<audio>"), "audios": ["a.wav"]}, "the model takes no audio: it takes image, video"),
        ({"messages": turn("<video>"), "videos": ["a.mp4"]}, "no such file|videos need PyAV"),
    ],
)
def test_refusals_name_the_line_and_what_is_wrong(ground, model, data, record, words):
    data(96)  # writes twenty.jsonl
    path = lines(ground / "bad.jsonl", {"messages": turn("fine")}, record)
    with pytest.raises((ValueError, FileNotFoundError), match=f"bad.jsonl, line 2: .*({words})"):
        samples.prepare(path, model, ground / "model", 96, ground / "cache")


def test_a_model_needs_a_tokenizer_for_messages(model):
    with pytest.raises(FileNotFoundError, match="messages need a tokenizer, and a preset has none: .* --tokenizer"):
        samples.make_reader(model, None)


def test_only_files_with_messages_are_samples(ground, tmp_path):
    assert samples.are_samples(lines(tmp_path / "a.jsonl", {"messages": []}))
    assert not samples.are_samples(lines(tmp_path / "b.jsonl", {"text": "messages"}))
    assert not samples.are_samples(None) and not samples.are_samples(str(tmp_path))



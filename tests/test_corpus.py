"""Text to tokens: tokenizers, corpora, their cache, and every way in which text can be unusable."""

import json
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain import cache, corpus, data, tokenizer

quick = settings(max_examples=60, deadline=None)


# Tokenizer

TEXTS = ["def f(x):\n    return x + 1\n" * 20, "the quick brown fox, don't you know? 1234\n" * 20, "größe 日本 🎉"]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return tokenizer.train_or_load(TEXTS, 310, tmp_path_factory.mktemp("cache"))


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text(st.sampled_from(" \n\t\r'sx1é\u0301<|endoftext|>\ufeff\u2028🎉")))
def test_any_text_survives_the_round_trip(bpe, text):
    ids = bpe.encode(text).ids
    assert bpe.decode(ids, skip_special_tokens=False) == text
    assert max(ids, default=0) < 310


def test_training_is_deterministic_and_cached_by_content(tmp_path, monkeypatch):
    first = tokenizer.train_or_load(TEXTS, 310, tmp_path / "a")
    assert tokenizer.train_or_load(TEXTS, 310, tmp_path / "b").to_str() == first.to_str()
    assert first.get_vocab_size() == 310 and first.token_to_id(tokenizer.END) == 0
    trained = []
    train = tokenizer._train
    monkeypatch.setattr(tokenizer, "_train", lambda *a: trained.append(a) or train(*a))
    assert tokenizer.train_or_load(TEXTS, 310, tmp_path / "a").to_str() == first.to_str()
    assert not trained
    tokenizer.train_or_load(TEXTS, 309, tmp_path / "a")
    tokenizer.train_or_load(TEXTS[:2], 310, tmp_path / "a")
    tokenizer.train_or_load([TEXTS[0] + TEXTS[1], TEXTS[2]], 310, tmp_path / "a")
    assert len(trained) == 3


def test_large_corpora_are_sampled_all_over(monkeypatch):
    monkeypatch.setattr(tokenizer, "SAMPLE", 1000)
    monkeypatch.setattr(tokenizer, "_PIECE", 10)
    documents = ["".join(f"{i:010d}" for i in range(400)), "short", "x" * 995]
    pieces = list(tokenizer._sample(documents))
    assert 900 <= sum(map(len, pieces)) <= 1000
    assert pieces[0] == "0" * 10 and int(pieces[79]) > 390 and pieces[-1].startswith("xxxxx")
    monkeypatch.setattr(tokenizer, "SAMPLE", 5000)
    assert list(tokenizer._sample(documents)) == documents


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2", "llama"])
def test_transformers_opens_what_is_saved(bpe, tmp_path, model_type):
    from transformers import AutoTokenizer

    tokenizer.save(bpe, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "  def g(y):\n\n\t# don't 123 größe 日本 🎉\r\n    x ,"
    assert theirs(text).input_ids == bpe.encode(text).ids
    assert theirs.decode(bpe.encode(text).ids) == text
    assert theirs.eos_token_id == tokenizer.eos_ids(bpe, tmp_path)[0] == bpe.token_to_id(tokenizer.END)
    assert tokenizer.load(tmp_path).to_str() == bpe.to_str()


def test_a_directorys_own_tokenizer_is_used_and_copied(bpe, tmp_path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    bpe.enable_truncation(3)
    tokenizer.save(bpe, source)
    bpe.no_truncation()
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "model.safetensors").write_text("not a tokenizer's file")
    found = tokenizer.tokenizer_for(source, iter([]), 310, tmp_path / "cache")
    assert found.encode(TEXTS[0]).ids == bpe.encode(TEXTS[0]).ids
    tokenizer.save(found, copy, source)
    assert sorted(f.name for f in copy.iterdir()) == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    with pytest.raises(ValueError, match=r"source: its tokenizer has 310 tokens, but the model's vocabulary only 309"):
        tokenizer.tokenizer_for(source, [], 309, tmp_path / "cache")
    # A directory without one, and a vocabulary beyond what is trained here.
    for directory in (None, tmp_path / "cache"):
        assert tokenizer.tokenizer_for(directory, TEXTS, 310, tmp_path / "cache").to_str() == bpe.to_str()
    assert tokenizer.tokenizer_for(None, TEXTS, 10**6, tmp_path / "cache").get_vocab_size() <= 4096


def test_eos_is_read_from_the_directory(bpe, tmp_path):
    assert tokenizer.eos_ids(bpe) == (0,)
    assert tokenizer.eos_ids(bpe, tmp_path) == (0,)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert tokenizer.eos_ids(bpe, tmp_path) == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 7, 99999]}')
    assert tokenizer.eos_ids(bpe, tmp_path) == (9, 7)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    assert tokenizer.eos_ids(bpe, tmp_path) == (0, 9, 7)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: not valid JSON"):
        tokenizer.eos_ids(bpe, tmp_path)
    with pytest.raises(ValueError, match="names no end-of-text token"):
        tokenizer.eos_ids(tokenizer.Tokenizer(tokenizer.models.BPE()))


def test_tokenizer_errors(tmp_path):
    with pytest.raises(ValueError, match=r"vocab 256: a byte-level tokenizer needs at least 257"):
        tokenizer.train_or_load(TEXTS, 256, tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="the tokenizer cannot be read"):
        tokenizer.load(tmp_path)


# Corpora


def prepared(path, tmp_path, seq_len=8, vocab=300, **more):
    return data.prepare(path, None, vocab, seq_len, tmp_path / "cache", **more)


def stream_text(dataset, tok):
    texts = [dataset.ids[a : b - 1].tolist() for a, b in pairwise([0, *dataset.ends.tolist()])]
    return [tok.decode(ids, skip_special_tokens=False) for ids in texts]


def test_the_default_corpus_is_the_standard_library_split_by_file():
    found = corpus.find_corpus()
    documents = corpus.read_documents(found)
    names = {d.key for d in documents}
    assert {"argparse.py", "os.py", "typing.py"} <= names
    assert not any(n.startswith("_sysconfigdata") for n in names)
    train, heldout = corpus.split(documents)
    assert sorted(train + heldout) == sorted(d.text for d in documents)
    assert not set(train) & set(heldout)
    in_order = [d.text in heldout for d in sorted(documents)]
    assert sum(a != b for a, b in pairwise(in_order)) > 4  # drawn from all over, not a run of the alphabet
    assert 0.03 < sum(map(len, heldout)) / sum(len(d.text) for d in documents) < 0.1
    assert 3e6 < sum(map(len, train)) < 8e6  # some seconds of tokenising
    assert corpus.find_corpus() == found


@quick
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 200)), min_size=1, max_size=30))
def test_split_holds_out_about_a_twentieth_and_loses_nothing(pairs):
    documents = [corpus.Document(key, chr(0x4E00 + i) * n) for i, (key, n) in enumerate(pairs)]
    train, heldout = corpus.split(documents)
    total = sum(n for _, n in pairs)
    assert train and sorted("".join(train + heldout)) == sorted("".join(d.text for d in documents))
    held = sum(map(len, heldout))
    assert held <= 0.1 * total + 1
    assert held >= min(0.05 * total - 1, max(n for _, n in pairs) // 2 - 1)
    # The choice of whole documents does not depend on their order.
    swapped = corpus.split(documents[::-1])
    assert sorted(t for t in heldout if t in [d.text for d in documents]) == sorted(
        t for t in swapped[1] if t in [d.text for d in documents]
    )


def test_one_text_is_one_document_and_its_end_is_held_out(tmp_path):
    text = "".join(f"line {i}\n\n" for i in range(400))
    (tmp_path / "a.txt").write_text(text)
    made = prepared(tmp_path / "a.txt", tmp_path)
    (train,), (heldout,) = stream_text(made.train, made.tokenizer), stream_text(made.heldout, made.tokenizer)
    assert train + heldout == text
    assert 0 <= len(heldout) - 0.05 * len(text) <= 1


def test_documents_of_every_kind_of_file(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.md").write_text("# one\n\ntwo\n")
    (folder / "b.txt").write_text("x\n<|endoftext|>\ny\n\nz<|endoftext|>")
    # A raw U+2028 ends a line for str.splitlines, not for JSONL.
    lines = '{"text": "j\u2028\\n1", "id": 1}\n\n{"text": ""}\r\n{"text": "j2"}'
    (folder / "sub" / "c.jsonl").write_bytes(lines.encode())
    (folder / "sub" / "bom").write_bytes(b"\xef\xbb\xbfbom")
    (folder / ".hidden").write_bytes(b"\xff")
    texts = [d.text for d in corpus.read_documents(corpus.find_corpus(folder))]
    assert texts == ["# one\n\ntwo\n", "x", "y\n\nz", "bom", "j\u2028\n1", "j2"]
    single = [d.text for d in corpus.read_documents(corpus.find_corpus(str(folder / "sub" / "c.jsonl")))]
    assert single == ["j\u2028\n1", "j2"]


def test_tokens_equal_the_tokenizers_own_and_documents_end_once(tmp_path, monkeypatch):
    """Also for documents cut into pieces, and for a tokenizer that begins each text with a token of its own."""
    from tokenizers.processors import TemplateProcessing

    tok = tokenizer.train_or_load(TEXTS, 310, tmp_path)
    documents = [*TEXTS, "ends itself<|endoftext|>", "a b c d " * 30]
    ids, ends = data.encode(documents, tok, 0)
    expected = [i for d in documents for i in [*tok.encode(d).ids, *([] if d.endswith(">") else [0])]]
    assert ids.tolist() == expected and ids.dtype == np.uint16
    assert ends[-1] == len(ids) and (ids[ends - 1] == 0).all()

    monkeypatch.setattr(data, "_PIECE", 8)  # "a b c d " is cut between words
    monkeypatch.setattr(data, "_GROUP", 20)
    tok.post_processor = TemplateProcessing(
        single=f"<b> $A {tokenizer.END}", special_tokens=[(tokenizer.END, 0), ("<b>", 5)]
    )
    pieces, cut_ends = data.encode(documents[-1:] * 2, tok, 0)
    plain = tok.encode("a b c d ", add_special_tokens=False).ids
    assert pieces.tolist() == [5, *plain * 30, 0] * 2
    assert cut_ends.tolist() == [len(pieces) // 2, len(pieces)]


def test_cached_tokens_are_reused_until_the_text_changes(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("some words to learn from, and more of them\n" * 40)
    first = prepared(file, tmp_path)

    def fail(*args):
        raise AssertionError("read, though nothing changed")

    with monkeypatch.context() as patched:
        patched.setattr(data, "read_documents", fail)
        again = prepared(file, tmp_path, seq_len=16)
    assert again.digest == first.digest and again.train.seq_len == 16
    assert np.array_equal(again.train.ids, first.train.ids) and np.array_equal(again.train.ends, first.train.ends)
    assert isinstance(again.train.ids, np.memmap)
    ids = first.train.ids.tolist()

    for broken in (tmp_path / "cache").glob("*/train.npy"):  # a truncated entry is made again
        broken.write_bytes(broken.read_bytes()[:-7])
    assert prepared(file, tmp_path).train.ids.tolist() == ids
    file.write_text(file.read_text() + "!")
    assert prepared(file, tmp_path).digest != first.digest
    assert not [f for f in (tmp_path / "cache").iterdir() if f.is_dir() and f.name.count(".")]


def test_racing_processes_make_an_entry_once(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from ftrain.cache import cached\n"
        "def make(): time.sleep(.3); open(sys.argv[1] + '/made', 'a').write('x'); return 'whole'\n"
        "store = lambda value, folder: (folder / 'value').write_text(value)\n"
        "print(cached(Path(sys.argv[1]), 'entry', make, store, lambda f: (f / 'value').read_text()))\n"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [r.communicate(timeout=60)[0] for r in racers] == ["whole\n"] * 3
    assert (tmp_path / "made").read_text() == "x"


def test_without_locks_the_faster_process_wins_and_both_go_on(tmp_path):
    """The entry appears while another one is being stored: the rename fails, and the first is kept."""

    def store(value, folder):
        (folder / "value").write_text(value)
        (tmp_path / "entry").mkdir()
        (tmp_path / "entry" / "value").write_text("first")

    assert cache.cached(tmp_path, "entry", lambda: "second", store, lambda f: (f / "value").read_text()) == "first"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["entry", "entry.lock"]


def test_the_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_root() == tmp_path / "ftrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_root() == tmp_path / ".cache" / "ftrain"


def test_a_cache_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cache folder .*file/x: Not a directory; set XDG_CACHE_HOME"):
        cache.cached(tmp_path / "file" / "x", "e", lambda: 1, None, lambda f: f.stat())

    def full(value, folder):
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"cache folder .*: No space left on device; set XDG_CACHE_HOME"):
        cache.cached(tmp_path / "c", "e", lambda: 1, full, lambda f: f.stat())
    assert [f.name for f in (tmp_path / "c").iterdir()] == ["e.lock"]


# Text that cannot be used


@pytest.mark.parametrize(
    "name, content, error, message",
    [
        ("none.txt", None, FileNotFoundError, r"--data .*none.txt: no such file or directory"),
        ("a.txt", b"", ValueError, r"--data .*a.txt: the file is empty; expected UTF-8 text, or JSONL"),
        ("a.txt", b"ok\xff\xfe", ValueError, r"a.txt: not UTF-8 text \(byte 0xff at offset 2\); convert it to UTF-8"),
        ("a.txt", "x".encode("utf-16"), ValueError, r"not UTF-8 text \(byte 0xff at offset 0\)"),
        ("a.txt", b"<|endoftext|>\n", ValueError, r"every document is empty"),
        ("a.txt", b"too short", ValueError, r"too little text, its \d+ training and \d+ held-out tokens do not fill"),
        ("a.txt", b"x", ValueError, r"too little text, its 2 training and 0 held-out tokens"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', ValueError, r"a.jsonl, line 3: not valid JSON \(.* column 1"),
        ("a.jsonl", b'{"text": "a"}\n["b"]', ValueError, r"line 2: found a JSON list; expected an object with"),
        ("a.jsonl", b'{"body": 1, "id": 2}', ValueError, r'line 1: no "text" field \(fields: body, id\); expected'),
        ("a.jsonl", b'{"text": 5}', ValueError, r'line 1: "text" is of type int; expected an object with'),
        ("a.jsonl", b'{"text": "\\ud800"}', ValueError, r'line 1: "text" holds half of a surrogate pair'),
        ("a.jsonl", b"[" * 100_000, ValueError, r"line 1: not valid JSON"),
        ("a.json", b"{\n}", ValueError, r"a.json, line 1: not valid JSON"),
    ],
)
def test_bad_text_is_named(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        prepared(tmp_path / name, tmp_path, seq_len=64)
    assert "\n" not in str(caught.value)


def test_a_directory_without_text_and_a_bad_length(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: the directory holds no text"):
        corpus.find_corpus(tmp_path / "empty")
    with pytest.raises(ValueError, match="--seq-len 0: must be at least 1"):
        prepared(None, tmp_path, seq_len=0)

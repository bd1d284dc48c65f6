"""Where text comes from: files cut into documents, and the documents into training and held-out."""

import hashlib
import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import NamedTuple

from .cache import content_hash
from .tokenizer import END

HELDOUT = 0.05  # of the characters
_RECIPE = "documents 1"  # to change with `read_documents` or `split`: what they made is cached by it
JSON_LINES = (".jsonl", ".ndjson", ".json")


class Corpus(NamedTuple):
    """Files of text, not yet read into documents."""

    name: str  # what messages call it
    files: tuple[tuple[str, Path], ...]  # name within the corpus, where it is
    digest: str  # of names and bytes


class Document(NamedTuple):
    key: str  # decides, by its hash, on which side of the split the document falls
    text: str


def find_corpus(data: str | Path | None = None) -> Corpus:
    """The files behind `--data`; None means the modules at the top of Python's own standard library.

    Its packages are left out: the modules alone are some 5 MB of source, and more would take
    longer to tokenise than a first run wants to wait.

    `data` is a file or a directory, whose files are all taken but the hidden ones. Raises
    FileNotFoundError when there is no such path, ValueError when it holds no bytes.
    """
    if data is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        # _sysconfigdata describes the machine: with it no two machines would have the same corpus.
        files = tuple((f.name, f) for f in sorted(root.glob("*.py")) if not f.name.startswith("_sysconfigdata"))
        if not files:
            raise FileNotFoundError(f"{root}: holds no source of Python's standard library; give text with --data")
        return Corpus("Python's standard library", files, _digest(files))
    path = Path(data)
    if not path.exists():
        raise FileNotFoundError(f"--data {data}: no such file or directory")
    if path.is_dir():
        files = tuple((f.relative_to(path).as_posix(), f) for f in _walk(path))
    else:
        files = ((path.name, path),)
    if not any(f.stat().st_size for _, f in files):
        what = "the directory holds no text" if path.is_dir() else "the file is empty"
        raise ValueError(f"--data {data}: {what}; expected UTF-8 text, or JSONL with a \"text\" field per line")
    return Corpus(f"--data {data}", files, _digest(files))


def _walk(root: Path) -> Iterator[Path]:
    """Files under `root`, in an order that does not depend on the file system; hidden ones left out."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield from (Path(folder, n) for n in sorted(names) if not n.startswith("."))


def _digest(files: tuple[tuple[str, Path], ...]) -> str:
    parts = [_RECIPE]
    for name, path in files:
        with path.open("rb") as file:
            parts += [name, hashlib.file_digest(file, "sha256").digest()]
    return content_hash(*parts)


def read_documents(corpus: Corpus) -> list[Document]:
    """All documents of a corpus, empty ones left out.

    A file whose name ends in .jsonl, .ndjson or .json holds one document per line, the string
    in the field "text" of a JSON object. Any other file is text, one document, or several where
    the text contains `<|endoftext|>` between them. Blank lines separate nothing: they belong
    to the text. Raises ValueError naming the file, and the line, that is not so.
    """
    documents = []
    for name, path in corpus.files:
        shown = str(path)
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{shown}: not UTF-8 text (byte 0x{raw[error.start]:02x} at offset {error.start}); convert it to UTF-8"
            ) from error
        if path.suffix.lower() in JSON_LINES:
            documents += [Document(t, t) for t in _json_lines(text, shown)]
        elif END in text:
            documents += [Document(t, t) for t in re.split(rf"\n?{re.escape(END)}\n?", text)]
        else:
            documents.append(Document(name, text))
    documents = [d for d in documents if d.text]
    if not documents:
        raise ValueError(f"{corpus.name}: every document is empty; nothing to train on")
    return documents


def _json_lines(text: str, name: str) -> Iterator[str]:
    expected = 'expected an object with a "text" string on each line'
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            reason = f"{error.msg} at column {error.colno}"
            raise ValueError(f"{where}: not valid JSON ({reason}); {expected}") from error
        except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
            raise ValueError(f"{where}: not valid JSON ({error}); {expected}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: found a JSON {type(record).__name__}; {expected}")
        if "text" not in record:
            raise ValueError(f'{where}: no "text" field (fields: {", ".join(record) or "none"}); {expected}')
        value = record["text"]
        if not isinstance(value, str):
            raise ValueError(f'{where}: "text" is of type {type(value).__name__}; {expected}')
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f'{where}: "text" holds half of a surrogate pair, which is not Unicode text') from error
        yield value


def split(documents: list[Document]) -> tuple[list[str], list[str]]:
    """(training, held-out) texts: 5% of the characters are held out, whole documents where possible.

    Held-out documents are those whose key's hash comes first, so that the choice does not depend
    on order, and equal documents fall on the same side. A document (or a repeated one) larger
    than the 5% is never chosen; where only such are left, the end of the longest is held out.
    """
    sizes = Counter()
    for key, text in documents:
        sizes[key] += len(text)
    missing = HELDOUT * sizes.total()
    chosen = set()
    for key in sorted((k for k, n in sizes.items() if n <= missing), key=content_hash):
        if missing <= 0:
            break
        chosen.add(key)
        missing -= sizes[key]
    train = [d.text for d in documents if d.key not in chosen]
    heldout = [d.text for d in documents if d.key in chosen]
    if missing > 0:
        longest = max(range(len(train)), key=lambda i: len(train[i]))
        cut = max(len(train[longest]) - ceil(missing), (len(train[longest]) + 1) // 2)
        train[longest], tail = train[longest][:cut], train[longest][cut:]
        heldout += [tail] if tail else []
    return train, heldout

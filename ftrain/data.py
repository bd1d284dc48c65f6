"""From text to batches: tokenised once, packed into rows, shuffled by epoch, cut for each rank.

The position in the data is one integer, the number of sequences consumed so far: the same
for every mesh and world size, and all that a resumed run needs to go on where it stopped.
"""

import functools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer

from .cache import cache_root, cached, content_hash
from .corpus import find_corpus, read_documents, split
from .items import Item, in_rows_of
from .tokenizer import eos_ids, has_tokenizer, tokenizer_for, vocab_size

Batch = dict[str, torch.Tensor]
T = TypeVar("T")

PADDING = {"input_ids": 0, "labels": -100, "position_ids": 0, "segment_ids": -1}
_RECIPE = "tokens 1"  # to change with `encode`: its results are cached by it
_PIECE = 1 << 18  # characters that are encoded at a time: the encoder needs some 100 bytes for each
_GROUP = 1 << 20  # characters handed to the encoder at once: it encodes the pieces in parallel


class Dataset(NamedTuple):
    """Documents as one stream of tokens, read as rows of `seq_len`; the last row is padded."""

    ids: np.ndarray  # [tokens] uint16 or uint32: every document followed by the end-of-text id
    ends: np.ndarray  # [documents] int64: where in `ids` each document stops (exclusive, ascending)
    seq_len: int

    @property
    def rows(self) -> int:
        return -(-len(self.ids) // self.seq_len)


@dataclass(frozen=True)
class Data:
    """What a run asks of its data, whatever it is made of.

    A global batch holds tensors [B, S, ...] (`input_ids`, `labels`, `position_ids`, `segment_ids` and what else the
    model's `prepare` makes), `row_...` ones [B, ...] and, under "items", {encoder: [Item]}: see `collate`.

    batch: (index, batch_size, seed) -> the global batch that follows after `index` rows have been consumed. A pure
        function, called in a thread ahead of use, on every rank.
    heldout: (batch_size, limit) -> batches that are not trained on, the first `limit` of them (None: all), in order.
        Rows fill the last one up to batch_size, or it is smaller.
    digest: any text; equal digests and seeds mean equal batches.
    describe: for the header, as "1,000 tokens of x.txt, 50 held out".
    save: writes what belongs beside the weights (tokenizer, processor) into a checkpoint's directory.
    sample: (job, state) -> a line to print after the last step. Every rank calls it.
    """

    batch: Callable[[int, int, int], Mapping]
    heldout: Callable[[int, int | None], Iterable[Mapping]]
    digest: str
    describe: str
    save: Callable[[Path], None] | None = None
    sample: Callable[..., str] | None = None


class Text(NamedTuple):
    """Text as tokens."""

    tokenizer: Tokenizer
    eos: tuple[int, ...]  # ids that end a text; the first one separates the documents
    train: Dataset
    heldout: Dataset
    digest: str  # of the tokens: equal digests and seeds mean equal batches


def prepare(
    data: str | Path | None, directory: Path | None, vocab: int, seq_len: int, cache_dir: Path | None = None
) -> Text:
    """Tokenizer and tokens for `--data` (None: Python's own standard library), 5% of it held out.

    The tokenizer is that of the Hugging Face `directory` if it has one, else one trained on the
    training text (`tokenizer_for`). Both steps are cached under `cache_dir` by content: when
    nothing changed, the text is hashed but neither parsed nor encoded again. Raises
    FileNotFoundError or ValueError, in a sentence, for text that cannot be used
    (`find_corpus`, `read_documents`) or that does not fill one row of `seq_len` tokens.
    """
    if seq_len < 1:
        raise ValueError(f"--seq-len {seq_len}: must be at least 1")
    corpus = find_corpus(data)
    source = directory if directory is not None and has_tokenizer(directory) else None
    cache_dir = Path(cache_dir or cache_root())

    @functools.cache
    def texts() -> tuple[list[str], list[str]]:
        return split(read_documents(corpus))

    def to_train_on():  # a generator: on a cache hit nothing is read
        yield from texts()[0]

    tokenizer = tokenizer_for(source, to_train_on(), vocab, cache_dir, corpus.digest)
    eos = eos_ids(tokenizer, source)

    def encode_all() -> dict[str, np.ndarray]:
        out = {}
        for side, documents in zip(("train", "heldout"), texts(), strict=True):
            out[side], out[side + "_ends"] = encode(documents, tokenizer, eos[0])
        return out

    digest = content_hash(_RECIPE, corpus.digest, tokenizer.to_str(), str(eos[0]))
    arrays = cached(cache_dir, f"tokens-{digest}", encode_all, _save_arrays, _load_arrays)
    train, heldout = (Dataset(arrays[side], arrays[side + "_ends"], seq_len) for side in ("train", "heldout"))
    if len(train.ids) < seq_len or not heldout.rows:
        raise ValueError(
            f"{corpus.name}: too little text, its {len(train.ids)} training and {len(heldout.ids)} held-out tokens "
            f"do not fill one row of {seq_len} and begin another; give more text, or a smaller --seq-len"
        )
    return Text(tokenizer, eos, train, heldout, digest)


def _save_arrays(arrays: dict[str, np.ndarray], folder: Path) -> None:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def _load_arrays(folder: Path) -> dict[str, np.ndarray]:
    names = ("train", "train_ends", "heldout", "heldout_ends")
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}


def encode(documents: Iterable[str], tokenizer: Tokenizer, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, ends) of the documents, as in `Dataset`.

    Each document begins with what the tokenizer's own template puts first (Llama's BOS) and
    ends with `eos`, once. Special tokens written out in the text are read as such.
    """
    first = [i for i in tokenizer.encode("").ids if i != eos]
    dtype = np.uint16 if vocab_size(tokenizer) <= 1 << 16 else np.uint32
    parts, ends, length = [], [], 0
    for group in _groups(documents):
        encoded = tokenizer.encode_batch_fast([text for text, _, _ in group], add_special_tokens=False)
        for (_, opens, closes), encoding in zip(group, encoded, strict=True):
            ids = first + encoding.ids if opens else encoding.ids
            if closes and ids[-1:] != [eos]:
                ids.append(eos)
            parts.append(np.array(ids, dtype))
            length += len(ids)
            if closes:
                ends.append(length)
    return np.concatenate(parts) if parts else np.empty(0, dtype), np.array(ends, np.int64)


def _groups(documents: Iterable[str]) -> Iterator[list[tuple[str, bool, bool]]]:
    """Pieces (text, opens a document, closes it), in order, in lists of about _GROUP characters."""
    group, size = [], 0
    for text in documents:
        for a, b in pairwise([*range(0, len(text), _PIECE), len(text)]):
            group.append((text[a:b], a == 0, b == len(text)))
            size += b - a
            if size >= _GROUP:
                yield group
                group, size = [], 0
    if group:
        yield group


def rows_at(dataset: Dataset, rows: np.ndarray) -> Batch:
    """The rows of these numbers [B] as a batch of int64 [B, seq_len]; a negative number is an empty row.

    Every token of the stream is the input of exactly one row, and every token but the first of
    its document is the label of exactly one: the label of a row's last token is the next row's
    first. No label crosses into another document.
    """
    ids, ends, S = dataset
    at = rows[:, None] * S + np.arange(S)
    real = (at >= 0) & (at < len(ids))
    at = np.where(real, at, 0)
    document = np.searchsorted(ends, at, side="right")
    start = np.where(document > 0, ends[document - 1], 0)
    following = np.minimum(at + 1, len(ids) - 1)
    fields = {
        "input_ids": ids[at],
        "labels": np.where(at + 1 < ends[document], ids[following].astype(np.int64), PADDING["labels"]),
        "position_ids": at - np.maximum(start, at[:, :1]),
        "segment_ids": document - document[:, :1],
    }
    return {n: torch.from_numpy(np.where(real, f.astype(np.int64), PADDING[n])) for n, f in fields.items()}


@functools.lru_cache(maxsize=2)  # two: a batch may reach into the next epoch
def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order [rows] in which an epoch visits the rows: a permutation drawn from (seed, epoch).

    Sorting raw Philox words instead of asking for a shuffle: numpy promises the words to be
    the same in every version, the shuffle not.
    """
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(rows)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def batch_at(dataset: Dataset, index: int, batch_size: int, seed: int) -> Batch:
    """The batch that follows after `index` sequences have been consumed: int64 [batch_size, seq_len].

    A pure function: sequence i is row `order[i % rows]` of epoch `i // rows`, so that batches
    of any sizes, on any mesh, read the same sequences in the same order, across epochs too.
    """
    epochs, at = np.divmod(np.arange(index, index + batch_size), dataset.rows)
    rows = [epoch_order(dataset.rows, seed, int(e))[a] for e, a in zip(epochs, at, strict=True)]
    return rows_at(dataset, np.array(rows, np.int64))


def heldout_batches(dataset: Dataset, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
    """All rows in order (or the first `limit` batches), int64 [batch_size, seq_len]; empty rows fill the last."""
    for n, first in enumerate(range(0, dataset.rows, batch_size)):
        if n == limit:
            return
        rows = np.arange(first, first + batch_size)
        yield rows_at(dataset, np.where(rows < dataset.rows, rows, -1))


def local_batch(
    batch: Batch, batch_rank: int, batch_ranks: int, sp_rank: int, sp: int, accumulate: int = 1
) -> list[Batch]:
    """This rank's part of a global batch: `accumulate` microbatches, the same shape on every rank.

    Tensors are [B, S, ...], or [B, ...] where their name begins with `row_`: those every sp rank has whole.
    Empty rows fill B up to a multiple of batch_ranks * accumulate, padding tokens fill S up to
    a multiple of sp. Microbatch m of all ranks together is a contiguous run of rows, batch rank
    r has the r-th part of it, and sp rank s the s-th part of the columns.
    """
    B, S = batch["segment_ids"].shape
    b, s = -(-B // (batch_ranks * accumulate)), -(-S // sp)
    rows, columns = b * batch_ranks * accumulate, slice(sp_rank * s, (sp_rank + 1) * s)
    first = [(m * batch_ranks + batch_rank) * b for m in range(accumulate)]
    parts: list[Batch] = [{} for _ in first]
    for name, t in batch.items():
        by_row = name.startswith("row_")
        whole = padded(name, t, rows, None if by_row else s * sp)
        for part, f in zip(parts, first, strict=True):
            part[name] = (whole[f : f + b] if by_row else whole[f : f + b, columns]).contiguous()
    return parts


def collate(batches: Sequence[Mapping], seq_len: int | None = None) -> dict:
    """Batches of any number of rows as one, filled up to the longest (or to seq_len): tensors, and items.

    Positions of text alone join those with several coordinates as equal ones.
    Raises ValueError for a row longer than seq_len.
    """
    lengths = [batch["segment_ids"].shape[1] for batch in batches]
    S = seq_len or max(lengths)
    if max(lengths) > S:
        raise ValueError(f"a sample has {max(lengths)} tokens, but a row has {S}: give a larger --seq-len")
    parts: list[dict[str, torch.Tensor]] = []
    items: dict[str, list[Item]] = {}
    first = 0
    for batch, tensors, length in zip(batches, _alike(batches), lengths, strict=True):
        rows = batch["segment_ids"].shape[0]
        parts.append(
            {name: t if name.startswith("row_") else padded(name, t, rows, S) for name, t in tensors.items()}
        )
        for name, of_encoder in batch.get("items", {}).items():
            items.setdefault(name, []).extend(in_rows_of(item, S, length, first) for item in of_encoder)
        first += rows
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} | ({"items": items} if items else {})


def in_one_row(batches: Sequence[Mapping]) -> dict:
    """Batches of one row each, one after the other in one row, as segments that do not see each other.

    Raises ValueError where there is something that a row has one of.
    """
    parts: list[dict[str, torch.Tensor]] = []
    items: dict[str, list[Item]] = {}
    column = segment = 0
    for batch, tensors in zip(batches, _alike(batches), strict=True):
        if len(batches) > 1 and (of_row := [name for name in tensors if name.startswith("row_")]):
            raise ValueError(f"{of_row[0]} belongs to a whole row: samples that have it cannot share one")
        own = tensors["segment_ids"]
        parts.append(tensors | {"segment_ids": torch.where(own < 0, -1, own + segment)})
        for name, of_encoder in batch.get("items", {}).items():
            items.setdefault(name, []).extend(item.moved(lambda slots: slots + column) for item in of_encoder)
        column += own.shape[1]
        segment += int(own.max()) + 1
    joined = {name: torch.cat([part[name] for part in parts], 0 if name.startswith("row_") else 1) for name in parts[0]}
    return joined | ({"items": items} if items else {})


def _alike(batches: Sequence[Mapping]) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of each batch: all of the same names, what one lacks being padding, and positions of as many axes."""
    axes = max((batch["position_ids"].shape[2] for batch in batches if batch["position_ids"].ndim == 3), default=0)
    like = {name: t for batch in reversed(batches) for name, t in batch.items() if name != "items"}
    for batch in batches:
        rows, columns = batch["segment_ids"].shape
        tensors = {}
        for name, other in like.items():
            if name not in batch:
                by_row = name.startswith("row_")
                t = padded(name, other[:0] if by_row else other[:0, :0], rows, None if by_row else columns)
            else:
                t = batch[name]
            if name == "position_ids" and axes and t.ndim == 2:
                t = t[..., None].expand(-1, -1, axes)
            tensors[name] = t
        yield tensors


def padded(name: str, t: torch.Tensor, rows: int, columns: int | None = None) -> torch.Tensor:
    """A batch's tensor filled up to so many rows, and columns, with what its name says is padding."""
    more = [0, 0] * (t.ndim - 1 if columns is None else t.ndim - 2)
    more += ([0, columns - t.shape[1]] if columns is not None else []) + [0, rows - t.shape[0]]
    value = PADDING["labels"] if name.endswith(".labels") else PADDING.get(name, 0)
    return torch.nn.functional.pad(t, more, value=value)


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """The items, up to `depth` of them made ahead of use by a background thread.

    What making an item raises is raised here, in its place. Closing the generator (or leaving
    it to the garbage collector) stops the thread, once the item in the making is done.
    """
    free = threading.Semaphore(depth)
    ready: queue.SimpleQueue = queue.SimpleQueue()
    stopped = threading.Event()

    def work():
        try:
            source = iter(items)
            while free.acquire() and not stopped.is_set():
                ready.put((next(source), None))
        except BaseException as error:  # StopIteration included: the reader sorts them out
            ready.put((None, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            free.release()
            yield item
    finally:
        stopped.set()
        free.release()
        thread.join()

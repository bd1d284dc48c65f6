"""Tokenizers: a byte-level BPE trained here in seconds, or the one of a Hugging Face directory."""

import shutil
from collections.abc import Iterable, Sequence
from math import ceil
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers import __version__ as tokenizers_version

from .cache import cache_root, cached, content_hash
from .disk import read_json, write_json

END = "<|endoftext|>"  # ends every document
TRAINED_VOCAB = 4096  # the most tokens that a tokenizer trained here has
SAMPLE = 16_000_000  # characters that training looks at: more take minutes and change little
# Where words begin, as Qwen2 has it: for that model_type transformers splits by its own rule, whatever
# tokenizer.json says. In turn: an English contraction; letters with the character before them; one digit;
# punctuation with the line ends after it; line ends with the blanks before them; blanks, of which the last
# goes to the word that follows.
_WORDS = (
    r"(?i:'(?:[sdmt]|ll|re|ve))|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PIECE = 1 << 16
# To change with `_train`: what it made is cached by it.
_RECIPE = f"byte-level bpe 1, {SAMPLE} characters, tokenizers {tokenizers_version}"
# Any of these holds a vocabulary; all that exist travel with a checkpoint.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
FILES = (
    *_VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "generation_config.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip


def train_or_load(
    documents: Iterable[str], vocab_size: int, cache_dir: Path | None = None, digest: str | None = None
) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, `<|endoftext|>` (id 0) included.

    Encoding and decoding give back any Unicode text exactly. The result depends on the text,
    the size and the recipe only, and is cached by their hash under `cache_dir` (default: the
    user's cache folder). `digest` stands for the hash of the documents where the caller knows
    one: on a hit `documents` is then not even iterated.
    Raises ValueError when `vocab_size` is too small for the 256 bytes and `<|endoftext|>`.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab {vocab_size}: a byte-level tokenizer needs at least 257 (256 bytes and {END})")
    if digest is None:
        documents = list(documents)
        digest = content_hash(*documents)
    name = "tokenizer-" + content_hash(_RECIPE, str(vocab_size), digest)
    return cached(cache_dir or cache_root(), name, lambda: _train(list(documents), vocab_size), save, load)


def _train(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(documents), trainer)
    return tokenizer


def _sample(documents: Sequence[str]) -> Iterable[str]:
    """The documents, or, of more than SAMPLE characters, evenly spaced pieces."""
    total = sum(map(len, documents))
    if total <= SAMPLE:
        return documents
    pieces = [(d, at) for d in documents for at in range(0, len(d), _PIECE)]
    return (d[at : at + _PIECE] for d, at in pieces[:: ceil(total / SAMPLE)])


def has_tokenizer(directory: Path) -> bool:
    """Whether a Hugging Face directory holds a tokenizer."""
    return any((Path(directory) / name).is_file() for name in _VOCABULARIES)


def load(directory: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, truncation and padding switched off.

    Raises FileNotFoundError when the directory has none, ValueError when it cannot be read.
    """
    directory = Path(directory)
    if not has_tokenizer(directory):
        raise FileNotFoundError(f"{directory}: holds no tokenizer (expected one of {', '.join(_VOCABULARIES)})")
    try:
        if (directory / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        else:
            from transformers import AutoTokenizer  # seconds to import, and few directories need it

            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True).backend_tokenizer
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{directory}: the tokenizer cannot be read ({_first_line(error)})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path, source: Path | None = None) -> None:
    """Write the tokenizer so that `transformers.AutoTokenizer` opens `directory`.

    `source` is the Hugging Face directory that the tokenizer was loaded from, if any: its
    files are copied as they are, chat template and all.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if source is not None and has_tokenizer(source):
        for name in FILES:
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, directory / name)
        return
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
    }
    write_json(directory / "tokenizer_config.json", config)


def tokenizer_for(
    directory: Path | None,
    documents: Iterable[str],
    vocab: int,
    cache_dir: Path | None = None,
    digest: str | None = None,
) -> Tokenizer:
    """The directory's own tokenizer if it has one, else one trained on `documents` (see `train_or_load`),
    with the model's `vocab` as its size, 4096 at most.

    Raises ValueError when the tokenizer has ids that the model's vocabulary lacks.
    """
    if directory is None or not has_tokenizer(directory):
        return train_or_load(documents, min(vocab, TRAINED_VOCAB), cache_dir, digest)
    tokenizer = load(directory)
    size = vocab_size(tokenizer)
    if size > vocab:
        raise ValueError(
            f"{directory}: its tokenizer has {size} tokens, but the model's vocabulary only {vocab}: "
            "use the model's own tokenizer, or a model with a larger vocab_size"
        )
    return tokenizer


def vocab_size(tokenizer: Tokenizer) -> int:
    """The number of rows that an embedding needs for this tokenizer: its largest id, plus one."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def eos_ids(tokenizer: Tokenizer, directory: Path | None = None) -> tuple[int, ...]:
    """The ids that end a text. The first one is put between training documents; generation stops at any.

    Named, in this order, by `tokenizer_config.json`, `special_tokens_map.json`,
    `generation_config.json` and `config.json` of the Hugging Face directory, and else `<|endoftext|>`.
    Raises ValueError when there is none.
    """
    found: list[int | None] = []
    if directory is not None:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            token = _json(Path(directory) / name).get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
            found.append(tokenizer.token_to_id(token) if isinstance(token, str) else None)
        for name in ("generation_config.json", "config.json"):
            ids = _json(Path(directory) / name).get("eos_token_id")
            found += ids if isinstance(ids, list) else [ids]
    found = [i for i in found if isinstance(i, int) and tokenizer.id_to_token(i) is not None]
    if not found:
        found = [i for i in [tokenizer.token_to_id(END)] if i is not None]
    if not found:
        where = f"{directory}: the tokenizer" if directory is not None else "the tokenizer"
        raise ValueError(f'{where} names no end-of-text token: add "eos_token" to tokenizer_config.json')
    return tuple(dict.fromkeys(found))


def _json(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

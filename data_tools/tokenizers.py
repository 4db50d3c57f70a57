"""Tokenizers behind one small interface, and the training of a sentencepiece BPE.

Literal special tokens in a text stay text: no document can forge an end-of-document id. That id
is the tokenizer's own and never guessed.
"""

from __future__ import annotations

import base64
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_tools.manifest import (
    DataError,
    TokenizerRecord,
    hash_file,
    printable,
    write_atomically,
)
from data_tools.rows import one_line

END_OF_TEXT = "<|endoftext|>"
_MOST_IDS = 1 << 31
_UTF8_BYTES = {*range(256)} - {0xC0, 0xC1, *range(0xF5, 0x100)}
KNOWN_EOD_TOKENS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")

# How sentencepiece writes a space inside its pieces, and this character's bytes in UTF-8.
_SPACE_MARK = "\u2581"
_SPACE_MARK_PIECES = ("<0xE2>", "<0x96>", "<0x81>")


class TextError(DataError):
    """A text whose ids cannot be had; the message lacks its place."""

    def __init__(self, row: int, reason: str):
        super().__init__(reason)
        self.row = row
        """In the batch."""


class Tokenizer(ABC):
    """Text to ids and back. `vocab_size` bounds every id; `eod_id` ends a document."""

    kind: str
    engine: str
    """The library that computes the ids."""
    vocab_size: int
    eod_id: int
    parse_special = False
    """Whether special tokens written out in a text become their ids."""

    def __init__(self, path: Path):
        self.path = path
        self.fingerprint = hash_file(path)

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, without any added special token. Each int32 [n]."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids."""

    def record(self) -> TokenizerRecord:
        """What the manifest keeps."""
        return TokenizerRecord.model_validate(
            {
                "kind": self.kind,
                "name": self.path.name,
                "fingerprint": self.fingerprint,
                "vocab_size": self.vocab_size,
                "eod_id": self.eod_id,
            }
        )


def load_tokenizer(
    path: str | Path,
    *,
    eod_token: str | None = None,
    threads: int = 0,
    parse_special: bool = False,
) -> Tokenizer:
    """A sentencepiece model, a Hugging Face `tokenizer.json` or a tiktoken encoding, by ending.

    eod_token: the end-of-document token, where the tokenizer does not say which it is.
    threads: of sentencepiece's encoder; 0: one per CPU that this process may use.
    parse_special: let special tokens that are written out in a text become their ids.
    Raises DataError where the file is missing, unreadable, or its end of document unknown.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a .model, a tokenizer.json or a .tiktoken")
    if eod_token is not None and printable(eod_token) != eod_token:
        raise DataError(f"--eod-token {eod_token!a}: not UTF-8; give another")
    tokenizer = _load(path, eod_token, threads or usable_cpus(), parse_special)
    if tokenizer.vocab_size > _MOST_IDS:
        raise DataError(
            f"{path}: its largest id is {tokenizer.vocab_size - 1}, which no int32 holds; give "
            "another file"
        )
    return tokenizer


def _load(path: Path, eod_token: str | None, threads: int, parse_special: bool) -> Tokenizer:
    if path.suffix == ".json":
        return JsonTokenizer(path, eod_token, parse_special)
    if path.suffix == ".tiktoken":
        return TiktokenTokenizer(path, eod_token, parse_special)
    if path.suffix != ".model":
        raise DataError(
            f"{path}: unknown kind of tokenizer; give a .model, a tokenizer.json or a .tiktoken"
        )
    if parse_special:
        raise DataError(
            f"{path}: sentencepiece finds no control tokens in a text; leave out --parse-special"
        )
    return SentencePieceTokenizer(path, eod_token, threads)


def usable_cpus() -> int:
    """CPUs that this process may use, not those of the machine; macOS knows only the latter."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model."""

    kind = engine = "sentencepiece"

    def __init__(self, path: Path, eod_token: str | None, threads: int):
        import sentencepiece

        super().__init__(path)
        self.threads = threads
        content = path.read_bytes()
        if not content:  # taken for no model, which is found out at the first call
            raise DataError(f"{path}: zero bytes; give another file")
        with _reading(path, "a sentencepiece model"):
            self.model = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.vocab_size = self.model.vocab_size()
        self.eod_id = self._find_eod(eod_token)
        self._space_mark_ids = self._find_space_mark()

    def _find_eod(self, eod_token: str | None) -> int:
        if eod_token is None:
            found = self.model.eos_id()
            if found < 0:
                raise DataError(
                    f"{self.path}: the model has no end-of-sentence id; name one: --eod-token"
                )
            return found
        found = self.model.piece_to_id(eod_token)
        if self.model.id_to_piece(found) != eod_token:
            raise DataError(f"{self.path}: no token {eod_token!r}; give another --eod-token")
        return found

    def _find_space_mark(self) -> list[int] | None:
        """Ids of the bytes of a literal U+2581, where encoding in parts changes nothing else.

        sentencepiece itself reads that character as a space. A model without byte pieces cannot
        do better; one with a dummy prefix would put a space before each part.
        """
        ids = [self.model.piece_to_id(piece) for piece in _SPACE_MARK_PIECES]
        adds_prefix = self.model.id_to_piece(self.model.encode("a")[:1])[0].startswith(_SPACE_MARK)
        return ids if all(map(self.model.is_byte, ids)) and not adds_prefix else None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, without any added special token. Each int32 [n]."""
        batch = self.model.encode(list(texts), num_threads=self.threads)
        if self._space_mark_ids is not None:
            for row, text in enumerate(texts):
                if _SPACE_MARK in text:
                    batch[row] = self._encode_around_space_marks(text, self._space_mark_ids)
        return [np.asarray(ids, dtype=np.int32) for ids in batch]

    def _encode_around_space_marks(self, text: str, mark: list[int]) -> list[int]:
        first, *rest = self.model.encode(text.split(_SPACE_MARK))
        return first + [token for part in rest for token in mark + part]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; control tokens such as the end of document have none."""
        return self.model.decode([int(token) for token in ids])


class JsonTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`, read by the `tokenizers` package."""

    kind = "tokenizer.json"
    engine = "tokenizers"

    def __init__(self, path: Path, eod_token: str | None, parse_special: bool = False):
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(
                f"{path}: reading it needs the package `tokenizers`; pip install tokenizers"
            ) from error
        super().__init__(path)
        with _reading(path, "a tokenizer.json"):
            self.model: Any = tokenizers.Tokenizer.from_file(str(path))
        # A tokenizer.json may carry the settings of some training script.
        self.model.no_truncation()
        self.model.no_padding()
        if getattr(self.model.model, "dropout", None):
            self.model.model.dropout = None  # it makes the ids a matter of chance
        self.model.encode_special_tokens = not parse_special
        self.parse_special = parse_special
        self._check_complete()
        ids = self.model.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        self.eod_id = find_special_eod(path, self.model.token_to_id, eod_token)

    def _check_complete(self) -> None:
        """A BPE leaves out, without a word, what it has no token for; others raise at such a text.

        Raises DataError where it has neither an unknown token nor all bytes that UTF-8 uses.
        """
        from tokenizers import models

        bpe = self.model.model
        if not isinstance(bpe, models.BPE) or bpe.unk_token is not None:
            return
        names = [f"<0x{i:02X}>" for i in range(256)] if bpe.byte_fallback else byte_characters()
        known = self.model.get_vocab(with_added_tokens=False)
        if missing := _UTF8_BYTES - {i for i, name in enumerate(names) if name in known}:
            raise DataError(
                f"{self.path}: a BPE without an unknown token that lacks {len(missing)} of UTF-8's "
                "bytes, so it leaves out text; add an unk_token, or give another file"
            )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, without any added special token. Each int32 [n]. Raises TextError."""
        try:
            batch = self.model.encode_batch_fast(list(texts), add_special_tokens=False)
        except BaseException as error:  # a word without an id, say, and no id for the unknown
            if not _is_failure(error):
                raise
            for row, text in enumerate(texts):
                with _encoding(row):
                    self.model.encode_batch_fast([text], add_special_tokens=False)
            raise
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in batch]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens included."""
        return self.model.decode([int(token) for token in ids], skip_special_tokens=False)


class TiktokenTokenizer(Tokenizer):
    """A tiktoken rank file (a token's bytes in base64 and its rank on each line).

    Such a file has neither pattern nor special tokens: FILE.json beside it tells them, as
    {"pattern": REGEX, "special_tokens": {TOKEN: ID}}.
    """

    kind = engine = "tiktoken"

    def __init__(self, path: Path, eod_token: str | None, parse_special: bool = False):
        try:
            import tiktoken
        except ImportError as error:
            raise DataError(
                f"{path}: reading it needs the package tiktoken; pip install 'taid-megatron[data]'"
            ) from error
        super().__init__(path)
        self.parse_special = parse_special
        beside = Path(f"{path}.json")
        if not beside.is_file():
            raise DataError(
                f"{beside}: no such file; write the encoding's pattern and special tokens into it: "
                '{"pattern": REGEX, "special_tokens": {TOKEN: ID}}'
            )
        mend = f'give the rank file, and "pattern" and "special_tokens" in {beside.name}'
        with _reading(path, "a tiktoken encoding", mend):
            settings = json.loads(beside.read_bytes())
            special: dict[str, int] = settings["special_tokens"]
            pairs = [line.split() for line in path.read_bytes().splitlines() if line]
            ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
            if len(ranks) != len(pairs):
                raise ValueError("a token that stands there twice")
            missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
            if missing:
                raise ValueError(f"no token for the byte {missing[0]:#04x}")
            if twice := {*special.values()} & {*ranks.values()}:
                raise ValueError(f"two tokens of the id {min(twice)}")
            self.model = tiktoken.Encoding(
                path.name,
                pat_str=settings["pattern"],
                mergeable_ranks=ranks,
                special_tokens=special,
            )
            find_id = special.get
        both = self.fingerprint + hash_file(beside)
        self.fingerprint = xxhash.xxh3_128_hexdigest(both.encode())
        self.vocab_size = self.model.max_token_value + 1
        self.eod_id = find_special_eod(path, find_id, eod_token)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text. Each int32 [n]. Raises TextError."""
        return [self._encode(text, row) for row, text in enumerate(texts)]

    def _encode(self, text: str, row: int) -> np.ndarray:
        with _encoding(row):  # it panics over a million blanks
            if self.parse_special:
                ids = self.model.encode(text, allowed_special="all")
            else:
                ids = self.model.encode_ordinary(text)
        # What its pattern does not match tiktoken leaves out without a word.
        if self.model.decode_bytes(ids) != text.encode():
            raise TextError(
                row, f'the "pattern" in {self.path.name}.json leaves out some of it; mend that'
            )
        return np.asarray(ids, dtype=np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens included."""
        return self.model.decode([int(token) for token in ids])


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level BPE. Source: GPT-2's encoder.py."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust broke off: its exceptions derive from BaseException."""
    return type(error).__name__ == "PanicException"


def _is_failure(error: BaseException) -> bool:
    """Of a library's own, not of the disk, nor the user's Ctrl-C."""
    return is_panic(error) or (isinstance(error, Exception) and not isinstance(error, OSError))


@contextmanager
def _reading(path: Path, kind: str, mend: str = "give another file") -> Iterator[None]:
    """Raises DataError where what is done in it fails: the libraries raise even bare Exception."""
    try:
        yield
    except BaseException as error:
        if not _is_failure(error):
            raise
        reason = one_line(f"{type(error).__name__}: {error}")[:300]
        raise DataError(f"{path}: not {kind} ({reason}); {mend}") from error


@contextmanager
def _encoding(row: int) -> Iterator[None]:
    """Raises TextError where what is done in it fails."""
    try:
        yield
    except BaseException as error:
        if not _is_failure(error):
            raise
        raise TextError(
            row,
            f"the tokenizer fails at this text ({one_line(error)[-200:]}); cut the text, or give "
            "another tokenizer",
        ) from error


def find_special_eod(
    path: Path, token_to_id: Callable[[str], int | None], eod_token: str | None
) -> int:
    """The id of `eod_token`, or of the one token of KNOWN_EOD_TOKENS that there is."""
    if eod_token is not None:
        found = token_to_id(eod_token)
        if found is None:
            raise DataError(f"{path}: no token {eod_token!r}; give another --eod-token")
        return found
    ids = {token: token_to_id(token) for token in KNOWN_EOD_TOKENS}
    known = {token: found for token, found in ids.items() if found is not None}
    if len(known) != 1:
        raise DataError(
            f"{path}: which token ends a document is not clear (of "
            f"{', '.join(KNOWN_EOD_TOKENS)} it has {', '.join(known) or 'none'}); "
            "name it: --eod-token"
        )
    return next(iter(known.values()))


def train_tokenizer(texts: Iterable[str], out: str | Path, vocab_size: int) -> None:
    """Trains a tokenizer of the kind that the name asks for: `*.model` or `*.json`."""
    trainer_for(out)(texts, out, vocab_size)


def trainer_for(out: str | Path) -> Callable[[Iterable[str], str | Path, int], None]:
    """What trains a tokenizer of that name. Raises DataError where the name tells of none."""
    kinds = {".model": train_sentencepiece, ".json": train_byte_level_bpe}
    train = kinds.get(Path(out).suffix)
    if train is None:
        raise DataError(
            f"{out}: unknown kind of tokenizer; end the name in .model (sentencepiece) or .json "
            "(byte-level BPE)"
        )
    return train


def train_byte_level_bpe(texts: Iterable[str], out: str | Path, vocab_size: int) -> None:
    """Trains a byte-level BPE on `texts` and writes it to `out` (`*.json`).

    Every text round-trips exactly; digits are tokens of their own, as in SmolLM's tokenizer. Id 0
    is `<|endoftext|>`. Raises DataError where the texts do not fill the vocabulary.
    """
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers, trainers

    out = Path(out)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        # Sorted: the package's own order changes from run to run.
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    if model.get_vocab_size() != vocab_size:
        raise DataError(
            f"{out}: {vocab_size} tokens cannot be learned from these texts, but "
            f"{model.get_vocab_size()}; change --vocab-size or give more text"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, model.to_str(pretty=True).encode())


def train_sentencepiece(texts: Iterable[str], out: str | Path, vocab_size: int) -> None:
    """Trains a byte-level-safe sentencepiece BPE on `texts` and writes it to `out` (`*.model`).

    Every text round-trips exactly: no normalisation, whitespace kept, bytes for rare characters.
    Ids: 0 `<|endoftext|>` (a control token: no text encodes to it), 1 `<unk>` (never used), then
    256 bytes. All texts are held in memory: give a sample. The same texts give the same file.
    Raises DataError where the texts do not fill the vocabulary.
    """
    import sentencepiece

    out = Path(out)
    if out.suffix != ".model":
        raise DataError(f"{out}: the name of a sentencepiece model ends in .model; rename it")
    sample = list(texts)
    if not any(sample):
        raise DataError(f"{out}: no text to train on; give inputs that are not empty")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            # Not 1.0: a few thousand rare characters would crowd out words; they become bytes.
            character_coverage=0.9995,
            max_sentence_length=1 << 30,  # longer texts would be left out without a word
            eos_id=0,
            eos_piece=END_OF_TEXT,
            unk_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,  # the number is recorded in the model: one file whatever the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"{out}: {vocab_size} tokens cannot be learned from these texts; change --vocab-size "
            f"or give more text ({one_line(error)})"
        ) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, model.getvalue())

"""A faster library for the ids of a byte-level BPE, used only where it gives the reference's ids.

The reference is the `tokenizers` package, which defines what a tokenizer.json means. tiktoken
computes the same ids several times faster where the file is a byte-level BPE with a pattern that is
known here. Before it is used it has to agree on a sample of the documents, and while it runs one
document in RECHECK_EVERY is computed by both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_tools.manifest import DataError
from data_tools.tokenizers import (
    JsonTokenizer,
    TextError,
    Tokenizer,
    byte_characters,
    is_panic,
)

ENGINES = ("auto", "tokenizers", "tiktoken")
RECHECK_EVERY = 256

# Where byte-level BPEs differ most: spaces before everything, digits, contractions, other scripts.
AWKWARD_TEXTS = (
    "a  b   c\n\n  d\t\te \r\n f ",
    "1 12 123 1234567 ½ ٣٤ x1y22",
    "it's IT'S we'LL they've 'quoted' ''s",
    "漢字かな 한국어 עברית naïve e\u0301 \u0130\u0131ß",
    "😀👩‍👩‍👧 \x00\x01\x7f \u2028\u00a0\u3000 \ufeff",
    "(a)[b]{c} ==!= //* $#@ --- ... 'x' 1's",
    "   ",
    "\n",
    " 1",
    "  1  a",
)

# How these patterns usually end; only this part looks ahead.
_WHITE_SPACE = r"|\s+(?!\S)|\s+"
_GPT2 = r"(?:'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)" + _WHITE_SPACE
# Digits are cut out one by one first, so white space before one ends its fragment.
_GPT2_AFTER_DIGITS = (
    r"(?:'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+)|\s+(?![^\s\p{N}])|\s+"
)

# Under NFC the others stay as they are, in whatever version of Unicode: Latin letters, dashes and
# quotes, Chinese characters.
_NOT_STABLE = re.compile("[^\\0-\u02ff\u2010-\u2027\u4e00-\u9fff]")

# Scripts of which some version of Unicode has digits that another one lacks: the package asks two.
_RARE_DIGITS = re.compile("[\U00010000-\U0001cfff\U0001d800-\U0001efff]")
_BLANKS = 100_000
# Classes that the two libraries' regular expressions fill alike; \w and [:alpha:] are others.
_ALIKE = frozenset("pPsSdDrnt")


class UnsupportedError(Exception):
    """Why tiktoken cannot stand in for a tokenizer."""


class TiktokenEngine:
    """Ids of a tokenizer.json by tiktoken; texts that it cannot do are left to the reference."""

    def __init__(self, reference: JsonTokenizer):
        """Raises UnsupportedError with the reason where the tokenizer is not of a known form."""
        try:
            import tiktoken
        except ImportError as error:
            raise UnsupportedError(
                "the package tiktoken is missing; pip install 'taid-megatron[data]'"
            ) from error
        self.reference = reference
        # As the package writes it: files leave out what it fills in, GPT-2's even the model's type.
        description = json.loads(reference.model.to_str())
        self._normalize = _normalizer(reference, description["normalizer"])
        # Added tokens that the reference finds in a text; whole texts with one go to the reference.
        in_text = [
            token["content"]
            for token in description["added_tokens"]
            if reference.parse_special or not token["special"]
        ]
        forms = {*in_text, *map(self._normalize, in_text)} - {""}
        self._in_text = re.compile("|".join(map(re.escape, forms))) if forms else None
        ranks, self._ids = _ranks(reference, description.pop("model"))
        self._bytes = np.array([*map(len, ranks)])
        pattern = _pattern(description["pre_tokenizer"])
        self._left_out = _RARE_DIGITS if pattern == _GPT2_AFTER_DIGITS else None
        try:
            self._encode = tiktoken.Encoding(
                reference.path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
            ).encode_ordinary
        except ValueError as error:  # the two libraries' regular expressions differ
            raise UnsupportedError(f"a pattern that tiktoken does not read: {pattern}") from error

    def encode(self, text: str) -> np.ndarray:
        """Ids of one text. int32 [n]."""
        ids = self._by_tiktoken(text)
        return self.reference.encode_batch([text])[0] if ids is None else ids

    def _by_tiktoken(self, text: str) -> np.ndarray | None:
        """None for a text that it cannot do."""
        is_rare = self._left_out and not text.isascii() and self._left_out.search(text)
        if is_rare or _is_blank_for_long(text):
            return None
        normalized = self._normalize(text)
        if self._in_text and (self._in_text.search(text) or self._in_text.search(normalized)):
            return None
        try:
            found = self._encode(normalized)
            ranks = np.fromiter(found, dtype=np.intp, count=len(found))
            # What its pattern does not match tiktoken leaves out.
            is_whole = self._bytes[ranks].sum() == len(normalized.encode())
        except BaseException as error:
            # Long blanks, over which it panics, do not get here; others may be too much for it.
            if not is_panic(error) and not isinstance(error, ValueError):
                raise
            return None
        return self._ids[ranks] if is_whole else None


def _is_blank_for_long(text: str) -> bool:
    """Over a run of a million blanks tiktoken panics, with a hundred lines on stderr."""
    # Twice as long a run fills one of these parts; isspace ends at the first other character.
    starts = range(0, len(text) - _BLANKS + 1, _BLANKS)
    return any(text[start : start + _BLANKS].isspace() for start in starts)


class CheckedTokenizer(Tokenizer):
    """A tokenizer.json encoded by tiktoken, every so often by the reference too."""

    kind = "tokenizer.json"
    engine = "tiktoken"

    def __init__(self, reference: JsonTokenizer):
        """Raises UnsupportedError where tiktoken cannot stand in."""
        self.reference = reference
        self.path, self.fingerprint = reference.path, reference.fingerprint
        self.vocab_size, self.eod_id = reference.vocab_size, reference.eod_id
        self.parse_special = reference.parse_special
        self._engine = TiktokenEngine(reference)
        # From the operating system: other documents are re-checked in each process and run.
        self._random = np.random.default_rng()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text. Raises TextError where a re-checked one differs."""
        batch = [self._engine.encode(text) for text in texts]
        for row in np.flatnonzero(self._random.random(len(texts)) < 1 / RECHECK_EVERY).tolist():
            if not np.array_equal(self.reference.encode_batch([texts[row]])[0], batch[row]):
                raise TextError(
                    row,
                    f"tiktoken and tokenizers give different ids by {self.path} for this text; "
                    "start over with --engine tokenizers --restart",
                )
        return batch

    def decode(self, ids: Sequence[int]) -> str:
        """As the reference."""
        return self.reference.decode(ids)


def choose_engine(
    tokenizer: Tokenizer, engine: str, sample: Callable[[], Sequence[str]]
) -> tuple[Tokenizer, str]:
    """(the tokenizer to use, one line that says why).

    engine: one of ENGINES; "auto" takes tiktoken where it can stand in and agrees on all of
    `sample` and of AWKWARD_TEXTS. Raises DataError where tiktoken was asked for and cannot.
    """
    if engine not in ENGINES:
        raise DataError(f"engine {engine!r}; choose one of {', '.join(ENGINES)}")
    if engine == "tokenizers" or not isinstance(tokenizer, JsonTokenizer):
        return tokenizer, f"engine: {tokenizer.engine}"
    try:
        checked = CheckedTokenizer(tokenizer)
        texts = [*AWKWARD_TEXTS, *sample()]
        _compare(tokenizer, checked, texts)
    except (UnsupportedError, TextError) as reason:
        if engine == "tiktoken":
            raise DataError(f"{tokenizer.path}: {reason}; give --engine tokenizers") from reason
        return tokenizer, f"engine: {tokenizer.engine}, for tiktoken cannot stand in ({reason})"
    return checked, f"engine: tiktoken, gave the ids of tokenizers on {len(texts)} texts"


def _compare(reference: JsonTokenizer, checked: CheckedTokenizer, texts: Sequence[str]) -> None:
    for text in texts:
        if not np.array_equal(reference.encode_batch([text])[0], checked._engine.encode(text)):
            raise UnsupportedError(f"its ids differ for a text that begins {text[:40]!r}")


def _normalizer(reference: JsonTokenizer, description: Any) -> Callable[[str], str]:
    """The reference's own: Python's unicodedata is of another version of Unicode."""
    if description is None:
        return lambda text: text
    normalize: Callable[[str], str] = reference.model.normalizer.normalize_str
    if description != {"type": "NFC"}:
        return normalize
    # 28 MB a second; most texts can do without.
    return lambda text: normalize(text) if _NOT_STABLE.search(text) else text


def _ranks(reference: JsonTokenizer, model: dict[str, Any]) -> tuple[dict[bytes, int], np.ndarray]:
    """(rank of each token's bytes, ids by rank).

    tiktoken joins the pair whose result has the lowest rank: ranks follow the merges' order, with
    the single bytes in front. A token that the merges do not make out of its own bytes they make
    nowhere, for what happens between its ends does not depend on what stands around it: it is left
    out. With all others both do the same.
    """
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise UnsupportedError("not a plain BPE")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UnsupportedError("a BPE with prefixes or suffixes")
    to_byte = {character: byte for byte, character in enumerate(byte_characters())}
    vocab: dict[str, int] = model["vocab"]
    merged = ["".join(merge) for merge in model["merges"]]
    if any(token not in vocab for token in to_byte):
        raise UnsupportedError("a vocabulary without all bytes")
    if len(set(merged)) != len(merged):  # several ways to one token: a file made from ranks
        if merged != sorted(merged, key=vocab.__getitem__):
            raise UnsupportedError("merges into one token that do not stand together")
        merged = list(dict.fromkeys(merged))
    made = _made_by_merges(reference, model)
    if model["ignore_merges"] and len(made) + len(to_byte) < len(vocab):
        raise UnsupportedError("a vocabulary with tokens that no merge makes")
    order = [*to_byte, *(token for token in merged if token in made)]
    latin = str.maketrans({character: chr(byte) for character, byte in to_byte.items()})
    ranks = {token.translate(latin).encode("latin-1"): i for i, token in enumerate(order)}
    return ranks, np.array([vocab[token] for token in order], dtype=np.int32)


def _made_by_merges(reference: JsonTokenizer, model: dict[str, Any]) -> set[str]:
    """The merged tokens that the reference makes out of their own characters."""
    bpe = reference.model.model
    if model["ignore_merges"]:
        import tokenizers

        merges = json.dumps({"model": {**model, "ignore_merges": False}})
        bpe = tokenizers.Tokenizer.from_str(merges).model
    return {token for token in map("".join, model["merges"]) if len(bpe.tokenize(token)) == 1}


def _pattern(description: dict[str, Any] | None) -> str:
    """The pre-tokenizer as one regular expression."""
    if description is None:
        raise UnsupportedError("no pre-tokenizer")
    steps = description["pretokenizers"] if description["type"] == "Sequence" else [description]
    if not steps:
        raise UnsupportedError("no pre-tokenizer")
    *before, last = steps
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        raise UnsupportedError("a pre-tokenizer that is not byte-level, or adds a space")
    if last.get("use_regex", True):
        if not before:
            return _GPT2
        if [step["type"] for step in before] == ["Digits"] and before[0]["individual_digits"]:
            return _GPT2_AFTER_DIGITS
    elif [step["type"] for step in before] == ["Split"]:
        (split,) = before
        pattern = split["pattern"].get("Regex")
        if pattern and split["behavior"] == "Isolated" and not split["invert"]:
            _check_alike(pattern)
            return _grouped(pattern)
    raise UnsupportedError("a pre-tokenizer of another form")


def _check_alike(pattern: str) -> None:
    escapes = re.findall(r"\\(.)", pattern)
    others = sorted({letter for letter in escapes if letter.isalnum()} - _ALIKE)
    if others or "[:" in pattern:
        name = f"\\{others[0]}" if others else "[:"
        raise UnsupportedError(f"a pattern with {name}, of which tiktoken makes something else")


def _grouped(pattern: str) -> str:
    """The same pattern, its alternatives before those for white space in one group.

    tiktoken's regex engine matches a group that does not look around by an automaton, and steps
    through alternatives of which any does: 1.6 times the time for whole documents.
    """
    before = pattern.removesuffix(_WHITE_SPACE)
    if before == pattern or before.endswith("\\"):
        return pattern
    return f"(?:{before}){_WHITE_SPACE}"

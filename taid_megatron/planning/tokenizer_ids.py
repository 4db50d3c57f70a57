"""Do token ids mean the same: the data's tokenizer against those that come with the models.

Read as JSON and compared by id; no tokenizer library is needed. Equal files need no look inside.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from data_tools.manifest import hash_file

_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class TokenizerFile:
    """A file with a tokenizer."""

    path: Path
    fingerprint: str
    """xxh3-128 of the file, as the data's manifests have it."""

    def ids(self) -> dict[int, str] | None:
        """Token by id, added tokens left out; None for what is not a tokenizer.json."""
        if self.path.suffix != ".json":
            return None
        try:
            vocabulary = json.loads(self.path.read_text(encoding="utf-8"))["model"]["vocab"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if isinstance(vocabulary, dict):
            return {number: token for token, number in vocabulary.items()}
        return {number: token for number, (token, *_) in enumerate(vocabulary)}


def find(folder: Path) -> list[TokenizerFile]:
    """Those in a Hugging Face folder."""
    there = [folder / name for name in _FILES if (folder / name).is_file()]
    return [TokenizerFile(path, hash_file(path)) for path in there]


def difference(own: TokenizerFile, other: TokenizerFile) -> str | None:
    """The first id that means something else, in words; '' where none does; None: not known."""
    mine, theirs = own.ids(), other.ids()
    if mine is None or theirs is None:
        return None
    different = sorted(n for n in mine.keys() & theirs.keys() if mine[n] != theirs[n])
    if not different:
        return ""
    first = different[0]
    return (
        f"{len(different):,} ids differ, id {first} is {mine[first]!r} in {own.path} and "
        f"{theirs[first]!r} in {other.path}"
    )

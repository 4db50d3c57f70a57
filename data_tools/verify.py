"""Whether prepared files are whole, are what their manifest describes, and can be trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_tools.manifest import (
    CHUNK_ROWS,
    DataError,
    IndexedFiles,
    Manifest,
    bin_path,
    check_content,
    check_counts,
    check_indexed,
    hash_file,
    idx_path,
    map_blocks,
    read_manifest,
)
from data_tools.tokenizers import Tokenizer

_BLOCK_TOKENS = 1 << 19


@dataclass(frozen=True)
class Verdict:
    """What was found good; what is not raises."""

    files: IndexedFiles
    manifest: Manifest | None
    checked: list[str]
    """In words, in order."""
    unchecked: list[str]
    """What there was nothing to check against."""


def verify(
    prefix: str | Path, *, fast: bool = False, tokenizer: Tokenizer | None = None
) -> Verdict:
    """Checks the files and raises DataError naming the first that is wrong.

    fast: headers, sizes, the ends of the tables and the manifest's counts, in constant time. Else
    also every row of the index, both hashes, that each id is one of the vocabulary, and that the
    end-of-document id stands at each document's end and nowhere else; both files are read once.
    tokenizer: has to be the one that made the data; stands in for a missing manifest.
    """
    files = check_indexed(prefix, deep=not fast)
    manifest = read_manifest(prefix)
    checked = ["structure"] if fast else ["structure", "index"]
    unchecked = []
    if manifest:
        check_counts(files, manifest)
        for path, record in zip(_outputs(prefix), manifest.outputs, strict=True):
            check_content(path, record)
        checked += ["counts", "sizes"]
    else:
        unchecked += ["counts, sizes and hashes (there is no manifest)"]
    if tokenizer and manifest:
        check_same_tokenizer(prefix, manifest, tokenizer)
        checked += ["tokenizer"]
    if not fast:
        vocab_size, eod_id, is_exact = _expected(manifest, tokenizer)
        _read_tokens(files, manifest, vocab_size, eod_id, is_exact)
        checked += ["hashes"] if manifest else []
        known = {"ids in the vocabulary": vocab_size, "ends of documents": eod_id}
        checked += [name for name, value in known.items() if value is not None]
        unchecked += [name for name, value in known.items() if value is None]
    return Verdict(files, manifest, checked, unchecked)


def check_same_tokenizer(prefix: str | Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Raises DataError where `prefix` was made by another tokenizer."""
    if tokenizer.fingerprint != manifest.tokenizer.fingerprint:
        raise DataError(
            f"{tokenizer.path}: not the tokenizer that made {prefix} ({manifest.tokenizer.name}, "
            f"xxh3 {manifest.tokenizer.fingerprint}); give that one"
        )


def _outputs(prefix: str | Path) -> tuple[Path, Path]:
    return bin_path(prefix), idx_path(prefix)


def _expected(
    manifest: Manifest | None, tokenizer: Tokenizer | None
) -> tuple[int | None, int | None, bool]:
    """(vocabulary, end-of-document id, whether that stands nowhere else), as far as known."""
    if manifest:
        made_by, options = manifest.tokenizer, manifest.options
        eod_id = made_by.eod_id if options.append_eod else None
        return made_by.vocab_size, eod_id, not options.parse_special
    if tokenizer:
        return tokenizer.vocab_size, tokenizer.eod_id, True
    return None, None, False


def _read_tokens(
    files: IndexedFiles,
    manifest: Manifest | None,
    vocab_size: int | None,
    eod_id: int | None,
    is_exact: bool,
) -> None:
    """One pass over PREFIX.bin, then the hashes of both files."""
    data, index = _outputs(files.prefix)
    digest = xxhash.xxh3_128()
    ends = _Ends(files) if eod_id is not None else None
    buffer = np.empty(_BLOCK_TOKENS, dtype=bool)  # once: a new one per block costs more than ==
    position = 0
    for block in map_blocks(data, _BLOCK_TOKENS * files.dtype.itemsize):
        digest.update(block)
        tokens = np.frombuffer(block, files.dtype)
        if vocab_size is not None:
            _check_ids(data, tokens, position, vocab_size)
        if ends is not None and eod_id is not None:
            is_end = np.equal(tokens, eod_id, out=buffer[: tokens.size])
            expected = ends.before(position + tokens.size) - position
            _check_ends(data, is_end, expected, position, is_exact)
        position += tokens.size
    if manifest:
        found = (digest.hexdigest(), hash_file(index))
        for path, record, xxh3 in zip((data, index), manifest.outputs, found, strict=True):
            check_content(path, record, xxh3)


def _check_ids(data: Path, tokens: np.ndarray, position: int, vocab_size: int) -> None:
    high = int(tokens.max())
    low = 0 if tokens.dtype.kind == "u" else int(tokens.min())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        where = position + int((tokens == wrong).argmax())
        raise DataError(
            f"{data}: token {where} has id {wrong}, outside the vocabulary of {vocab_size}; copy "
            "the file again or prepare the data again"
        )


def _check_ends(
    data: Path, is_end: np.ndarray, expected: np.ndarray, position: int, is_exact: bool
) -> None:
    # Of a document without a token, the last one is that of the document before it, or -1.
    empty = np.flatnonzero(np.diff(expected, prepend=-1) == 0)
    if empty.size:
        raise DataError(
            f"{data}: a document without a token, and so without the end-of-document id, before "
            f"token {position + int(expected[empty[0]]) + 1}; prepare the data again"
        )
    if not is_end[expected].all():
        where = position + int(expected[~is_end[expected]][0])
        raise DataError(
            f"{data}: token {where} ends a document and is not the end-of-document id; copy both "
            "files again or prepare the data again"
        )
    if is_exact and np.count_nonzero(is_end) != expected.size:
        is_end[expected] = False
        raise DataError(
            f"{data}: token {position + int(is_end.argmax())} is the end-of-document id within a "
            "document; prepare the data again"
        )


class _Ends:
    """Positions of the documents' last tokens, in order, read piece by piece."""

    def __init__(self, files: IndexedFiles):
        self._pieces = _document_ends(files)
        self._known = np.empty(0, dtype=np.int64)

    def before(self, position: int) -> np.ndarray:
        """Those below `position` that were not given before."""
        taken = []
        while True:
            count = int(np.searchsorted(self._known, position))
            taken.append(self._known[:count])
            self._known = self._known[count:]
            if self._known.size:
                break
            following = next(self._pieces, None)
            if following is None:
                break
            self._known = following
        return np.concatenate(taken)


def _document_ends(files: IndexedFiles) -> Iterator[np.ndarray]:
    pointers, documents = files.sequence_pointers(), files.document_indices()
    for first in range(0, files.num_documents, CHUNK_ROWS):
        ends = documents[first + 1 : first + 1 + CHUNK_ROWS]
        inside = np.minimum(ends, files.num_sequences - 1)
        after = np.where(ends < files.num_sequences, pointers[inside] // files.dtype.itemsize, 0)
        after[ends == files.num_sequences] = files.num_tokens
        yield after - 1

"""Writes PREFIX.bin and PREFIX.idx as megatron-core's IndexedDatasetBuilder does, byte for byte.

What differs is the cost: the tables are spooled to disk while the documents come in and the
pointers are computed by pieces that stay in the processor's cache, so memory does not grow with the
corpus (the builder keeps 95 to 141 bytes per document and loops over them in Python).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import xxhash

from data_tools.manifest import (
    HEADER,
    MAGIC,
    TOKEN_DTYPES,
    VERSION,
    WRITE_BYTES,
    DataError,
    FileRecord,
    Manifest,
    bin_path,
    idx_path,
    manifest_path,
    sync_path,
    temporary_name,
)

MOST_TOKENS_PER_SEQUENCE = np.iinfo(np.int32).max

# Rows of the index computed at once: 512 KiB of int64 are written from the processor's cache.
TABLE_ROWS = 1 << 16


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 below 65,500 ids, else int32. Source: megatron-core's DType.optimal_dtype."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


class IndexedWriter:
    """Takes documents; `finish` makes them appear under their names, all or nothing.

    Where several prefixes are to appear together, or with a manifest: `complete` all, `describe`
    them, then `publish` all. A context manager: leaving it before, by an exception or not, removes
    the temporary files and leaves earlier outputs of the same prefix as they were.
    """

    def __init__(
        self,
        prefix: str | Path,
        vocab_size: int,
        dtype: np.dtype | None = None,
        write_bytes: int = WRITE_BYTES,
    ):
        """`dtype`: of the tokens, where it is not the one that the vocabulary asks for.

        write_bytes: tokens are written in such blocks, larger pieces as they come.
        Raises DataError where a file of that name cannot be.
        """
        check_free(prefix)
        self.prefix = str(prefix)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size) if dtype is None else dtype
        self.num_documents = 0
        self.num_sequences = 0
        self.num_tokens = 0
        folder = bin_path(prefix).parent
        folder.mkdir(parents=True, exist_ok=True)
        self._lengths = _spool(folder)
        # From the first document on that is not one sequence; before, they are counted.
        self._documents: BinaryIO | None = None
        self._data = HashedFile(bin_path(prefix), write_bytes)
        self._files = [self._data]  # in the order in which they take their names

    @property
    def digest(self) -> xxhash.xxh3_128:
        """Of the tokens so far; for reading."""
        return self._data.digest

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files:
            file.discard()
        for spool in (self._lengths, self._documents):
            with suppress(OSError):  # a full disk fails here once more
                if spool:
                    spool.close()

    def add_document(
        self, tokens: np.ndarray, *, name: str, lengths: Sequence[int] | None = None
    ) -> None:
        """Appends one document.

        tokens: integers [n], 0 <= id < vocab_size. lengths: how the document is cut into
        sequences (default: one sequence of n); their sum is n. name: for error messages.
        Raises DataError naming the document where an id or a length does not fit.
        """
        if lengths is None:
            lengths = (tokens.size,)
        self._check(tokens, lengths, name)
        self.add_tokens(tokens.astype(self.dtype, copy=False).data)
        self.add_tables(np.asarray(lengths, dtype=np.int32), np.array([len(lengths)]))

    def add_tokens(self, tokens: bytes | memoryview) -> None:
        """Appends checked token bytes; `add_tables` tells how they are cut."""
        self._data.write(tokens)

    def add_tables(self, lengths: np.ndarray, sequences: np.ndarray) -> None:
        """Cuts the tokens added since: int32 [S] tokens per sequence, [D] sequences per document.

        S is the sum of `sequences`.
        """
        if self._documents is None and (sequences != 1).any():
            self._documents = _spool(bin_path(self.prefix).parent)
            for piece in _one_by_one(self.num_documents):
                self._documents.write(piece.data)
        if self._documents:
            ends = self.num_sequences + np.cumsum(sequences, dtype=np.int64)
            self._documents.write(ends.data)
        self._lengths.write(np.ascontiguousarray(lengths, dtype=np.int32).data)
        self.num_documents += sequences.size
        self.num_sequences += lengths.size
        self.num_tokens += int(lengths.sum(dtype=np.int64))

    def _check(self, tokens: np.ndarray, lengths: Sequence[int], name: str) -> None:
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise DataError(f"{name}: tokens are {tokens.dtype} {tokens.shape}, not integers [n]")
        if sum(lengths) != tokens.size or min(lengths, default=0) < 0:
            raise DataError(f"{name}: sequences of {list(lengths)} for {tokens.size} tokens")
        if max(lengths, default=0) > MOST_TOKENS_PER_SEQUENCE:
            raise DataError(f"{name}: {tokens.size} tokens do not fit one sequence; cut it")
        if tokens.size:
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.vocab_size:
                raise DataError(
                    f"{name}: token id {low if low < 0 else high} lies outside the vocabulary of "
                    f"{self.vocab_size}; give the vocabulary size of the tokenizer that made it"
                )

    def finish(self) -> list[FileRecord]:
        """`complete` and `publish`, without a manifest. The records of both files."""
        records = self.complete()
        self.publish()
        return records

    def complete(self) -> list[FileRecord]:
        """Writes the index; both files reach the disk under temporary names. Their records."""
        index = HashedFile(idx_path(self.prefix))
        self._files.append(index)
        write_index(
            index.write,
            self.dtype,
            self.num_sequences,
            self.num_documents,
            lambda: read_table(self._lengths, np.int32),
            read_table(self._documents, np.int64) if self._documents else None,
        )
        return [self._data.close(), index.close()]

    def describe(self, manifest: Manifest) -> None:
        """Has `manifest` reach the disk, to be published with the files; after `complete`."""
        # Before the index: without that nothing is read, so a kill leaves no data undescribed.
        self._files.insert(1, HashedFile(manifest_path(self.prefix)))
        self._files[1].write(manifest.stored())
        self._files[1].close()

    def publish(self) -> None:
        """Renames the files; after `complete`.

        The former index and manifest of the prefix go first, and the new index comes last, so that
        a power cut in between leaves an index missing rather than one that belongs to other data.
        """
        remove_published(self.prefix)
        for file in self._files:
            file.publish()
        sync_path(bin_path(self.prefix).parent)


def write_index(
    write: Callable[[bytes | memoryview], object],
    dtype: np.dtype,
    num_sequences: int,
    num_documents: int,
    lengths: Callable[[], Iterable[np.ndarray]],
    document_ends: Iterable[np.ndarray] | None = None,
) -> None:
    """Hands PREFIX.idx to `write`, piece by piece, from the lengths alone; memory is constant.

    lengths: called twice; int32 pieces of the tokens in each sequence. document_ends: int64 pieces
    of the sequences up to each document's end; None: each sequence is a document. A piece has
    TABLE_ROWS rows at most, and may be overwritten once the next one is asked for.
    """
    code = next(code for code, known in TOKEN_DTYPES.items() if known == dtype)
    write(HEADER.pack(MAGIC, VERSION, code, num_sequences, num_documents + 1))
    for piece in lengths():
        write(piece.data)
    # int64 before the product: a shard may hold more than 2^31 tokens and bytes.
    pointers = np.zeros(TABLE_ROWS + 1, dtype=np.int64)
    for piece in lengths():
        ends = pointers[1 : piece.size + 1]
        np.multiply(piece, dtype.itemsize, out=ends, dtype=np.int64)
        ends[0] += pointers[0]
        np.cumsum(ends, out=ends)
        write(pointers[: piece.size].data)
        pointers[0] = ends[-1]
    write(bytes(8))
    for piece in _one_by_one(num_documents) if document_ends is None else document_ends:
        write(piece.data)


def _one_by_one(documents: int) -> Iterator[np.ndarray]:
    """1, 2, ... `documents`, in one array that each step overwrites."""
    steps, ends = np.arange(1, TABLE_ROWS + 1), np.empty(TABLE_ROWS, dtype=np.int64)
    for first in range(0, documents, TABLE_ROWS):
        yield np.add(steps, first, out=ends)[: documents - first]


def read_table(stream: BinaryIO, dtype: type) -> Iterator[np.ndarray]:
    """A spooled table from its start, in one array that each step overwrites."""
    rows: np.ndarray = np.empty(TABLE_ROWS, dtype=dtype)
    stream.seek(0)
    while size := stream.readinto(rows.data):  # type: ignore[attr-defined]
        yield rows[: size // rows.itemsize]


def _spool(folder: Path) -> BinaryIO:
    """Unlinked at birth: it vanishes with the process, however that ends."""
    return tempfile.TemporaryFile(dir=folder)  # type: ignore[return-value]


def check_free(prefix: str | Path) -> None:
    """Raises DataError where a folder has the name of a file of PREFIX, or a file of its folder."""
    for path in (bin_path(prefix), idx_path(prefix), manifest_path(prefix)):
        if path.is_dir():
            raise DataError(f"{path}: is a folder; give another --out")
    folder = bin_path(prefix).parent
    above = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if above.exists() and not above.is_dir():
        raise DataError(f"{above}: is a file, where a folder should be; give another --out")


def remove_published(prefix: str | Path) -> None:
    """Takes away what would describe a .bin that is about to be replaced."""
    manifest_path(prefix).unlink(missing_ok=True)
    idx_path(prefix).unlink(missing_ok=True)


class HashedFile:
    """A file under a temporary name, hashed while it is written."""

    def __init__(self, path: Path, buffer_bytes: int = 1 << 17):
        """Pieces above `buffer_bytes` are written without another copy."""
        self.path = path
        self.temporary = temporary_name(path)
        self.digest = xxhash.xxh3_128()
        self.stream = self.temporary.open("wb", buffering=buffer_bytes)

    def write(self, content: bytes | memoryview) -> None:
        """Appends and hashes."""
        self.digest.update(content)
        self.stream.write(content)

    def close(self) -> FileRecord:
        """Reaches the disk; `publish` may follow."""
        size = self.stream.tell()
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        return FileRecord(name=self.path.name, bytes=size, xxh3=self.digest.hexdigest())

    def publish(self) -> None:
        """Takes the final name; after `close`."""
        self.temporary.replace(self.path)

    def discard(self) -> None:
        """Removes what was not published; harmless after `publish`."""
        self.temporary.unlink(missing_ok=True)
        with suppress(OSError):  # a full disk fails here once more, over what is gone already
            self.stream.close()

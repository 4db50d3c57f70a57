"""Writes PREFIX.bin and PREFIX.idx as megatron-core's IndexedDatasetBuilder does, byte for byte.

What differs is the cost: the tables are spooled to disk while the documents come in and the
pointers are computed a million at a time, so memory does not grow with the corpus (the builder
keeps 95 to 141 bytes per document and loops over them in Python).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import xxhash

from data_tools.manifest import (
    CHUNK_ROWS,
    HEADER,
    MAGIC,
    TOKEN_DTYPES,
    VERSION,
    DataError,
    FileRecord,
    bin_path,
    idx_path,
    manifest_path,
    sync_folder,
    temporary_name,
)

_MOST_TOKENS_PER_SEQUENCE = np.iinfo(np.int32).max


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 below 65,500 ids, else int32. Source: megatron-core's DType.optimal_dtype."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


class IndexedWriter:
    """Takes documents one by one; `finish` makes them appear under their names, all or nothing.

    A context manager: leaving it without `finish`, by an exception or not, removes the temporary
    files and leaves earlier outputs of the same prefix as they were.
    """

    def __init__(self, prefix: str | Path, vocab_size: int):
        self.prefix = str(prefix)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.num_documents = 0
        self.num_sequences = 0
        self.num_tokens = 0
        folder = bin_path(prefix).parent
        folder.mkdir(parents=True, exist_ok=True)
        self._data = _HashedFile(bin_path(prefix))
        # Unlinked at birth: they vanish with the process, however it ends.
        self._lengths: BinaryIO = tempfile.TemporaryFile(dir=folder)  # type: ignore[assignment]
        self._documents: BinaryIO = tempfile.TemporaryFile(dir=folder)  # type: ignore[assignment]

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._data.discard()
        self._lengths.close()
        self._documents.close()

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
        self._data.write(tokens.astype(self.dtype, copy=False).tobytes())
        self.num_documents += 1
        self.num_sequences += len(lengths)
        self.num_tokens += tokens.size
        self._lengths.write(np.asarray(lengths, dtype=np.int32).tobytes())
        self._documents.write(np.int64(self.num_sequences).tobytes())

    def _check(self, tokens: np.ndarray, lengths: Sequence[int], name: str) -> None:
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise DataError(f"{name}: tokens are {tokens.dtype} {tokens.shape}, not integers [n]")
        if sum(lengths) != tokens.size or min(lengths, default=0) < 0:
            raise DataError(f"{name}: sequences of {list(lengths)} for {tokens.size} tokens")
        if max(lengths, default=0) > _MOST_TOKENS_PER_SEQUENCE:
            raise DataError(f"{name}: {tokens.size} tokens do not fit one sequence; cut it")
        if tokens.size:
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.vocab_size:
                raise DataError(
                    f"{name}: token id {low if low < 0 else high} lies outside the vocabulary of "
                    f"{self.vocab_size}; give the vocabulary size of the tokenizer that made it"
                )

    def finish(self) -> list[FileRecord]:
        """Writes the index, syncs both files, then renames them: first .bin, then .idx.

        Returns the records of both. The prefix' former .manifest.json and .idx go first, so that
        a power cut in between leaves an index missing rather than one that belongs to other data.
        """
        index = _HashedFile(idx_path(self.prefix))
        try:
            self._write_index(index)
            records = [self._data.close(), index.close()]
            manifest_path(self.prefix).unlink(missing_ok=True)
            idx_path(self.prefix).unlink(missing_ok=True)
            self._data.publish()
            index.publish()
        finally:
            index.discard()
        sync_folder(bin_path(self.prefix).parent)
        return records

    def _write_index(self, index: _HashedFile) -> None:
        code = next(code for code, dtype in TOKEN_DTYPES.items() if dtype == self.dtype)
        index.write(HEADER.pack(MAGIC, VERSION, code, self.num_sequences, self.num_documents + 1))
        for lengths in _chunks(self._lengths, np.int32):
            index.write(lengths.tobytes())
        position = 0
        for lengths in _chunks(self._lengths, np.int32):
            ends = position + np.cumsum(lengths.astype(np.int64) * self.dtype.itemsize)
            index.write(np.concatenate(([position], ends[:-1])).astype(np.int64).tobytes())
            position = int(ends[-1])
        index.write(np.int64(0).tobytes())
        for documents in _chunks(self._documents, np.int64):
            index.write(documents.tobytes())


def _chunks(spool: BinaryIO, dtype: type) -> Iterator[np.ndarray]:
    """The spooled table from its start, CHUNK_ROWS rows at a time."""
    spool.seek(0)
    while raw := spool.read(CHUNK_ROWS * np.dtype(dtype).itemsize):
        yield np.frombuffer(raw, dtype=dtype)


class _HashedFile:
    """A file under a temporary name, hashed while it is written."""

    def __init__(self, path: Path):
        self.path = path
        self.temporary = temporary_name(path)
        self.digest = xxhash.xxh3_128()
        self.stream = self.temporary.open("wb", buffering=1 << 20)

    def write(self, content: bytes) -> None:
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
        self.temporary.replace(self.path)

    def discard(self) -> None:
        """Removes what was not published; harmless after `publish`."""
        self.stream.close()
        self.temporary.unlink(missing_ok=True)

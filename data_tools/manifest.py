"""What prepared data looks like on disk: PREFIX.bin, PREFIX.idx and PREFIX.manifest.json.

The one module that the data tools and the trainer share; it imports neither torch nor megatron.

PREFIX.bin holds the token ids of all sequences, one after the other, without a header.
PREFIX.idx describes it (little-endian; source: megatron-core 0.16, datasets/indexed_dataset.py):

    offset  0   9 bytes   magic, b"MMIDIDX\\0\\0"
    offset  9   uint64    version, 1
    offset 17   uint8     code of the token type, see TOKEN_DTYPES
    offset 18   uint64    S, number of sequences
    offset 26   uint64    D, number of entries in the document table (documents + 1)
    offset 34   int32[S]  tokens in each sequence
                int64[S]  byte offset of each sequence in PREFIX.bin
                int64[D]  first sequence of each document, then S
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import xxhash
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TOKEN_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    8: np.dtype(np.uint16),
}

# Tokens are written in such blocks: Linux caches a file in pieces as large as it was written, and
# maps those of 2 MiB at one stroke, so that reading them back costs little more than memory does.
WRITE_BYTES = 4 << 20

# Rows of the index handled at once: 8 MiB of int64, whatever the corpus' size.
CHUNK_ROWS = 1 << 20

# Rows that were left out, of which a manifest has the first.
MOST_LISTED = 1000


class DataError(ValueError):
    """Bad input: the message is one line that names the file (and row), the fault and the mend."""


def bin_path(prefix: str | Path) -> Path:
    """PREFIX.bin. Appends: a prefix may hold dots of its own."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """PREFIX.idx."""
    return Path(f"{prefix}.idx")


def manifest_path(prefix: str | Path) -> Path:
    """PREFIX.manifest.json."""
    return Path(f"{prefix}.manifest.json")


# ---------------------------------------------------------------------------------------------
# PREFIX.bin and PREFIX.idx
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IndexedFiles:
    """A checked PREFIX.bin / PREFIX.idx pair; the arrays are memory-mapped at each call."""

    prefix: str
    dtype: np.dtype[Any]
    num_sequences: int
    num_documents: int
    num_tokens: int

    def sequence_lengths(self) -> np.ndarray:
        """Tokens in each sequence. int32 [num_sequences]."""
        return self._table(np.int32, HEADER.size, self.num_sequences)

    def sequence_pointers(self) -> np.ndarray:
        """Byte offset of each sequence in PREFIX.bin. int64 [num_sequences]."""
        return self._table(np.int64, HEADER.size + 4 * self.num_sequences, self.num_sequences)

    def document_indices(self) -> np.ndarray:
        """First sequence of each document, then num_sequences. int64 [num_documents + 1]."""
        offset = HEADER.size + 12 * self.num_sequences
        return self._table(np.int64, offset, self.num_documents + 1)

    def document(self, number: int) -> np.ndarray:
        """Token ids of document `number`, counted from 0. [tokens of the document]."""
        first, end = self.document_indices()[number : number + 2]
        if first == end:
            return np.empty(0, dtype=self.dtype)
        num_tokens = int(self.sequence_lengths()[first:end].sum(dtype=np.int64))
        offset = int(self.sequence_pointers()[first])
        return np.fromfile(bin_path(self.prefix), self.dtype, count=num_tokens, offset=offset)

    def _table(self, dtype: type, offset: int, rows: int) -> np.ndarray:
        if rows == 0:  # a memory map cannot be empty
            return np.empty(0, dtype=dtype)
        return np.memmap(idx_path(self.prefix), dtype, mode="r", offset=offset, shape=(rows,))


def check_indexed(prefix: str | Path, *, deep: bool = False) -> IndexedFiles:
    """Whether PREFIX.bin and PREFIX.idx exist and fit together.

    Plain: the header, both files' lengths and the ends of the tables, in constant time.
    `deep`: every row of the tables too, reading the whole index in bounded memory.
    Raises DataError naming the file, the fault and the mend.
    """
    data, index = bin_path(prefix), idx_path(prefix)
    for path in (data, index):
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; give the prefix without .bin or .idx, or prepare the "
                "data with `taid-data prepare`"
            )
    files = _read_header(prefix)
    documents = files.document_indices()
    if documents[0] != 0 or documents[-1] != files.num_sequences:
        raise _damaged(index, "its document table does not span its sequences")
    end = 0
    if files.num_sequences:
        end = int(files.sequence_pointers()[-1])
        end += int(files.sequence_lengths()[-1]) * files.dtype.itemsize
    if end != data.stat().st_size:
        raise _damaged(data, f"{data.stat().st_size} bytes where {index.name} describes {end}")
    if deep:
        _check_tables(files)
    return files


def _read_header(prefix: str | Path) -> IndexedFiles:
    index = idx_path(prefix)
    with index.open("rb") as stream:
        head = stream.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise _damaged(index, "not a Megatron index (its first bytes are not MMIDIDX)")
    _, version, code, num_sequences, num_entries = HEADER.unpack(head)
    if version != VERSION or code not in TOKEN_DTYPES or num_entries < 1:
        raise _damaged(
            index, f"version {version}, token type {code} and {num_entries} document entries"
        )
    expected = HEADER.size + 12 * num_sequences + 8 * num_entries
    if index.stat().st_size != expected:
        raise _damaged(
            index,
            f"{index.stat().st_size} bytes where its header describes {expected} "
            "(cut off, or with multimodal tables, which are not supported)",
        )
    dtype = TOKEN_DTYPES[code]
    return IndexedFiles(
        prefix=str(prefix),
        dtype=dtype,
        num_sequences=num_sequences,
        num_documents=num_entries - 1,
        num_tokens=bin_path(prefix).stat().st_size // dtype.itemsize,
    )


def _check_tables(files: IndexedFiles) -> None:
    index = idx_path(files.prefix)
    lengths, pointers = files.sequence_lengths(), files.sequence_pointers()
    position = 0
    for first in range(0, files.num_sequences, CHUNK_ROWS):
        chunk = lengths[first : first + CHUNK_ROWS].astype(np.int64)
        if chunk.min() < 0:
            raise _damaged(index, f"sequence {first + int(chunk.argmin())} has a negative length")
        ends = position + np.cumsum(chunk * files.dtype.itemsize)
        starts = np.concatenate(([position], ends[:-1]))
        wrong = np.flatnonzero(pointers[first : first + CHUNK_ROWS] != starts)
        if wrong.size:
            raise _damaged(
                index, f"sequence {first + wrong[0]} does not start where the one before it ends"
            )
        position = int(ends[-1])
    documents = files.document_indices()
    for first in range(0, files.num_documents, CHUNK_ROWS):
        ends = documents[first : first + CHUNK_ROWS + 1]
        wrong = np.flatnonzero(ends[1:] < ends[:-1])  # not their difference: it may overflow
        if wrong.size:
            raise _damaged(index, f"document {first + wrong[0]} ends before it starts")


def _damaged(path: Path, fault: str) -> DataError:
    return DataError(f"{path}: {fault}; prepare the data again or copy both files again")


def index_fingerprint(prefix: str | Path) -> str:
    """xxh3-128 (hex) of PREFIX.bin's length and PREFIX.idx, of which at most 64 MiB are read.

    Tells apart two corpora prepared under one prefix, one after the other; no proof of integrity.
    """
    block, most = 1 << 20, 64
    digest = xxhash.xxh3_128(struct.pack("<Q", bin_path(prefix).stat().st_size))
    with idx_path(prefix).open("rb") as stream:
        blocks = max(1, -(-os.fstat(stream.fileno()).st_size // block))
        for number in np.unique(np.linspace(0, blocks - 1, most).astype(np.int64)):
            stream.seek(int(number) * block)
            digest.update(stream.read(block))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------
# PREFIX.manifest.json
# ---------------------------------------------------------------------------------------------


def printable(text: object) -> str:
    """The text as UTF-8 can hold it: of a file's name that is not UTF-8, the odd bytes escaped."""
    return str(text).encode("utf-8", "backslashreplace").decode()


Printable = Annotated[
    str, BeforeValidator(lambda given: printable(given) if isinstance(given, str) else given)
]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Record):
    """A file as it was read or written."""

    name: Printable
    bytes: int = Field(ge=0)
    xxh3: str = Field(pattern="^[0-9a-f]{32}$")


class TokenizerRecord(_Record):
    """The tokenizer that made the tokens; `fingerprint` is the xxh3-128 of its file."""

    kind: Literal["sentencepiece", "tokenizer.json", "tiktoken"]
    name: Printable
    fingerprint: str = Field(pattern="^[0-9a-f]{32}$")
    vocab_size: int = Field(gt=0)
    eod_id: int = Field(ge=0)


class Options(_Record):
    """The choices that decide the tokens, besides the sources and the tokenizer.

    Of merged data: a limit that was not the same for all is None, text columns are all named.
    """

    text_column: Printable
    append_eod: bool
    parse_special: bool = False
    """Whether special tokens written out in a text became their ids."""
    max_document_bytes: int | None = None
    fraction: float | None = None
    """The first share of the sources that was asked for, by rows or by bytes."""
    token_budget: int | None = None
    """Tokens after which preparing stopped, at the end of a document."""
    shard: str | None = None
    """i/n: the i-th of n contiguous parts of the work."""


class Manifest(_Record):
    """What was prepared, from what, with what. The same inputs give the same bytes."""

    format: Literal[1] = 1
    sources: list[FileRecord]
    tokenizer: TokenizerRecord
    options: Options
    dtype: Literal["uint16", "int32"]
    documents: int = Field(ge=0)
    empty_documents: int = Field(ge=0)
    """Documents without a token (empty texts); they are left out and not counted in `documents`."""
    skipped: int = Field(default=0, ge=0)
    """Rows left out by --on-error skip, empty texts included."""
    skipped_rows: list[Printable] = []
    """The first of them: file, row and fault."""
    tokens: int = Field(ge=0)
    plan: str | None = Field(default=None, pattern="^[0-9a-f]{32}$")
    """Digest of how the sources were cut into units; the same for all shards of a run."""
    engine: str | None = None
    """What computed the ids: the tokenizer's own library, or a faster one checked against it."""
    derived_from: list[Printable] = []
    """The prepared data that this was merged or split from."""
    outputs: list[FileRecord] = Field(min_length=2, max_length=2)
    """PREFIX.bin and PREFIX.idx."""
    versions: dict[str, str]

    def changed(self, **values: object) -> Manifest:
        """A copy with other values, checked as those of any manifest are."""
        return Manifest.model_validate({**dict(self), **values})

    def stored(self) -> bytes:
        """The content of PREFIX.manifest.json."""
        return self.model_dump_json(indent=1).encode() + b"\n"


def read_manifest(prefix: str | Path) -> Manifest | None:
    """PREFIX.manifest.json, or None where there is none (data that another tool prepared).

    Raises DataError where it is not a manifest that this version understands.
    """
    path = manifest_path(prefix)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except IsADirectoryError as error:
        raise DataError(f"{path}: is a folder; remove it, or give another prefix") from error
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{path}: {where}: {first['msg']}; prepare the data again") from error


def write_manifest(prefix: str | Path, manifest: Manifest) -> None:
    """Writes PREFIX.manifest.json in one piece: a reader sees the old one or the new one."""
    write_atomically(manifest_path(prefix), manifest.stored())


def check_counts(files: IndexedFiles, manifest: Manifest) -> None:
    """Raises DataError where the files' counts or token type are not what the manifest says."""
    found = (files.num_documents, files.num_tokens, str(files.dtype))
    noted = (manifest.documents, manifest.tokens, manifest.dtype)
    if found != noted:
        raise DataError(
            f"{files.prefix}.idx: (documents, tokens, type) are {found}, the manifest says "
            f"{noted}; these files do not belong together, prepare the data again"
        )


def check_content(path: Path, record: FileRecord, xxh3: str | None = None) -> None:
    """Raises DataError where the size of `path`, or its hash where that is given, is another."""
    size = path.stat().st_size
    if size != record.bytes or xxh3 not in (None, record.xxh3):
        raise DataError(
            f"{path}: its content ({size} bytes) is not what the manifest describes "
            f"({record.bytes} bytes, xxh3 {record.xxh3}); copy it again or prepare it again"
        )


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def temporary_name(path: Path) -> Path:
    """A name beside `path` for a file under construction; no two runs share one."""
    return path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` under a temporary name, reaches the disk, then takes the name `path`."""
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Makes what was written to a file, or the renames in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """xxh3-128 of a file's content, hex; in bounded memory."""
    digest = xxhash.xxh3_128()
    for block in read_blocks(path):
        digest.update(block)
    return digest.hexdigest()


def read_blocks(path: Path, block_bytes: int = 1 << 20) -> Iterator[memoryview]:
    """A file's content, block after block in one buffer that each step overwrites."""
    buffer = memoryview(bytearray(block_bytes))
    with path.open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            yield buffer[:size]


def map_blocks(path: Path, block_bytes: int = 1 << 20, first: int = 0) -> Iterator[memoryview]:
    """As read_blocks, without a copy: twice as fast, for prepared files that nobody changes.

    All blocks but the last are of block_bytes, and the first where `first` does not give its bytes.
    By default they fit the processor's cache, where whatever looks at a block after the first finds
    it, and outweigh the loop over them. A disk that fails ends the process, as it ends a trainer
    that maps the file.
    """
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if not size:  # an empty file cannot be mapped
            return
        whole = memoryview(mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ))
    # Unmapped with the last block: a reader that raises still holds one, and closing would fail.
    start, end = 0, first or block_bytes
    while start < size:
        yield whole[start:end]
        start, end = end, end + block_bytes

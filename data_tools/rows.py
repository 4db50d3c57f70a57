"""A row of a file: a Document, or a Fault that says what it holds amiss; and what a Format is.

Faults come beside the Documents, so that the caller decides whether to stop. Pieces follow from the
file alone: whoever reads them, in whatever order, reads the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.manifest import DataError

PIECE_BYTES = 8 << 20
READ_BYTES = 1 << 20


class Document(NamedTuple):
    """A text and where it came from."""

    text: str
    file: Path
    row: int | None = None
    """Counted from 1; None where the file is one document."""
    counted_from: int = 0
    """Byte of the file at which the count began: reading may start in the middle."""

    @property
    def source(self) -> str:
        """File and row of the file."""
        return place(self.file, self.row, self.counted_from)


class Fault(NamedTuple):
    """Rows that hold no usable text."""

    source: str
    reason: str
    """The fault and its mend."""
    rows: int = 1
    is_empty: bool = False
    """A text without a character, left out like the others but counted apart."""

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


Row = Document | Fault


class Piece(NamedTuple):
    """A part of a file: [start, stop) in what its format counts."""

    start: int
    stop: int
    bytes: int
    """Its size as stored."""


class ReadOptions(NamedTuple):
    """What a reader has to know besides the file."""

    text_column: str = "text"
    max_document_bytes: int = 32 << 20


class Format(ABC):
    """How files of one kind are cut and read."""

    counts: str
    """What pieces are measured in: "rows", "bytes", or "files" where a file is not cut."""

    @abstractmethod
    def pieces(self, file: Path, options: ReadOptions) -> list[Piece]:
        """The file in order. Raises DataError where it cannot be read at all."""

    @abstractmethod
    def read(self, file: Path, piece: Piece, options: ReadOptions) -> Iterator[Row]:
        """The rows of a piece in order. Raises OSError where the disk fails."""


def place(file: Path, row: int | None, counted_from: int = 0) -> str:
    """`FILE, row N` for messages. Reads the file where the count began in its middle."""
    if row is None:
        return str(file)
    return f"{file}, row {row + (_lines_before(file, counted_from) if counted_from else 0)}"


def _lines_before(file: Path, offset: int) -> int:
    lines = 0
    with file.open("rb") as stream:
        while offset > 0 and (block := stream.read(min(offset, READ_BYTES))):
            lines += block.count(b"\n")
            offset -= len(block)
    return lines


def check_not_empty(file: Path) -> int:
    """The file's size. Raises DataError where it is zero."""
    size = file.stat().st_size
    if not size:
        raise DataError(f"{file}: zero bytes; fetch the file again or leave it out")
    return size


def make_row(raw: bytes | str | None, document: Document, options: ReadOptions) -> Row:
    """The document with `raw` as its text, or what is wrong with that."""
    if raw is None:
        return Fault(document.source, f"{column_name(options)} is null; mend or remove the row")
    if not raw:
        return Fault(document.source, "empty text; mend or remove the row", is_empty=True)
    try:
        size = len(raw.encode("utf-8") if isinstance(raw, str) else raw)
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Fault(
            document.source, f"not UTF-8 (byte {error.start}); convert the file or leave it out"
        )
    except UnicodeEncodeError as error:
        return Fault(
            document.source, f"half of a surrogate pair at character {error.start}; mend the row"
        )
    if size > options.max_document_bytes:
        return too_long(document.source, size, options)
    return document._replace(text=text)


def too_long(source: str, size: int, options: ReadOptions) -> Fault:
    """A document above the limit."""
    return Fault(
        source,
        f"a document of {size:,} bytes, above --max-document-mb "
        f"{options.max_document_bytes / (1 << 20):g}; cut it, or raise the limit",
    )


def column_name(options: ReadOptions) -> str:
    """The text column, for messages."""
    return f"column {options.text_column!r}"


def no_column(options: ReadOptions, names: Iterator[str]) -> str:
    """What to say where the text column is missing."""
    found = [name if len(name) < 40 else name[:40] + "..." for name in islice(names, 20)]
    return one_line(
        f"no {column_name(options)} (it has: {', '.join(found) or 'none'}); choose one with "
        "--text-column"
    )


def one_line(error: object) -> str:
    """A library's message without its line ends."""
    return " ".join(str(error).split())


def import_arrow(file: Path) -> Any:
    """The package pyarrow. Raises DataError where it is not installed."""
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"{file}: reading it needs the package pyarrow; pip install 'taid-megatron[data]'"
        ) from error
    # Its own allocator keeps what it once had: 40 MB more, for nothing that can be measured.
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    return pyarrow

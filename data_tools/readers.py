"""Documents out of one file: a dict of formats, which cut a file into pieces and read one."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

from data_tools import rows
from data_tools.rows import (
    READ_BYTES,
    Document,
    Fault,
    Format,
    Piece,
    ReadOptions,
    Row,
    check_not_empty,
    column_name,
    import_arrow,
    make_row,
    no_column,
    one_line,
    too_long,
)
from data_tools.tables import Arrow, Parquet


class Text(Format):
    """A file is a document."""

    counts = "files"

    def pieces(self, file: Path, options: ReadOptions) -> list[Piece]:
        """One."""
        return [Piece(0, 1, file.stat().st_size)]

    def read(self, file: Path, piece: Piece, options: ReadOptions) -> Iterator[Row]:
        """The file's content."""
        size = file.stat().st_size
        if not size:
            yield Fault(str(file), "zero bytes; fill the file or leave it out", is_empty=True)
        elif size > options.max_document_bytes:
            yield too_long(str(file), size, options)
        else:
            yield make_row(file.read_bytes(), Document("", file), options)


class JsonLines(Format):
    """A line is an object; lines that start in a piece's bytes belong to it."""

    counts = "bytes"

    def pieces(self, file: Path, options: ReadOptions) -> list[Piece]:
        """Ranges of bytes."""
        size = check_not_empty(file)
        starts = range(0, size, rows.PIECE_BYTES)
        ends = [*starts[1:], size]
        return [Piece(start, end, end - start) for start, end in zip(starts, ends, strict=True)]

    def read(self, file: Path, piece: Piece, options: ReadOptions) -> Iterator[Row]:
        """Rows count from the first line of the piece."""
        with file.open("rb", buffering=READ_BYTES) as stream:
            first = piece.start
            if first:  # what runs into the piece belongs to the one before
                stream.seek(first - 1)
                first += _skip_line(stream) - 1
            yield from _json_rows(stream, file, options, first, piece.stop)


class CompressedJsonLines(Format):
    """As JsonLines, but a compressed file has one beginning."""

    counts = "files"

    def pieces(self, file: Path, options: ReadOptions) -> list[Piece]:
        """One."""
        return [Piece(0, 1, check_not_empty(file))]

    def read(self, file: Path, piece: Piece, options: ReadOptions) -> Iterator[Row]:
        """Ends with a Fault where the compressed stream is damaged or cut off."""
        row = 0
        try:
            with closing(_decompressed(file)) as stream:
                for found in _json_rows(stream, file, options):
                    row += 1
                    yield found
        except (EOFError, OSError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's fault, not the file's
            reason = f"damaged or cut-off {file.suffix[1:]} ({one_line(error)})"
            yield Fault(f"{file}, after row {row}", f"{reason}; fetch the file again")


def _decompressed(file: Path) -> BinaryIO:
    if file.suffix == ".gz":
        return gzip.open(file)  # type: ignore[return-value]
    arrow = import_arrow(file)
    raw = arrow.CompressedInputStream(arrow.OSFile(str(file)), "zstd")
    return io.BufferedReader(raw, READ_BYTES)  # type: ignore[type-var, return-value]


def _skip_line(stream: BinaryIO) -> int:
    """Bytes up to and with the next end of line."""
    size = 0
    while part := stream.readline(READ_BYTES):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def _json_rows(
    stream: BinaryIO,
    file: Path,
    options: ReadOptions,
    first: int = 0,
    stop: int | None = None,
) -> Iterator[Row]:
    """The rows of the lines from byte `first` that start before `stop`."""
    # Escaped, a character takes six bytes; the other columns get a megabyte.
    longest = 6 * options.max_document_bytes + (1 << 20)
    position, row = first, 0
    while (stop is None or position < stop) and (line := stream.readline(longest)):
        row += 1
        position += len(line)
        document = Document("", file, row, first)
        if len(line) == longest and not line.endswith(b"\n"):
            rest = _skip_line(stream)
            position += rest
            yield too_long(document.source, len(line) + rest, options)
        elif line.strip():
            yield _json_row(line, document, options)


def _json_row(line: bytes, document: Document, options: ReadOptions) -> Row:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Fault(
            document.source, f"not UTF-8 (byte {error.start}); convert the file or leave it out"
        )
    except (ValueError, RecursionError) as error:
        return Fault(
            document.source,
            f"not valid JSON, or cut off ({one_line(error)}); mend or remove the row",
        )
    if not isinstance(row, dict):
        return Fault(document.source, f"a JSON {type(row).__name__}; each row must be an object")
    if options.text_column not in row:
        return Fault(document.source, no_column(options, map(str, row)))
    text = row[options.text_column]
    if text is not None and not isinstance(text, str):
        return Fault(
            document.source,
            f"{column_name(options)} holds {type(text).__name__}, not text; mend or remove the row",
        )
    return make_row(text, document, options)


FORMATS: dict[str, Format] = {
    "text": Text(),
    "jsonl": JsonLines(),
    "compressed jsonl": CompressedJsonLines(),
    "parquet": Parquet(),
    "arrow": Arrow(),
}
ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "compressed jsonl",
    ".jsonl.zst": "compressed jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}


def kind_of(file: Path) -> str:
    """The name of the file's format in FORMATS, by its ending; others are plain text."""
    return next((kind for end, kind in ENDINGS.items() if file.name.endswith(end)), "text")

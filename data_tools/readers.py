"""Documents out of one file: a dict of formats, which cut a file into pieces and read one.

What a row holds amiss comes as a Fault beside the Documents, so that the caller decides whether to
stop. Pieces follow from the file alone: whoever reads them, in whatever order, reads the same.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_tools.manifest import DataError

PIECE_BYTES = 8 << 20
_READ_BYTES = 1 << 20
_ROWS_PER_BATCH = 256


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
        while offset > 0 and (block := stream.read(min(offset, _READ_BYTES))):
            lines += block.count(b"\n")
            offset -= len(block)
    return lines


def check_not_empty(file: Path) -> int:
    """The file's size. Raises DataError where it is zero."""
    size = file.stat().st_size
    if not size:
        raise DataError(f"{file}: zero bytes; fetch the file again or leave it out")
    return size


def _row(raw: bytes | str | None, document: Document, options: ReadOptions) -> Row:
    """The document with `raw` as its text, or what is wrong with that."""
    if raw is None:
        return Fault(document.source, f"{_column(options)} is null; mend or remove the row")
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
        return _too_long(document.source, size, options)
    return document._replace(text=text)


def _too_long(source: str, size: int, options: ReadOptions) -> Fault:
    return Fault(
        source,
        f"a document of {size:,} bytes, above --max-document-mb "
        f"{options.max_document_bytes / (1 << 20):g}; cut it, or raise the limit",
    )


def _column(options: ReadOptions) -> str:
    return f"column {options.text_column!r}"


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
            yield _too_long(str(file), size, options)
        else:
            yield _row(file.read_bytes(), Document("", file), options)


class JsonLines(Format):
    """A line is an object; lines that start in a piece's bytes belong to it."""

    counts = "bytes"

    def pieces(self, file: Path, options: ReadOptions) -> list[Piece]:
        """Ranges of bytes."""
        size = check_not_empty(file)
        starts = range(0, size, PIECE_BYTES)
        ends = [*starts[1:], size]
        return [Piece(start, end, end - start) for start, end in zip(starts, ends, strict=True)]

    def read(self, file: Path, piece: Piece, options: ReadOptions) -> Iterator[Row]:
        """Rows count from the first line of the piece."""
        with file.open("rb", buffering=_READ_BYTES) as stream:
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
            reason = f"damaged or cut-off {file.suffix[1:]} ({_one_line(error)})"
            yield Fault(f"{file}, after row {row}", f"{reason}; fetch the file again")


def _decompressed(file: Path) -> BinaryIO:
    if file.suffix == ".gz":
        return gzip.open(file)  # type: ignore[return-value]
    arrow = import_arrow(file)
    raw = arrow.CompressedInputStream(arrow.OSFile(str(file)), "zstd")
    return io.BufferedReader(raw, _READ_BYTES)  # type: ignore[type-var, return-value]


def _skip_line(stream: BinaryIO) -> int:
    """Bytes up to and with the next end of line."""
    size = 0
    while part := stream.readline(_READ_BYTES):
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
            yield _too_long(document.source, len(line) + rest, options)
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
            f"not valid JSON, or cut off ({_one_line(error)}); mend or remove the row",
        )
    if not isinstance(row, dict):
        return Fault(document.source, f"a JSON {type(row).__name__}; each row must be an object")
    if options.text_column not in row:
        return Fault(document.source, no_column(options, map(str, row)))
    text = row[options.text_column]
    if text is not None and not isinstance(text, str):
        return Fault(
            document.source,
            f"{_column(options)} holds {type(text).__name__}, not text; mend or remove the row",
        )
    return _row(text, document, options)


def no_column(options: ReadOptions, names: Iterator[str]) -> str:
    """What to say where the text column is missing."""
    found = [name if len(name) < 40 else name[:40] + "..." for name in islice(names, 20)]
    return _one_line(
        f"no {_column(options)} (it has: {', '.join(found) or 'none'}); choose one with "
        "--text-column"
    )


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def import_arrow(file: Path) -> Any:
    """The package pyarrow. Raises DataError where it is not installed."""
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"{file}: reading it needs the package pyarrow; pip install 'taid-megatron[data]'"
        ) from error
    return pyarrow


class _Columnar(Format):
    """Tables: rows in batches, of which one column is read."""

    counts = "rows"

    @abstractmethod
    def _batches(
        self, file: Path, piece: Piece, options: ReadOptions
    ) -> Iterator[tuple[int, Any] | Fault]:
        """(number of the first row, from 0; the text column's array) of each batch."""

    def read(self, file: Path, piece: Piece, options: ReadOptions) -> Iterator[Row]:
        """Rows count from 1 in the file."""
        for found in self._batches(file, piece, options):
            if isinstance(found, Fault):
                yield found
                continue
            first, column = found
            skip = max(0, piece.start - first)
            values = column[skip : piece.stop - first].to_pylist()
            for row, raw in enumerate(values, start=first + skip + 1):
                yield _row(raw, Document("", file, row), options)


class Parquet(_Columnar):
    """Row groups; the column's pages are checked where they have checksums."""

    def pieces(self, file: Path, options: ReadOptions) -> list[Piece]:
        """Runs of whole row groups."""
        with self._open(file) as opened:
            names = opened.schema_arrow.names
            if options.text_column not in names:
                raise DataError(f"{file}: {no_column(options, iter(names))}")
            _check_is_text(file, opened.schema_arrow.field(options.text_column).type, options)
            # A leaf column of that name: strings have no others below them.
            leaf = [opened.schema.column(i).path for i in range(len(opened.schema))].index(
                options.text_column
            )
            groups = [opened.metadata.row_group(number) for number in range(opened.num_row_groups)]
            sizes = [(group.num_rows, group.column(leaf).total_compressed_size) for group in groups]
        return _runs(sizes)

    def _open(self, file: Path) -> Any:
        check_not_empty(file)
        arrow = import_arrow(file)
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(
                file, buffer_size=_READ_BYTES, pre_buffer=False, page_checksum_verification=True
            )
        except (arrow.ArrowException, OSError, ValueError) as error:
            if getattr(error, "errno", None) is not None:
                raise
            raise DataError(
                f"{file}: not a Parquet file, or cut off ({_one_line(error)}); fetch it again"
            ) from error

    def _batches(
        self, file: Path, piece: Piece, options: ReadOptions
    ) -> Iterator[tuple[int, Any] | Fault]:
        arrow = import_arrow(file)
        with self._open(file) as opened:
            first = 0
            for number in range(opened.num_row_groups):
                end = first + opened.metadata.row_group(number).num_rows
                if first < piece.stop and end > piece.start:
                    row = first
                    try:
                        for batch in opened.iter_batches(
                            _ROWS_PER_BATCH, row_groups=[number], columns=[options.text_column]
                        ):
                            if row < piece.stop and row + batch.num_rows > piece.start:
                                yield row, _as_bytes(arrow, batch.column(0))
                            row += batch.num_rows
                    except (arrow.ArrowException, OSError, ValueError) as error:
                        if getattr(error, "errno", None) is not None:
                            raise
                        last = min(end, piece.stop)
                        yield _damaged_rows(file, max(row, piece.start), last, error)
                first = end


class Arrow(_Columnar):
    """Arrow's own files and streams (`datasets` writes the latter), memory-mapped."""

    def pieces(self, file: Path, options: ReadOptions) -> list[Piece]:
        """Runs of whole record batches; a stream is one piece."""
        size = check_not_empty(file)
        arrow = import_arrow(file)
        with arrow.memory_map(str(file)) as mapped:
            try:
                reader = self._reader(arrow, mapped)
                names = reader.schema.names
                if options.text_column not in names:
                    raise DataError(f"{file}: {no_column(options, iter(names))}")
                _check_is_text(file, reader.schema.field(options.text_column).type, options)
                rows = [batch.num_rows for batch in _record_batches(reader)]
            except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
                raise DataError(
                    f"{file}: not an Arrow file, or cut off ({_one_line(error)}); fetch it again"
                ) from error
            if not hasattr(reader, "num_record_batches"):
                return [Piece(0, sum(rows), size)] if sum(rows) else []
        per_row = size / max(1, sum(rows))
        return _runs([(count, int(count * per_row)) for count in rows])

    def _reader(self, arrow: Any, mapped: Any) -> Any:
        import pyarrow.ipc

        magic = mapped.read(6)
        mapped.seek(0)
        opener = pyarrow.ipc.open_file if magic == b"ARROW1" else pyarrow.ipc.open_stream
        return opener(mapped)

    def _batches(
        self, file: Path, piece: Piece, options: ReadOptions
    ) -> Iterator[tuple[int, Any] | Fault]:
        arrow = import_arrow(file)
        with arrow.memory_map(str(file)) as mapped:
            row = 0
            try:
                for batch in _record_batches(self._reader(arrow, mapped)):
                    if row < piece.stop and row + batch.num_rows > piece.start:
                        column = _as_bytes(arrow, batch.column(options.text_column))
                        for start in range(0, batch.num_rows, _ROWS_PER_BATCH):
                            yield row + start, column[start : start + _ROWS_PER_BATCH]
                    row += batch.num_rows
            except (arrow.ArrowException, OSError, KeyError) as error:
                yield _damaged_rows(file, max(row, piece.start), piece.stop, error)


def _record_batches(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "num_record_batches"):
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    return iter(reader)


def _runs(sizes: list[tuple[int, int]]) -> list[Piece]:
    """Neighbouring (rows, bytes) together, up to PIECE_BYTES where they are smaller."""
    pieces: list[Piece] = []
    start = 0
    for rows, size in sizes:
        if not rows:
            continue
        last = pieces[-1] if pieces else None
        if last and last.bytes + size <= PIECE_BYTES:
            pieces[-1] = Piece(last.start, start + rows, last.bytes + size)
        else:
            pieces.append(Piece(start, start + rows, size))
        start += rows
    return pieces


def _check_is_text(file: Path, kind: Any, options: ReadOptions) -> None:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if str(kind) not in ("string", "large_string", "string_view", "binary", "large_binary"):
        raise DataError(
            f"{file}: {_column(options)} holds {kind}, not text; choose another with --text-column"
        )


def _as_bytes(arrow: Any, column: Any) -> Any:
    """The strings as bytes, their offsets checked: each row is decoded, and blamed, on its own."""
    from pyarrow import types

    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if str(column.type) == "string_view":
        column = column.cast(arrow.large_string())
    bytes_type = arrow.large_binary() if "large" in str(column.type) else arrow.binary()
    viewed = column.view(bytes_type)
    viewed.validate(full=True)
    return viewed


def _damaged_rows(file: Path, first: int, end: int, error: Exception) -> Fault:
    return Fault(
        f"{file}, rows {first + 1} to {end}",
        f"damaged ({_one_line(error)}); fetch the file again",
        rows=max(1, end - first),
    )


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

"""Tables: Parquet and Arrow, of which one column is read, in bounded batches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools import rows
from data_tools.manifest import DataError
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
)

_ROWS_PER_BATCH = 64
_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


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
                yield make_row(raw, Document("", file, row), options)


class Parquet(_Columnar):
    """Row groups; the column's pages are checked where they have checksums."""

    def pieces(self, file: Path, options: ReadOptions) -> list[Piece]:
        """Runs of whole row groups."""
        size = check_not_empty(file)
        with self._open(file) as opened:
            _check_column(file, opened.schema_arrow, options)
            # Of a row group nothing else is asked: what pyarrow finds wrong with a column's
            # description there ends the process, and raises where the column is read.
            groups = map(opened.metadata.row_group, range(opened.num_row_groups))
            counts = [group.num_rows for group in groups]
            if min(counts, default=0) < 0 or sum(counts) != opened.metadata.num_rows:
                raise DataError(
                    f"{file}: row groups of {counts[:9]} rows, {opened.metadata.num_rows} in all: "
                    "damaged; fetch it again"
                )
        return _runs(counts, size)

    def _open(self, file: Path) -> Any:
        check_not_empty(file)
        arrow = import_arrow(file)
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(
                file, buffer_size=READ_BYTES, pre_buffer=False, page_checksum_verification=True
            )
        except (arrow.ArrowException, OSError, ValueError) as error:
            if getattr(error, "errno", None) is not None:
                raise
            raise DataError(
                f"{file}: not a Parquet file, or cut off ({one_line(error)}); fetch it again"
            ) from error

    def _batches(
        self, file: Path, piece: Piece, options: ReadOptions
    ) -> Iterator[tuple[int, Any] | Fault]:
        arrow = import_arrow(file)
        as_bytes = _AsBytes(arrow)
        with self._open(file) as opened:
            first = 0
            for number in range(opened.num_row_groups):
                end = first + opened.metadata.row_group(number).num_rows
                if first < piece.stop and end > piece.start:
                    row = first
                    try:
                        for batch in opened.iter_batches(
                            _ROWS_PER_BATCH,
                            row_groups=[number],
                            columns=[options.text_column],
                            use_threads=False,  # of one column; each would keep memory of its own
                        ):
                            if row < piece.stop and row + batch.num_rows > piece.start:
                                yield row, as_bytes(batch.column(0))
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
                _check_column(file, reader.schema, options)
                counts = [batch.num_rows for batch in _record_batches(reader)]
            except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
                raise DataError(
                    f"{file}: not an Arrow file, or cut off ({one_line(error)}); fetch it again"
                ) from error
            if not hasattr(reader, "num_record_batches"):
                return [Piece(0, sum(counts), size)] if sum(counts) else []
        return _runs(counts, size)

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
        as_bytes = _AsBytes(arrow)
        with arrow.memory_map(str(file)) as mapped:
            row = 0
            try:
                for batch in _record_batches(self._reader(arrow, mapped)):
                    if row < piece.stop and row + batch.num_rows > piece.start:
                        column = as_bytes(batch.column(options.text_column))
                        for start in range(0, batch.num_rows, _ROWS_PER_BATCH):
                            yield row + start, column[start : start + _ROWS_PER_BATCH]
                    row += batch.num_rows
            except (arrow.ArrowException, OSError, KeyError) as error:
                yield _damaged_rows(file, max(row, piece.start), piece.stop, error)


def _record_batches(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "num_record_batches"):
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    return iter(reader)


def _runs(counts: list[int], file_bytes: int) -> list[Piece]:
    """Neighbours of so many rows together, up to PIECE_BYTES where they are smaller.

    A row counts as its share of the file.
    """
    per_row = file_bytes / max(1, sum(counts))
    pieces: list[Piece] = []
    start = 0
    for count in counts:
        size = int(count * per_row)
        last = pieces[-1] if pieces else None
        if last and last.bytes + size <= rows.PIECE_BYTES:
            pieces[-1] = Piece(last.start, start + count, last.bytes + size)
        elif count:
            pieces.append(Piece(start, start + count, size))
        start += count
    return pieces


def _check_column(file: Path, schema: Any, options: ReadOptions) -> None:
    from pyarrow import types

    found = schema.names.count(options.text_column)
    if not found:
        raise DataError(f"{file}: {no_column(options, iter(schema.names))}")
    if found > 1:
        raise DataError(
            f"{file}: {found} columns named {options.text_column!r}; choose another with "
            "--text-column"
        )
    kind = schema.field(options.text_column).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if str(kind) not in _TEXT_TYPES:
        raise DataError(
            f"{file}: {column_name(options)} holds {kind}, not text; choose another with "
            "--text-column"
        )


class _AsBytes:
    """Strings as bytes: each row is decoded, and blamed, on its own.

    A mapped file is taken as it is: nothing follows an offset or an index before it is checked.
    """

    def __init__(self, arrow: Any):
        self._arrow = arrow
        self._checked: tuple[Any, Any, Any] | None = None

    def __call__(self, column: Any) -> Any:
        from pyarrow import types

        if types.is_dictionary(column.type):
            column.indices.validate(full=True)
            values = self._values(column.dictionary)
            return self._arrow.DictionaryArray.from_arrays(
                column.indices, values
            ).dictionary_decode()
        name = str(column.type)
        if name.endswith("_view"):
            viewed = column.view(self._arrow.binary_view())
        else:
            is_large = "large" in name
            viewed = column.view(self._arrow.large_binary() if is_large else self._arrow.binary())
        viewed.validate(full=True)
        return viewed

    def _values(self, dictionary: Any) -> Any:
        """Batches share a dictionary, which may be larger than they are: it is checked once."""
        dictionary.validate()  # its length, which may be any number, before that is looked at
        place = [buffer and (buffer.address, buffer.size) for buffer in dictionary.buffers()]
        key = (len(dictionary), dictionary.offset, place)
        if self._checked is None or self._checked[0] != key:
            # The dictionary too: while it lives, no other one takes its place in memory.
            self._checked = key, dictionary, self(dictionary)
        return self._checked[2]


def _damaged_rows(file: Path, first: int, end: int, error: Exception) -> Fault:
    return Fault(
        f"{file}, rows {first + 1} to {end}",
        f"damaged ({one_line(error)}); fetch the file again",
        rows=max(1, end - first),
    )

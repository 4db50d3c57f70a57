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
                counts = [batch.num_rows for batch in _record_batches(reader)]
            except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
                raise DataError(
                    f"{file}: not an Arrow file, or cut off ({one_line(error)}); fetch it again"
                ) from error
            if not hasattr(reader, "num_record_batches"):
                return [Piece(0, sum(counts), size)] if sum(counts) else []
        per_row = size / max(1, sum(counts))
        return _runs([(count, int(count * per_row)) for count in counts])

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
    for count, size in sizes:
        if not count:
            continue
        last = pieces[-1] if pieces else None
        if last and last.bytes + size <= rows.PIECE_BYTES:
            pieces[-1] = Piece(last.start, start + count, last.bytes + size)
        else:
            pieces.append(Piece(start, start + count, size))
        start += count
    return pieces


def _check_is_text(file: Path, kind: Any, options: ReadOptions) -> None:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if str(kind) not in ("string", "large_string", "string_view", "binary", "large_binary"):
        raise DataError(
            f"{file}: {column_name(options)} holds {kind}, not text; choose another with "
            "--text-column"
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
        f"damaged ({one_line(error)}); fetch the file again",
        rows=max(1, end - first),
    )

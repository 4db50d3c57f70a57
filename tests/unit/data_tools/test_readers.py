"""Every format gives the same documents however it is cut; faults are named by file and row."""

import gzip
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_tools import rows as rows_module
from data_tools import tables
from data_tools.manifest import DataError
from data_tools.readers import FORMATS, kind_of
from data_tools.rows import Document, Fault, Piece, ReadOptions

TEXTS = ["one\ntwo", "漢字", "three " * 30, "\ufeff\r\n", "\x00", *(f"text {i}" for i in range(40))]


def write_parquet(path: Path, values: list, kind: pa.DataType | None = None) -> None:
    table = pa.table({"id": range(len(values)), "text": pa.array(values, kind)})
    pq.write_table(table, path, row_group_size=3, write_page_checksum=True)


def write_arrow_file(path: Path, values: list, kind: pa.DataType | None = None) -> None:
    table = pa.table({"text": pa.array(values, kind)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


def write_arrow_stream(path: Path, values: list, kind: pa.DataType | None = None) -> None:
    table = pa.table({"text": pa.array(values, kind)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


def json_lines(*values: object) -> bytes:
    return "".join(json.dumps({"text": value}) + "\n" for value in values).encode()


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


WRITERS: dict[str, Callable[[Path, list], object]] = {
    "a.jsonl": lambda path, values: path.write_bytes(json_lines(*values)),
    "a.jsonl.gz": lambda path, values: path.write_bytes(gzip.compress(json_lines(*values))),
    "a.jsonl.zst": lambda path, values: path.write_bytes(zstd(json_lines(*values))),
    "two frames.jsonl.zst": lambda path, values: path.write_bytes(
        zstd(json_lines(*values[:5])) + zstd(json_lines(*values[5:]))
    ),
    "a.parquet": write_parquet,
    "file.arrow": write_arrow_file,
    "stream.arrow": write_arrow_stream,
    "a.feather": lambda path, values: pyarrow.feather.write_feather(
        pa.table({"text": values}), path, chunksize=7
    ),
}


def read(path: Path, **options: object) -> list[Document | Fault]:
    chosen = ReadOptions(**options)  # type: ignore[arg-type]
    reader = FORMATS[kind_of(path)]
    pieces = reader.pieces(path, chosen)
    return [row for piece in pieces for row in reader.read(path, piece, chosen)]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("piece_bytes", [1, 100, 8 << 20])
def test_documents_do_not_depend_on_the_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, piece_bytes: int
) -> None:
    monkeypatch.setattr(rows_module, "PIECE_BYTES", piece_bytes)
    path = tmp_path / name
    WRITERS[name](path, TEXTS)
    rows = read(path)
    assert [row.text for row in rows if isinstance(row, Document)] == TEXTS
    assert [row.source for row in rows] == [f"{path}, row {row + 1}" for row in range(len(TEXTS))]


def test_pieces_are_many_where_a_file_can_be_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "PIECE_BYTES", 100)
    for name in ("a.jsonl", "a.parquet", "file.arrow"):
        WRITERS[name](tmp_path / name, TEXTS)
        pieces = FORMATS[kind_of(tmp_path / name)].pieces(tmp_path / name, ReadOptions())
        assert len(pieces) > 3
        assert all(a.stop == b.start for a, b in zip(pieces, pieces[1:], strict=False))


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
def test_a_piece_may_end_within_a_batch(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, TEXTS)
    found = list(FORMATS[kind_of(Path(name))].read(tmp_path / name, Piece(2, 8, 0), ReadOptions()))
    assert [row.text for row in found if isinstance(row, Document)] == TEXTS[2:8]
    assert found[0].source.endswith("row 3")


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.binary(),
        pa.string_view(),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_kinds_of_text_columns(tmp_path: Path, kind: pa.DataType) -> None:
    write_arrow_file(tmp_path / "a.arrow", TEXTS, kind)
    rows = read(tmp_path / "a.arrow")
    assert [row.text for row in rows if isinstance(row, Document)] == TEXTS


def test_a_dictionary_is_checked_once_for_its_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be larger than each of them."""
    calls = []
    call = tables._AsBytes.__call__

    def counted(self: tables._AsBytes, column: pa.Array) -> pa.Array:
        calls.append(str(column.type))
        return call(self, column)

    monkeypatch.setattr(tables._AsBytes, "__call__", counted)
    texts = [f"text {i % 300}" for i in range(900)]
    write_arrow_file(tmp_path / "a.arrow", texts, pa.dictionary(pa.int32(), pa.string()))
    rows = read(tmp_path / "a.arrow")
    assert [row.text for row in rows if isinstance(row, Document)] == texts
    assert (len(calls), calls.count("string")) == (226, 1)


def test_a_file_of_text_is_taken_as_it_is(tmp_path: Path) -> None:
    content = "\ufeffone\r\ntwo\n".encode()
    (tmp_path / "a.txt").write_bytes(content)
    (row,) = read(tmp_path / "a.txt")
    assert isinstance(row, Document)
    assert (row.text.encode(), row.source) == (content, str(tmp_path / "a.txt"))


def test_blank_lines_count_as_rows_only(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines("a") + b"\n  \n" + b'{"text": "\\u6f22"}')
    assert [row.source[-5:] for row in read(tmp_path / "a.jsonl")] == ["row 1", "row 4"]


ROW_FAULTS = {
    "a.txt": (b"good\xff", r"a\.txt: not UTF-8 \(byte 4\); convert"),
    "zero.txt": (b"", r"zero\.txt: zero bytes"),
    "long.txt": (b"x" * 2000, r"long\.txt: a document of 2,000 bytes, above --max-document-mb"),
    "1.jsonl": (json_lines("ok") + b'{"text": "\xff"}\n', r"row 2: not UTF-8"),
    "2.jsonl": (json_lines("ok", "ok") + b'{"text": "cut o', r"row 3: not valid JSON, or cut off"),
    "3.jsonl": (json_lines("ok") + b'{"body": "x"}\n', r"row 2: no column 'text' \(it has: body\)"),
    "4.jsonl": (b'{"text": 5}\n', r"row 1: column 'text' holds int, not text"),
    "5.jsonl": (json_lines("ok", None), r"row 2: column 'text' is null"),
    "6.jsonl": (b'["text"]\n', r"row 1: a JSON list"),
    "7.jsonl": (b'{"text": "\\ud83d"}\n', r"row 1: half of a surrogate pair at character 0"),
    "8.jsonl": (json_lines("ok", ""), r"row 2: empty text"),
    "9.jsonl": (json_lines("ok", "x" * 2000), r"row 2: a document of 2,000 bytes, above"),
    "deep.jsonl": (b"[" * 100_000 + b"\n", r"row 1: not valid JSON"),
    "digits.jsonl": (b'{"text": ' + b"1" * 5000 + b"}\n", r"row 1: not valid JSON"),
    "8.jsonl.gz": (gzip.compress(json_lines(*["ok"] * 9))[:-9], r"cut-off gz .*fetch the file"),
    "9.jsonl.gz": (json_lines("not gzip"), r"after row 0: damaged or cut-off gz"),
    "8.jsonl.zst": (zstd(json_lines(*["ok"] * 99))[:-9], r"cut-off zst .*fetch the file again"),
    "9.jsonl.zst": (json_lines("not zstd"), r"after row 0: damaged or cut-off zst"),
}


@pytest.mark.parametrize("name", ROW_FAULTS)
def test_faults_are_named_by_file_and_row(tmp_path: Path, name: str) -> None:
    content, expected = ROW_FAULTS[name]
    (tmp_path / name).write_bytes(content)
    *good, fault = read(tmp_path / name, max_document_bytes=1000)
    assert all(isinstance(row, Document) and row.text == "ok" for row in good)
    assert isinstance(fault, Fault)
    assert fault.is_empty == ("empty text" in expected or "zero" in expected)
    check_message(str(fault), tmp_path / name, expected)


def check_message(message: str, path: Path, expected: str) -> None:
    assert message.startswith(str(path))
    assert "\n" not in message
    with pytest.raises(DataError, match=expected):
        raise DataError(message)


def test_rows_after_a_faulty_one_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row is right in a piece that starts in the middle, and after a line without end."""
    monkeypatch.setattr(rows_module, "PIECE_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    long = b'{"text": "' + b"x" * (2 << 20) + b'"}\n'
    path.write_bytes(json_lines("a", "b") + long + b"broken\n" + json_lines("c"))
    rows = read(path, max_document_bytes=100)
    assert [row.source[-5:] for row in rows] == [f"row {row}" for row in (1, 2, 3, 4, 5)]
    assert [isinstance(row, Fault) for row in rows] == [False, False, True, True, False]
    assert "2,097,165 bytes" in str(rows[2])


def test_a_line_without_end_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.truncate(200 << 20)  # a hole: zeros
    tracemalloc.start()
    rows = read(path, max_document_bytes=1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(isinstance(row, Fault) for row in rows)
    assert peak < 40 << 20


@pytest.mark.parametrize("write", [write_parquet, write_arrow_file, write_arrow_stream])
def test_rows_of_tables_are_blamed_one_by_one(tmp_path: Path, write: Callable) -> None:
    path = tmp_path / ("a.parquet" if write is write_parquet else "a.arrow")
    values = [b"ok", None, b"", b"\xff", b"x" * 2000, b"ok"]
    write(path, values, pa.binary())
    rows = read(path, max_document_bytes=1000)
    faults = ["is null", "empty text", "not UTF-8", "above --max-document-mb"]
    for number, (row, fault) in enumerate(zip(rows[1:5], faults, strict=True), start=2):
        check_message(str(row), path, rf"row {number}: .*{fault}")
    assert [row.text for row in rows if isinstance(row, Document)] == ["ok", "ok"]


def test_a_damaged_page_is_named_and_the_other_groups_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"text number {i}" for i in range(9)]
    table = pa.table({"text": texts})
    options = {"use_dictionary": False, "compression": "none", "write_page_checksum": True}
    pq.write_table(table, path, row_group_size=3, **options)
    content = bytearray(path.read_bytes())
    content[content.index(b"number 4")] ^= 0xFF
    path.write_bytes(content)
    rows = read(path)
    assert [row.text for row in rows if isinstance(row, Document)] == texts[:3] + texts[6:]
    (fault,) = (row for row in rows if isinstance(row, Fault))
    check_message(str(fault), path, r"rows 4 to 6: damaged .*fetch the file again")
    assert fault.rows == 3


@pytest.mark.parametrize("write", [write_arrow_file, write_arrow_stream])
def test_offsets_that_point_elsewhere_are_not_followed(tmp_path: Path, write: Callable) -> None:
    """An Arrow file is mapped as it is: its offsets are checked before anything is read by them."""
    path = tmp_path / "a.arrow"
    write(path, ["aaaa", "bb", "c"])
    content = bytearray(path.read_bytes())
    where = content.index(struct.pack("<4i", 0, 4, 6, 7)) + 4
    content[where : where + 4] = struct.pack("<i", 1 << 20)
    path.write_bytes(content)
    (fault,) = read(path)
    check_message(str(fault), path, r"rows 1 to 3: damaged")


UNREADABLE = {
    "zero.jsonl": (lambda path: path.touch(), "zero bytes"),
    "zero.jsonl.gz": (lambda path: path.touch(), "zero bytes"),
    "zero.parquet": (lambda path: path.touch(), "zero bytes"),
    "zero.arrow": (lambda path: path.touch(), "zero bytes"),
    "a.parquet": (lambda path: path.write_bytes(b"PAR1 nonsense PAR1"), "not a Parquet file"),
    "a.arrow": (lambda path: path.write_bytes(b"nonsense"), "not an Arrow file"),
    "b.arrow": (lambda path: path.write_bytes(b"ARROW1 nonsense"), "not an Arrow file"),
    "number.parquet": (lambda path: write_parquet(path, [1, 2]), "holds int64, not text"),
    "number.arrow": (lambda path: write_arrow_file(path, [1, 2]), "holds int64, not text"),
    "other.parquet": (
        lambda path: pq.write_table(pa.table({"body": ["x"]}), path),
        r"no column 'text' \(it has: body\); choose one with --text-column",
    ),
    "twice.parquet": (
        lambda path: pq.write_table(pa.table([["x"], ["y"]], names=["text", "text"]), path),
        "2 columns named 'text'; choose another with --text-column",
    ),
    "twice.arrow": (
        lambda path: pyarrow.feather.write_feather(
            pa.table([["x"], ["y"]], names=["text", "text"]), path
        ),
        "2 columns named 'text'",
    ),
    "other.arrow": (
        lambda path: pyarrow.feather.write_feather(pa.table({"body": ["x"]}), path),
        r"no column 'text' \(it has: body\)",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str) -> None:
    make, expected = UNREADABLE[name]
    make(tmp_path / name)
    with pytest.raises(DataError) as caught:
        read(tmp_path / name)
    check_message(str(caught.value), tmp_path / name, expected)


def test_pyarrow_is_asked_for_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "a.parquet", ["a"])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs the package pyarrow; pip install .*\[data\]"):
        read(tmp_path / "a.parquet")


@settings(max_examples=100, deadline=None)
@given(line=st.binary(max_size=60))
@example(line=b"\xef\xbb\xbf{}")
@example(line=b'{"text": "\\ud800\\udc00"}')
@example(line=b'{"text": NaN}')
def test_any_line_is_a_document_or_a_fault(
    tmp_path_factory: pytest.TempPathFactory, line: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(line + b"\n")
    assert all(isinstance(row, Document | Fault) for row in read(path))

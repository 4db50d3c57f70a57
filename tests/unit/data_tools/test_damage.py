"""Whatever is damaged in a file that a command reads: no crash, one line that names it.

Each byte in turn, several at random; `pytest -m slow` draws 440,000 files anew.
"""

import base64
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import engines
from data_tools.corpus import stdlib_root
from data_tools.prepare import Settings, prepare
from data_tools.tokenizers import JsonTokenizer, load_tokenizer, train_tokenizer
from tests.unit.data_tools.reading_process import ReadingProcess
from tests.unit.data_tools.test_readers import TEXTS, WRITERS

ROWS = TEXTS[:12]


def parquet(kind: pa.DataType | None = None, **options: object) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        table = pa.table({"id": range(len(ROWS)), "text": pa.array(ROWS, kind)})
        pq.write_table(table, path, row_group_size=5, **options)

    return write


def arrow(opened: Callable, kind: pa.DataType, compression: str | None) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        table = pa.table({"id": range(len(ROWS)), "text": pa.array(ROWS, kind)})
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with (
            pa.OSFile(str(path), "wb") as sink,
            opened(sink, table.schema, options=options) as writer,
        ):
            writer.write_table(table, max_chunksize=5)

    return write


UTF8, VIEW = pa.string(), pa.string_view()
DICTIONARY = pa.dictionary(pa.int16(), pa.string())
LENGTHS_FIRST = {"text": "DELTA_LENGTH_BYTE_ARRAY", "id": "PLAIN"}
WITHOUT_DICTIONARY = {"use_dictionary": False, "compression": "none"}
TABLES: dict[str, Callable[[Path], None]] = {
    "snappy.parquet": parquet(),
    "zstd.parquet": parquet(compression="zstd", data_page_version="2.0"),
    "plain.parquet": parquet(**WITHOUT_DICTIONARY),
    "lengths.parquet": parquet(column_encoding=LENGTHS_FIRST, **WITHOUT_DICTIONARY),
    "categories.parquet": parquet(DICTIONARY),
    "file.arrow": arrow(pa.ipc.new_file, UTF8, None),
    "stream.arrow": arrow(pa.ipc.new_stream, UTF8, None),
    "dictionary.arrow": arrow(pa.ipc.new_file, DICTIONARY, None),
    "dictionary stream.arrow": arrow(pa.ipc.new_stream, DICTIONARY, None),
    "view.arrow": arrow(pa.ipc.new_file, VIEW, None),
    "lz4.feather": arrow(pa.ipc.new_file, pa.large_string(), "lz4"),
}
LINES = [name for name in WRITERS if "jsonl" in name]
TOKENIZERS = ["bpe.json", "sentencepiece.model", "ranks.tiktoken", "ranks.tiktoken.json"]
PREPARED = ["prepared.bin", "prepared.idx", "prepared.manifest.json"]
USES = {
    **dict.fromkeys([*TABLES, *LINES], "read"),
    **dict.fromkeys(TOKENIZERS, "load"),
    **dict.fromkeys(PREPARED, "check"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of these files, whole."""
    folder = tmp_path_factory.mktemp("whole")
    for name, write in TABLES.items():
        write(folder / name)
    for name in LINES:
        WRITERS[name](folder / name, ROWS)
    texts = [file.read_text() for file in sorted((stdlib_root() / "json").glob("*.py"))]
    for name in ("bpe.json", "sentencepiece.model"):
        train_tokenizer(texts, folder / name, 400)
    reference = load_tokenizer(folder / "bpe.json")
    assert isinstance(reference, JsonTokenizer)
    ranks, _ = engines._ranks(reference, json.loads(reference.model.to_str())["model"])
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    (folder / "ranks.tiktoken").write_bytes(b"".join(lines))
    (folder / "ranks.tiktoken.json").write_text(
        json.dumps({"pattern": engines._GPT2, "special_tokens": {"<|endoftext|>": len(ranks)}})
    )
    source = folder / "a.jsonl"
    prepare([source], folder / "bpe.json", folder / "prepared", Settings(workers=1))
    return folder


@pytest.fixture(scope="module")
def process() -> Iterator[ReadingProcess]:
    with ReadingProcess() as process:
        yield process


def use_damaged(process: ReadingProcess, path: Path, content: bytes) -> None:
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        process.use(USES[path.name], path)
    except AssertionError as error:
        kept = path.with_name(f"damaged {path.name}")
        kept.write_bytes(content)
        raise AssertionError(f"{error}; over {kept}") from error
    finally:
        path.write_bytes(whole)


def test_whole_files_are_good(process: ReadingProcess, folder: Path) -> None:
    for name, use in USES.items():
        process.use(use, folder / name)


@pytest.mark.parametrize("name", USES)
def test_any_byte_may_be_another(process: ReadingProcess, folder: Path, name: str) -> None:
    """Of long files, bytes at both ends: descriptions stand there."""
    whole = (folder / name).read_bytes()
    positions = range(len(whole))
    for position in [*positions[:700], *positions[700:][-1000:]]:
        for change in (1, 0x40, 0xFF):
            content = bytearray(whole)
            content[position] ^= change
            use_damaged(process, folder / name, content)


# What lengths, counts and offsets are afraid of.
AWKWARD = [bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff" * 8, b"\x80" + bytes(7)]
Changes = list[tuple[int, bytes]]


def damaged(whole: bytes, changes: Changes, end: int | None) -> bytearray:
    """Other bytes from some positions on; cut off."""
    content = bytearray(whole)
    for start, new in changes:
        content[start : start + len(new)] = new
    return content[:end]


@pytest.mark.parametrize("name", USES)
def test_several_bytes_may_be_others(process: ReadingProcess, folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    last = len(whole) - 1
    position = st.integers(0, last) | st.integers(max(0, last - 1000), last)
    new = st.binary(min_size=1, max_size=1) | st.sampled_from(AWKWARD)

    # The same files at each run: what is found anew comes from the test below.
    @settings(max_examples=200, derandomize=True, deadline=None, database=None)
    @given(st.lists(st.tuples(position, new), min_size=1, max_size=5), st.none() | position)
    def damage(changes: Changes, end: int | None) -> None:
        use_damaged(process, folder / name, damaged(whole, changes, end))

    damage()


@pytest.mark.slow
@pytest.mark.parametrize("name", USES)
def test_twenty_thousand_more(process: ReadingProcess, folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    draw = random.Random()
    for _ in range(20_000):
        changes = []
        for _ in range(draw.choice([1, 1, 1, 2, 3, 5])):
            position = draw.randrange(max(0, len(whole) - draw.choice([1000, 1 << 40])), len(whole))
            bit = whole[position] ^ 1 << draw.randrange(8)
            anywhere = draw.randrange(len(whole))
            moved = whole[anywhere : anywhere + draw.randrange(1, 17)]
            near = (whole[position] + draw.choice([-1, 1])) % 256
            new = [bytes([draw.randrange(256)]), bytes([bit]), bytes([near]), moved, *AWKWARD]
            changes.append((position, draw.choice(new)))
        end = draw.randrange(len(whole)) if draw.random() < 0.05 else None
        use_damaged(process, folder / name, damaged(whole, changes, end))

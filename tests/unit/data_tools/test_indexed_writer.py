"""What we write is what megatron-core's builder writes, byte for byte, or nothing at all."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

import data_tools.indexed_writer as indexed_writer
import data_tools.manifest as manifest
from data_tools.indexed_writer import IndexedWriter, token_dtype, write_index
from data_tools.manifest import DataError, Manifest, check_indexed, hash_file
from data_tools.verify import verify

# Documents as lists of sequence lengths: several sequences, an empty sequence, an empty document.
DOCUMENTS = [[5], [2], [9], [3, 4, 2], [0], [], [1, 0, 6], [300]]
ONE_SEQUENCE_EACH = [[5], [0], [300], [1], [7]]


def random_documents(
    vocab_size: int, documents: list[list[int]] = DOCUMENTS
) -> list[tuple[np.ndarray, list[int]]]:
    rng = np.random.default_rng(7)
    return [
        (rng.integers(0, vocab_size, size=sum(lengths)).astype(np.int64), lengths)
        for lengths in documents
    ]


def write_both(
    folder: Path, vocab_size: int, documents: list[list[int]] = DOCUMENTS
) -> tuple[Path, Path]:
    """The same documents by our writer and by megatron-core's builder."""
    ours, theirs = folder / "our.v1", folder / "their.v1"
    builder = IndexedDatasetBuilder(f"{theirs}.bin", dtype=token_dtype(vocab_size).type)
    with IndexedWriter(ours, vocab_size) as writer:
        for tokens, lengths in random_documents(vocab_size, documents):
            writer.add_document(tokens, name="made up", lengths=lengths)
            builder.add_document(torch.from_numpy(tokens), lengths)
        writer.finish()
    builder.finalize(f"{theirs}.idx")
    return ours, theirs


@pytest.mark.parametrize("vocab_size", [40, 65_499, 65_500, 200_000])
@pytest.mark.parametrize("rows", [2, 1 << 20])
@pytest.mark.parametrize("documents", [DOCUMENTS, ONE_SEQUENCE_EACH], ids=["cut", "whole"])
def test_bytes_equal_megatrons(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    vocab_size: int,
    rows: int,
    documents: list[list[int]],
) -> None:
    monkeypatch.setattr(indexed_writer, "TABLE_ROWS", rows)
    monkeypatch.setattr(manifest, "CHUNK_ROWS", rows)
    ours, theirs = write_both(tmp_path, vocab_size, documents)
    for suffix in (".bin", ".idx"):
        assert Path(f"{ours}{suffix}").read_bytes() == Path(f"{theirs}{suffix}").read_bytes()
    files = check_indexed(ours, deep=True)
    assert files.num_documents == len(documents)
    for number, (tokens, _) in enumerate(random_documents(vocab_size, documents)):
        assert files.document(number).tolist() == tokens.tolist()


def test_megatron_reads_it(tmp_path: Path) -> None:
    ours, _ = write_both(tmp_path, 65_500)
    dataset = IndexedDataset(str(ours))
    assert dataset.index.dtype == np.int32
    sequences = np.concatenate([dataset[number] for number in range(len(dataset))])
    expected = np.concatenate([tokens for tokens, _ in random_documents(65_500)])
    assert sequences.tolist() == expected.tolist()
    assert np.diff(dataset.document_indices).tolist() == [len(lengths) for lengths in DOCUMENTS]


def test_records_describe_the_files(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", 40) as writer:
        writer.add_document(np.arange(40), name="made up")
        records = writer.finish()
    assert [record.name for record in records] == ["a.bin", "a.idx"]
    for record in records:
        path = tmp_path / record.name
        assert (record.bytes, record.xxh3) == (path.stat().st_size, hash_file(path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.parametrize(
    ("tokens", "lengths", "fault"),
    [
        ([1, 40], None, "token id 40 lies outside the vocabulary of 40"),
        ([-1, 4], None, "token id -1 lies outside"),
        ([1.5], None, "not integers"),
        ([1, 2], [1], "sequences of [1] for 2 tokens"),
        ([1, 2], [3, -1], "sequences of [3, -1]"),
    ],
)
def test_bad_documents_are_named(
    tmp_path: Path, tokens: list[float], lengths: list[int] | None, fault: str
) -> None:
    with IndexedWriter(tmp_path / "a", 40) as writer, pytest.raises(DataError) as caught:
        writer.add_document(np.array(tokens), name="corpus.jsonl, row 3", lengths=lengths)
    assert str(caught.value).startswith("corpus.jsonl, row 3: ")
    assert fault in str(caught.value)


def test_nothing_is_left_of_an_unfinished_run(tmp_path: Path) -> None:
    """Neither temporary files, nor a change of what an earlier run made: as after an exception."""
    ours, _ = write_both(tmp_path, 40)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with IndexedWriter(ours, 40) as writer:
        writer.add_document(np.arange(3), name="made up")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_failing_disk_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    ours, _ = write_both(tmp_path, 40)
    manifest.manifest_path(ours).write_text("of the earlier run")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(indexed_writer.os, "fsync", full)
    with IndexedWriter(ours, 40) as writer:
        writer.add_document(np.arange(3), name="made up")
        with pytest.raises(OSError, match="No space left"):
            writer.finish()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@contextmanager
def full_disk(most_bytes: int) -> Iterator[None]:
    """Files end there, as on a full disk: writing, and closing after that, raises OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("buffered", [1 << 12, 1 << 22])
@pytest.mark.parametrize("lengths", [None, [5000, 3000]], ids=["whole", "cut"])
def test_nothing_is_left_on_a_full_disk(
    tmp_path: Path, lengths: list[int] | None, buffered: int
) -> None:
    """Whichever file is the first that does not fit, and whether it is noticed late."""

    def write() -> None:
        with IndexedWriter(tmp_path / "a", 40, write_bytes=buffered) as writer:
            for _ in range(4):
                writer.add_document(np.ones(8000, int), name="made up", lengths=lengths)
            writer.finish()

    for most_bytes in (0, 60, 20_000, 63_999):
        with full_disk(most_bytes), pytest.raises(OSError, match="File too large"):
            write()
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_hide_the_fault(tmp_path: Path) -> None:
    """Which was there before what is still in memory failed to reach the disk."""

    def write() -> None:
        with IndexedWriter(tmp_path / "a", 40) as writer:
            writer.add_document(np.ones(3, int), name="made up", lengths=[1, 2])
            writer.add_document(np.array([40]), name="made up")

    with full_disk(0), pytest.raises(DataError, match="outside the vocabulary"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.bin", "a.idx", "a.manifest.json"])
def test_a_folder_of_that_name_is_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=rf"{name}: is a folder; give another --out"):
        IndexedWriter(tmp_path / "a", 40)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("out", ["file/a", "file/b/a"])
def test_a_file_in_place_of_the_folder_is_refused_at_once(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"/file: is a file, where a folder should be"):
        IndexedWriter(tmp_path / out, 40)


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_what_a_cut_while_publishing_leaves_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Neither data that the old manifest describes, nor data without a manifest."""
    renamed = []

    def cut(file: indexed_writer.HashedFile) -> None:
        if len(renamed) == stop:
            raise KeyboardInterrupt
        renamed.append(file.path.name)
        file.temporary.replace(file.path)

    prefix = written(tmp_path / "a")
    monkeypatch.setattr(indexed_writer.HashedFile, "publish", cut)
    with pytest.raises(KeyboardInterrupt):
        written(prefix)
    assert renamed == ["a.bin", "a.manifest.json"][:stop]
    with pytest.raises(DataError, match=r"a\.idx: no such file"):
        check_indexed(prefix)
    assert not list(tmp_path.glob("*.tmp-*"))
    monkeypatch.undo()
    assert verify(written(prefix)).manifest is not None


def written(prefix: Path) -> Path:
    """A document with its manifest, published together."""
    with IndexedWriter(prefix, 40) as writer:
        writer.add_document(np.arange(3), name="made up")
        writer.describe(
            Manifest.model_validate(
                {
                    "sources": [],
                    "tokenizer": {
                        "kind": "sentencepiece",
                        "name": "a.model",
                        "fingerprint": "0" * 32,
                        "vocab_size": 40,
                        "eod_id": 0,
                    },
                    "options": {"text_column": "text", "append_eod": False},
                    "dtype": "uint16",
                    "documents": 1,
                    "empty_documents": 0,
                    "tokens": 3,
                    "outputs": writer.complete(),
                    "versions": {},
                }
            )
        )
        writer.publish()
    return prefix


def test_pointers_beyond_2_to_the_31(tmp_path: Path) -> None:
    """More than 2^31 tokens and bytes, in files of holes: our index, megatron-core's reader."""
    lengths = np.array([2**31 - 1, 2**31 - 1, 5], dtype=np.int32)
    dtype = np.dtype(np.uint16)
    last = 2 * int(lengths[:2].sum(dtype=np.int64))
    with (tmp_path / "a.bin").open("wb") as data:
        data.seek(last)
        data.write(np.arange(1, 6, dtype=dtype).tobytes())
    with (tmp_path / "a.idx").open("wb") as index:
        write_index(index.write, dtype, 3, 3, lambda: [lengths[:1], lengths[1:]])
    files = check_indexed(tmp_path / "a", deep=True)
    assert files.num_tokens == 2**32 + 3
    assert files.sequence_pointers().tolist() == [0, 2**32 - 2, last]
    assert files.document_indices().tolist() == [0, 1, 2, 3]
    assert files.document(2).tolist() == [1, 2, 3, 4, 5]
    dataset = IndexedDataset(str(tmp_path / "a"))
    assert dataset[2].tolist() == [1, 2, 3, 4, 5]
    assert dataset.get(1, offset=2**31 - 3, length=2).tolist() == [0, 0]


def test_documents_in_bulk_equal_documents_one_by_one(tmp_path: Path) -> None:
    one, _ = write_both(tmp_path, 40)
    documents = random_documents(40)
    with IndexedWriter(tmp_path / "bulk", 40) as writer:
        for part in (documents[:2], documents[2:]):
            tokens = np.concatenate([tokens for tokens, _ in part]).astype(np.uint16)
            writer.add_tokens(tokens.data)
            lengths = [length for _, lengths in part for length in lengths]
            writer.add_tables(np.array(lengths), np.array([len(lengths) for _, lengths in part]))
        writer.finish()
    for suffix in (".bin", ".idx"):
        assert Path(f"{one}{suffix}").read_bytes() == (tmp_path / f"bulk{suffix}").read_bytes()

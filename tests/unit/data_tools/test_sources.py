"""Documents come in a fixed order; what cannot be read is named by file and row."""

import gzip
import json
from pathlib import Path

import pytest

from data_tools.manifest import DataError, hash_file
from data_tools.sources import (
    Corpus,
    Document,
    find_files,
    sample_texts,
    split_held_out,
    stdlib_root,
    stdlib_sources,
)


def rows(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_files_folders_and_patterns_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/2.txt", "a/1.txt", "a/deep/0.txt", "a/.x", "a/__pycache__/x", "c.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(name)
    inputs = [tmp_path / "b.txt", tmp_path / "a", str(tmp_path / "*.md")]
    texts = [document.text for document in Corpus(inputs)]
    assert texts == ["b.txt", "a/1.txt", "a/2.txt", "a/deep/0.txt", "c.md"]
    with pytest.raises(DataError, match=r"1\.txt: given twice"):
        find_files([tmp_path / "a", str(tmp_path / "a/*.txt")])
    with pytest.raises(DataError, match=r"\*\.rst: no such file"):
        find_files([str(tmp_path / "*.rst")])
    with pytest.raises(DataError, match="no inputs"):
        find_files([])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    """Rows are counted as lines, blank lines and a missing last newline do not matter."""
    content = rows("one\ntwo", "") + b"\n" + b'{"text": "\\u6f22", "id": 3}'
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    corpus = Corpus([path])
    expected = [("one\ntwo", 1), ("", 2), ("漢", 4)]
    for _ in range(2):  # each pass reads anew
        assert list(corpus) == [Document(text, f"{path}, row {row}") for text, row in expected]
        (record,) = corpus.records
        assert (record.bytes, record.xxh3) == (path.stat().st_size, hash_file(path))
        assert corpus.bytes_read == corpus.bytes_total == record.bytes


def test_texts_are_taken_as_they_are(tmp_path: Path) -> None:
    content = "\ufeffone\r\ntwo\n".encode()
    (tmp_path / "a.txt").write_bytes(content)
    corpus = Corpus([tmp_path / "a.txt"])
    assert [document.text.encode() for document in corpus] == [content]
    assert corpus.records[0].xxh3 == hash_file(tmp_path / "a.txt")


BAD = {
    "a.txt": (b"good\xff", r"a\.txt: not UTF-8 \(byte 4\); convert"),
    "1.jsonl": (rows("ok") + b'{"text": "\xff"}\n', r"row 2: not UTF-8"),
    "2.jsonl": (rows("ok", "ok") + b'{"text": "cut o', r"row 3: not valid JSON, or cut off"),
    "3.jsonl": (rows("ok") + b'{"body": "x"}\n', r"row 2: no column 'text' \(it has: body\)"),
    "4.jsonl": (b'{"text": 5}\n', r"row 1: column 'text' holds int, not text"),
    "5.jsonl": (b'{"text": null}\n', r"row 1: column 'text' holds NoneType"),
    "6.jsonl": (b'["text"]\n', r"row 1: a JSON list"),
    "7.jsonl": (b'{"text": "\\ud83d"}\n', r"row 1: half of a surrogate pair at character 0"),
    "8.jsonl.gz": (gzip.compress(rows(*["ok"] * 9))[:-9], r"cut-off gzip .*fetch the file again"),
    "9.jsonl.gz": (rows("not gzip"), r"after row 0: damaged or cut-off gzip"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs_are_named(tmp_path: Path, name: str) -> None:
    content, fault = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=fault) as caught:
        list(Corpus([tmp_path / name]))
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_sample_is_spread_evenly_and_bounded() -> None:
    documents = [Document(f"{number:04d}", "made up") for number in range(1000)]
    texts = sample_texts(documents, max_bytes=600)
    assert texts == [f"{number:04d}" for number in range(0, 1000, 8)]
    assert sample_texts(documents, max_bytes=10**6) == [document.text for document in documents]
    assert sample_texts(documents[:1], max_bytes=1) == ["0000"]


def test_the_standard_library_is_a_corpus() -> None:
    files = stdlib_sources()
    names = {file.relative_to(stdlib_root()).as_posix() for file in files}
    assert "json/decoder.py" in names
    assert files == sorted(files)
    assert not [name for name in names if {"site-packages", "test"} & set(name.split("/"))]
    assert 5e6 < sum(file.stat().st_size for file in files) < 40e6


def test_the_held_out_files_do_not_depend_on_the_others(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.py" for number in range(2000)]
    train, held_out = split_held_out(files, tmp_path)
    assert sorted(train + held_out) == sorted(files)
    assert 60 < len(held_out) < 140
    assert split_held_out(files[::3], tmp_path)[1] == [f for f in files[::3] if f in held_out]
    moved = [Path("/elsewhere") / file.name for file in files]
    names = [file.name for file in split_held_out(moved, "/elsewhere")[1]]
    assert names == [file.name for file in held_out]

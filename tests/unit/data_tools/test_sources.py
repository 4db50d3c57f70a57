"""Inputs name files in a fixed order; samples and splits are even and repeatable."""

from pathlib import Path

import pytest

from data_tools.corpus import split_held_out, stdlib_root, stdlib_sources
from data_tools.manifest import DataError
from data_tools.rows import Document
from data_tools.sources import Corpus, find_sources, sample_texts


def test_files_folders_and_patterns_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/2.txt", "a/1.txt", "a/deep/0.txt", "a/.x", "a/__pycache__/x", "c.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(name)
    inputs = [tmp_path / "b.txt", tmp_path / "a", str(tmp_path / "*.md")]
    texts = [document.text for document in Corpus(inputs)]
    assert texts == ["b.txt", "a/1.txt", "a/2.txt", "a/deep/0.txt", "c.md"]
    with pytest.raises(DataError, match=r"1\.txt: given twice"):
        find_sources([tmp_path / "a", str(tmp_path / "a/*.txt")])
    with pytest.raises(DataError, match=r"\*\.rst: no such file"):
        find_sources([str(tmp_path / "*.rst")])
    with pytest.raises(DataError, match="no inputs"):
        find_sources([])


def test_a_folder_of_tables_with_other_files_is_not_guessed_at(tmp_path: Path) -> None:
    for name in ("a.jsonl", "README.md"):
        (tmp_path / name).write_text('{"text": "a"}')
    with pytest.raises(DataError, match=r"holds jsonl files and others \(README.md\).*\*\.jsonl"):
        find_sources([tmp_path])
    assert len(find_sources([str(tmp_path / "**/*.jsonl")])) == 1


def test_a_sample_is_spread_evenly_and_bounded() -> None:
    documents = [Document(f"{number:04d}", Path("made up")) for number in range(1000)]
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

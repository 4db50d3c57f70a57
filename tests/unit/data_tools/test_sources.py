"""Inputs name files in a fixed order; samples and splits are even and repeatable."""

import os
import socket
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


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(name)


def names(folder: Path) -> list[str]:
    return [source.path.relative_to(folder).as_posix() for source in find_sources([folder])]


def test_the_order_is_that_of_the_paths(tmp_path: Path) -> None:
    """By their parts: a folder's files come before those of a name that goes on with a dot."""
    write(tmp_path, "a/z.txt", "a.b/1.txt", "a.txt", "A/1.txt", "a/b/1.txt", "é.txt", "10", "9")
    ordered = ["10", "9", "A/1.txt", "a/b/1.txt", "a/z.txt", "a.b/1.txt", "a.txt", "é.txt"]
    assert names(tmp_path) == ordered
    below = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [tmp_path / name for name in ordered] == sorted(below)


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    write(tmp_path, "in/a.txt", "elsewhere/b.txt", "elsewhere/deep/c.txt", "d.txt")
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/file.txt").symlink_to("../d.txt")
    followed = ["a.txt", "file.txt", "linked/b.txt", "linked/deep/c.txt"]
    assert names(tmp_path / "in") == followed


@pytest.mark.parametrize("target", [".", "..", "../b"])
def test_a_folder_that_is_reached_twice_is_refused(tmp_path: Path, target: str) -> None:
    write(tmp_path, "in/a/1.txt", "in/b/2.txt")
    (tmp_path / "in/a/loop").symlink_to(target)
    with pytest.raises(DataError, match=r": the same folder as .*; remove the link, or name"):
        find_sources([tmp_path / "in"])
    assert len(find_sources([str(tmp_path / "in/*/*.txt")])) == 2


def test_what_is_no_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below a folder, by a pattern, by its name; unless it is hidden or the pattern leaves it."""
    write(tmp_path, "a.txt", "deep/b.txt")
    other = tmp_path / "deep/other"
    monkeypatch.chdir(other.parent)  # for a socket's name is short
    with socket.socket(socket.AF_UNIX) as server:
        for fault, make in (
            ("a link to nothing", lambda: other.symlink_to("none")),
            ("cannot be read", lambda: other.symlink_to("other")),
            ("neither a file nor a folder", lambda: os.mkfifo(other)),
            ("neither a file nor a folder", lambda: server.bind("other")),
        ):
            make()
            for given in (tmp_path, str(tmp_path / "deep/*"), other):
                with pytest.raises(DataError, match=f"deep/other: {fault}.*; mend it, or name"):
                    find_sources([given])
            assert len(find_sources([str(tmp_path / "**/*.txt")])) == 2
            other.rename(tmp_path / "deep/.other")
            assert names(tmp_path) == ["a.txt", "deep/b.txt"]
            (tmp_path / "deep/.other").unlink()


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a.txt", "deep/b.txt")
    scan = os.scandir

    def refuse(folder: Path) -> object:  # the tests' user may be one who reads everything
        if Path(folder).name == "deep":
            raise PermissionError(13, "Permission denied")
        return scan(folder)

    monkeypatch.setattr("data_tools.sources.os.scandir", refuse)
    with pytest.raises(DataError, match=r"deep: cannot be read \(Permission denied\); mend it, or"):
        find_sources([tmp_path])


def test_a_file_is_the_same_by_whatever_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a.txt", "sub/b.txt", "cache/blobs/1")
    (tmp_path / "link.txt").symlink_to("a.txt")
    (tmp_path / "folder").symlink_to("sub")
    monkeypatch.chdir(tmp_path)
    for first, second in (
        ("a.txt", "link.txt"),
        ("a.txt", tmp_path / "a.txt"),
        ("a.txt", "sub/../a.txt"),
        ("sub", "folder/b.txt"),
        ("link.txt", str(tmp_path / "*.txt")),
    ):
        with pytest.raises(DataError, match=r"given twice(, also as .*)?; name it once"):
            find_sources([first, second])
    (tmp_path / "link.txt").unlink()
    for name in ("x.txt", "y.txt"):
        (tmp_path / name).symlink_to("cache/blobs/1")
    with pytest.raises(DataError, match=r"y.txt: given twice, also as .*x.txt"):
        find_sources([str(tmp_path / "[xy].txt")])


def test_files_of_equal_content_in_the_hubs_cache_are_files(tmp_path: Path) -> None:
    cache = tmp_path / "datasets--owner--name"
    write(cache, "blobs/1", "snapshots/5ha1/c.txt")
    for name in ("a.txt", "b.txt"):
        (cache / "snapshots/5ha1" / name).symlink_to("../../blobs/1")
    assert names(cache / "snapshots/5ha1") == ["a.txt", "b.txt", "c.txt"]
    with pytest.raises(DataError, match=r"b.txt: given twice; name it once"):
        find_sources([cache / "snapshots/5ha1", cache / "snapshots/5ha1/b.txt"])


def test_outputs_do_not_lie_among_the_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "in/a.jsonl", "in/deep/b.jsonl", "elsewhere/c.jsonl", "in/out.work/tokens")
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "by-link").symlink_to(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    for out in ("in/out", "in/deep/new/out", "elsewhere/out", "by-link/out", "in/../in/out"):
        for given in ([tmp_path / "in"], ["elsewhere/c.jsonl", "in"]):
            with pytest.raises(DataError, match=f"^{out} lies in the input folder .*in; give an"):
                find_sources(given, outputs=out)
    assert len(find_sources(["in/a.jsonl", "in/deep/*.jsonl"], outputs="in/out")) == 2
    (tmp_path / "in/out.work/tokens").unlink()
    for out in ("in", "in.v2/out", "out", tmp_path / "new/in/out"):
        assert len(find_sources(["in"], outputs=out)) == 3


def test_local_inputs_are_checked_before_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "hub/a.txt", "in/b.txt")
    fetched = []

    def fetch(address: str) -> Path:
        fetched.append(address)
        return tmp_path / "hub"

    monkeypatch.setattr("data_tools.sources.fetch_from_hub", fetch)
    inputs = ["hf://datasets/owner/name", str(tmp_path / "in")]
    with pytest.raises(DataError, match="lies in the input folder"):
        find_sources(inputs, outputs=tmp_path / "in/out")
    assert not fetched
    assert [source.path.name for source in find_sources(inputs)] == ["a.txt", "b.txt"]


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

"""What inspect shows is bounded by what is there, and its picture is whole or not at all."""

import sys
from pathlib import Path

import pytest

from data_tools.inspection import describe
from data_tools.manifest import DataError, manifest_path
from tests.unit.data_tools.test_indexed_writer import full_disk
from tests.unit.data_tools.test_manifest import write


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (range(10**11), [0, 1, 2, 3]),
        (range(2, 10**30), [2, 3]),
        (range(10**11, 10**12), []),
        (range(1, 3), [1, 2]),
    ],
)
def test_only_documents_that_are_there_are_shown(
    tmp_path: Path, shown: range, expected: list[int]
) -> None:
    """At once, however many are asked for."""
    text, values = describe(write(tmp_path / "a"), shown=shown)
    assert list(values["texts"]) == expected
    assert text.count("--- document") == len(expected)


def test_files_of_another_run_are_not_described(tmp_path: Path) -> None:
    prefix, other = write(tmp_path / "a"), write(tmp_path / "b", documents=3)
    manifest_path(other).replace(manifest_path(prefix))
    with pytest.raises(DataError, match="do not belong together"):
        describe(prefix)


NOT_UTF8 = pytest.param(
    "caf\udce9",
    marks=pytest.mark.skipif(sys.platform == "darwin", reason="its file names are UTF-8"),
)


@pytest.mark.parametrize("name", ["a", r"$\frac$", NOT_UTF8, "a\nb"])
def test_the_picture_is_whole_or_not_at_all(tmp_path: Path, name: str) -> None:
    """Whatever the data is called; on a full disk an earlier picture stays."""
    prefix, out = write(tmp_path / "data" / name), tmp_path / "out" / "a.png"
    describe(prefix, histogram=out)
    picture = out.read_bytes()
    assert picture.endswith(b"IEND\xaeB`\x82")
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        describe(prefix, histogram=out)
    assert out.read_bytes() == picture
    assert [path.name for path in out.parent.iterdir()] == ["a.png"]


def test_a_folder_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(DataError, match=r"a\.png: is a folder; give another --histogram"):
        describe(write(tmp_path / "a"), histogram=tmp_path / "a.png")

"""What inspect shows is bounded by what is there, and its picture is whole or not at all."""

import base64
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from data_tools.indexed_writer import IndexedWriter
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


def write_bare(prefix: Path, ids: list[int]) -> None:
    """A document, without a manifest."""
    with IndexedWriter(prefix, 600, np.dtype(np.int64)) as writer:
        writer.add_tokens(np.array(ids))
        writer.add_tables(np.array([len(ids)]), np.array([1]))
        writer.finish()


def test_an_id_in_a_gap_of_the_vocabulary_is_named(tmp_path: Path) -> None:
    model = tmp_path / "bytes.tiktoken"
    ranks = ((base64.b64encode(bytes([byte])).decode(), byte) for byte in range(256))
    model.write_text("".join(f"{token} {rank}\n" for token, rank in ranks))
    about = {"pattern": r"\S+|\s+", "special_tokens": {"<|endoftext|>": 300}}
    Path(f"{model}.json").write_text(json.dumps(about))
    write_bare(tmp_path / "good", [97, 98, 300])
    assert describe(tmp_path / "good", model)[1]["texts"] == {0: "ab"}
    write_bare(tmp_path / "a", [97, 280])
    with pytest.raises(DataError, match=r"a\.bin, document 0: an id that .*bytes\.tiktoken does"):
        describe(tmp_path / "a", model)


@pytest.mark.parametrize("token", [600, 1 << 31, (1 << 63) - 1, -1])
def test_ids_of_another_tokenizer_are_named(tmp_path: Path, model_path: Path, token: int) -> None:
    """In files without a manifest, whatever the library does over an id that it lacks."""
    write_bare(tmp_path / "a", [5, token])
    with pytest.raises(DataError, match=r"a\.bin, document 0: an id that .*small\.model does not"):
        describe(tmp_path / "a", model_path)


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

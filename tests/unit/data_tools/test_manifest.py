"""Damaged or mismatched files are found, and the message says which and what to do."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_tools.indexed_writer import IndexedWriter
from data_tools.manifest import (
    HEADER,
    DataError,
    Manifest,
    check_indexed,
    index_fingerprint,
    manifest_path,
    map_blocks,
    read_manifest,
    write_manifest,
)
from data_tools.verify import verify

HASH = "0" * 32


def write(prefix: Path, documents: int = 4, tokens: int = 10) -> Path:
    with IndexedWriter(prefix, 100) as writer:
        for number in range(documents):
            ids = np.append(np.arange(tokens - 1) + number + 1, 0)
            writer.add_document(ids, name="made up")
        outputs = writer.finish()
    record = {
        "sources": [{"name": "made up", "bytes": 0, "xxh3": HASH}],
        "tokenizer": {
            "kind": "sentencepiece",
            "name": "a.model",
            "fingerprint": HASH,
            "vocab_size": 100,
            "eod_id": 0,
        },
        "options": {"text_column": "text", "append_eod": True},
        "dtype": "uint16",
        "documents": documents,
        "empty_documents": 0,
        "tokens": documents * tokens,
        "outputs": outputs,
        "versions": {},
    }
    write_manifest(prefix, Manifest.model_validate(record))
    return prefix


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def truncate(path: Path, by: int) -> None:
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - by)


POINTERS = HEADER.size + 4 * 4
DOCUMENTS = HEADER.size + 12 * 4
SHALLOW = {
    "no bin": ("no such file", lambda p: Path(f"{p}.bin").unlink()),
    "no idx": ("no such file", lambda p: Path(f"{p}.idx").unlink()),
    "magic": ("not a Megatron index", lambda p: overwrite(Path(f"{p}.idx"), 0, b"X")),
    "empty idx": ("not a Megatron index", lambda p: Path(f"{p}.idx").write_bytes(b"")),
    "version": ("version 2", lambda p: overwrite(Path(f"{p}.idx"), 9, b"\x02")),
    "dtype": ("token type 99", lambda p: overwrite(Path(f"{p}.idx"), 17, b"\x63")),
    "idx cut": ("its header describes", lambda p: truncate(Path(f"{p}.idx"), 1)),
    "bin cut": ("describes 80", lambda p: truncate(Path(f"{p}.bin"), 1)),
    "documents": (
        "does not span",
        lambda p: overwrite(Path(f"{p}.idx"), DOCUMENTS + 32, struct.pack("<q", 3)),
    ),
}
DEEP = {
    "length": (
        "negative length",
        lambda p: overwrite(Path(f"{p}.idx"), HEADER.size + 4, struct.pack("<i", -1)),
    ),
    "pointer": (
        "sequence 2 does not start where",
        lambda p: overwrite(Path(f"{p}.idx"), POINTERS + 16, struct.pack("<q", 7)),
    ),
    "order": (
        "document 2 ends before it starts",
        lambda p: overwrite(Path(f"{p}.idx"), DOCUMENTS + 16, struct.pack("<q", 4)),
    ),
    "order, 2^63 apart": (
        "document 1 ends before it starts",
        lambda p: overwrite(
            Path(f"{p}.idx"), DOCUMENTS + 8, struct.pack("<3q", 1 << 31, 2 - (1 << 63), 0)
        ),
    ),
}


@pytest.mark.parametrize("case", [*SHALLOW, *DEEP])
def test_damage_is_found(tmp_path: Path, case: str) -> None:
    prefix = write(tmp_path / "a")
    fault, damage = {**SHALLOW, **DEEP}[case]
    check_indexed(prefix, deep=True)
    damage(prefix)
    with pytest.raises(DataError) as caught:
        check_indexed(prefix, deep=case in DEEP)
    message = str(caught.value)
    assert fault in message
    assert message.startswith(f"{prefix}.")
    assert "prepare" in message
    assert "\n" not in message


def test_verify_compares_with_the_manifest(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    verify(prefix)
    overwrite(Path(f"{prefix}.bin"), 6, b"\x63")  # the structure cannot show this
    check_indexed(prefix, deep=True)
    with pytest.raises(DataError, match=r"a\.bin: its content .* is not what the manifest"):
        verify(prefix)


def test_verify_finds_files_of_another_run(tmp_path: Path) -> None:
    prefix, other = write(tmp_path / "a"), write(tmp_path / "b", documents=3)
    manifest_path(other).replace(manifest_path(prefix))
    with pytest.raises(DataError, match="do not belong together"):
        verify(prefix)


def test_verify_follows_a_rename(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    for suffix in ("bin", "idx", "manifest.json"):
        Path(f"{prefix}.{suffix}").rename(tmp_path / f"b.v2.{suffix}")
    verify(tmp_path / "b.v2")


def test_data_without_a_manifest_is_verified_by_structure(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    manifest_path(prefix).unlink()
    verdict = verify(prefix)
    assert (verdict.files.num_tokens, verdict.manifest) == (40, None)
    assert any("no manifest" in line for line in verdict.unchecked)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"format": 2}, "format"),
        ({"tokens": -1}, "tokens"),
        ({"surprise": 1}, "surprise"),
        ({"tokenizer": {}}, "tokenizer.kind"),
    ],
)
def test_a_manifest_of_another_form_is_refused(tmp_path: Path, change: dict, fault: str) -> None:
    prefix = write(tmp_path / "a")
    path = manifest_path(prefix)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=rf"a\.manifest\.json: {fault}.*prepare the data again"):
        read_manifest(prefix)
    path.write_text("{")
    with pytest.raises(DataError, match=r"a\.manifest\.json: the file: Invalid JSON"):
        read_manifest(prefix)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"a\.manifest\.json: is a folder"):
        read_manifest(prefix)


def test_every_name_in_a_manifest_can_be_written(tmp_path: Path) -> None:
    """Of a file whose name is not UTF-8, Python's own form cannot; no name but a text is taken."""
    manifest = read_manifest(write(tmp_path / "a"))
    assert manifest
    record = {"name": "x\udce9", "bytes": 0, "xxh3": HASH}
    odd = manifest.changed(
        sources=[record],
        tokenizer={**manifest.tokenizer.model_dump(), "name": "x\udce9"},
        options={"text_column": "x\udce9", "append_eod": True},
        skipped_rows=["x\udce9"],
        derived_from=["x\udce9"],
    )
    assert odd.stored().count(rb"x\\udce9") == 5
    with pytest.raises(ValueError, match="name"):
        manifest.changed(sources=[{**record, "name": 5}])


def test_the_fingerprint_follows_the_index(tmp_path: Path) -> None:
    first = index_fingerprint(write(tmp_path / "a"))
    assert index_fingerprint(write(tmp_path / "b")) == first
    assert index_fingerprint(write(tmp_path / "c", documents=5, tokens=8)) != first


def test_the_tools_need_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, data_tools.cli; "
        "sys.exit(any(name.split('.')[0] in ('torch', 'megatron') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("first", [0, 1, 3, 4, 11])
def test_mapped_blocks_are_the_file(tmp_path, first) -> None:
    """In blocks of four bytes, after a first one of another size where one is asked for."""
    path, content = tmp_path / "file", bytes(range(10))
    path.write_bytes(content)
    blocks = [bytes(block) for block in map_blocks(path, 4, first)]
    assert b"".join(blocks) == content
    assert len(blocks[0]) == min(first or 4, 10)
    assert all(len(block) == 4 for block in blocks[1:-1])
    path.write_bytes(b"")
    assert list(map_blocks(path, 4, first)) == []

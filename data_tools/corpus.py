"""A corpus that every Python installation carries: its own standard library's sources."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from data_tools.manifest import write_atomically
from data_tools.sources import split_held_out, stdlib_root, stdlib_sources


def write_stdlib_corpus(folder: str | Path) -> dict[str, tuple[Path, int]]:
    """Write train.jsonl and held_out.jsonl into a folder, one document per source file, sorted.

    Returns name -> (path, documents). The split is by path, the same on every machine.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    train, held_out = split_held_out(stdlib_sources(), stdlib_root())
    return {
        name: (_write_jsonl(target / f"{name}.jsonl", files), len(files))
        for name, files in (("train", train), ("held_out", held_out))
    }


def _write_jsonl(path: Path, files: Iterable[Path]) -> Path:
    root = stdlib_root()
    lines = (
        json.dumps({"path": file.relative_to(root).as_posix(), "text": file.read_text("utf-8")})
        for file in files
    )
    write_atomically(path, "".join(line + "\n" for line in lines).encode())
    return path

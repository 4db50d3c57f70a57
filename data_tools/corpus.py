"""A corpus that every Python installation carries: its own standard library's sources."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import xxhash

from data_tools.manifest import write_atomically


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


def stdlib_sources() -> list[Path]:
    """The running Python's own library as a corpus: its *.py files, sorted (12 MB in 3.11).

    Without site-packages, without the tests (many distributions ship none) and without the few
    files that are empty or not UTF-8.
    """
    root = stdlib_root()
    left_out = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    files = []
    for file in sorted(root.rglob("*.py")):
        if left_out.isdisjoint(file.relative_to(root).parts) and _is_text(file):
            files.append(file)
    return files


def stdlib_root() -> Path:
    """The folder that `stdlib_sources` lists."""
    return Path(sysconfig.get_paths()["stdlib"])


def _is_text(file: Path) -> bool:
    try:
        return bool(file.read_bytes().decode("utf-8"))
    except UnicodeDecodeError:
        return False


def split_held_out(
    files: Sequence[Path], root: str | Path, every: int = 20
) -> tuple[list[Path], list[Path]]:
    """(training, held-out) files: about one in `every` is held out, by the hash of its path.

    The path is taken relative to `root`, so the split is the same on every machine and no file
    changes sides when others come or go.
    """
    train: list[Path] = []
    held_out: list[Path] = []
    for file in files:
        name = file.relative_to(root).as_posix()
        is_held_out = xxhash.xxh3_64_intdigest(name.encode()) % every == 0
        (held_out if is_held_out else train).append(file)
    return train, held_out

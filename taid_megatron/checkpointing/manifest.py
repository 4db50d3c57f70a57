"""manifest.json of a checkpoint: size and xxh3-128 of every other file in it, and of itself.

The file is canonical JSON that ends in the hash of what it says, so any changed byte of it shows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import xxhash

from data_tools.manifest import hash_file, sync_path

MANIFEST = "manifest.json"
_SHARDS = ".distcp"

Records = dict[str, tuple[int, str]]
"""File name -> (bytes, xxh3-128 in hex)."""


def record(paths: Iterable[Path]) -> Records:
    """Bring files to the disk, and hash them meanwhile: from memory, where they still are.

    Raises OSError, with the file's name, where either fails.
    """
    paths = list(paths)
    with ThreadPoolExecutor(max_workers=1) as beside:
        hashes = beside.map(_hash, paths)
        for path in paths:
            with _named(path):
                sync_path(path)
        return {
            path.name: (path.stat().st_size, digest)
            for path, digest in zip(paths, hashes, strict=True)
        }


def _hash(path: Path) -> str:
    with _named(path):
        return hash_file(path)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What reads and syncs raise does not say of which file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write(folder: Path, records: Records) -> str:
    """Write manifest.json, to the disk; returns its own hash."""
    content, digest = _encode(records)
    with (folder / MANIFEST).open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return digest


def own_hash(folder: Path) -> str | None:
    """The hash that a checkpoint's manifest has of itself; None where it is missing or damaged."""
    records, _ = _read(folder)
    return None if records is None else _encode(records)[1]


def problem(folder: Path, *, full: bool, rank: int = 0, size: int = 1) -> str | None:
    """The first of `problems`; None where there is none."""
    return next(problems(folder, full=full, rank=rank, size=size), None)


def problems(folder: Path, *, full: bool, rank: int = 0, size: int = 1) -> Iterator[str]:
    """What is wrong with a checkpoint, file and cause, one after the other.

    Always: the manifest, that the files are those it lists, their sizes, and the hashes of all but
    the shards. full: the shards' hashes too, shared out over `size` ranks by number of file.
    """
    records, fault = _read(folder)
    if records is None:
        yield fault or ""
        return
    there = {path.name for path in folder.iterdir()} - {MANIFEST}
    yield from (f"{folder / name}: missing" for name in sorted(set(records) - there))
    yield from (f"{folder / name}: not in the manifest" for name in sorted(there - set(records)))
    whole = set()
    for name, (length, _) in records.items():
        path = folder / name
        if path.is_file() and path.stat().st_size == length:
            whole.add(name)
        elif name in there:
            yield f"{path}: {path.stat().st_size} bytes instead of {length}"
    for number, (name, (_, digest)) in enumerate(sorted(records.items())):
        if name not in whole:
            continue
        is_shard = name.endswith(_SHARDS)
        if is_shard and not (full and number % size == rank):
            continue
        if _hash(folder / name) != digest:
            yield f"{folder / name}: its content is not what was saved (another hash)"


def _encode(records: Records) -> tuple[bytes, str]:
    files = {name: list(entry) for name, entry in sorted(records.items())}
    digest = xxhash.xxh3_128(json.dumps(files).encode()).hexdigest()
    content = {"format": 1, "files": files, "xxh3": digest}
    return json.dumps(content, indent=1).encode(), digest


def _read(folder: Path) -> tuple[Records | None, str | None]:
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None, f"{path}: missing"
    except OSError as error:
        return None, f"{path}: {error.strerror}"
    try:
        files = json.loads(content)["files"]
        records = {name: (int(size), str(digest)) for name, (size, digest) in files.items()}
        if _encode(records)[0] == content and all(name == Path(name).name for name in records):
            return records, None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return None, f"{path}: damaged, its content does not fit its own hash"

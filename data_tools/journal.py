"""PREFIX.work/: what a run has done so far, so that the next call goes on from there.

    lock            held by the run that works here
    plan.json       what the run is about; another run is not mixed into it
    journal.jsonl   a line per finished unit or hashed source, in order
    tokens          the finished units' token ids; becomes PREFIX.bin
    lengths         int32 tokens of each document
    index           becomes PREFIX.idx
    manifest.json   becomes PREFIX.manifest.json; where it exists, all that is left is renaming

A line of the journal holds the hash of what the unit added. Going on reads all of it again: what
the disk did not keep, or a kill cut in two, is cut off and done anew.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TextIO

import numpy as np
import xxhash
from pydantic import BaseModel, Field

from data_tools.indexed_writer import read_table, remove_published, write_index
from data_tools.manifest import (
    MOST_LISTED,
    WRITE_BYTES,
    DataError,
    FileRecord,
    Printable,
    bin_path,
    idx_path,
    manifest_path,
    read_blocks,
    sync_path,
    write_atomically,
)
from data_tools.worker import UnitResult, lengths_file, tokens_file

# Of this folder's files, those of units and those not yet under their names included.
_NAMES = ("plan.json", "journal.jsonl", "tokens", "lengths", "index", "manifest.json", "unit-")
_SYNC_SECONDS = 10.0  # what a power cut may cost; a kill costs nothing that was finished


_Count = Annotated[int, Field(ge=0, lt=1 << 48)]  # more is no count


class UnitEntry(BaseModel):
    """A finished unit, as the journal keeps it."""

    unit: _Count
    documents: _Count
    tokens: _Count
    empty: _Count
    skipped: _Count
    skipped_rows: list[Printable]
    xxh3: str
    """Of its token ids as stored."""


class SourceEntry(BaseModel):
    """A source whose hash is known."""

    source: str
    xxh3: str


class Journal:
    """The folder of one run. A context manager: leaving it lets go of the lock."""

    def __init__(self, prefix: str | Path, plan: dict[str, Any], *, restart: bool = False):
        """Opens or makes the folder, takes its lock and reads what is done.

        plan: plain JSON values; all that the outputs depend on, `dtype` of the tokens among them.
        restart: drop what is there.
        Raises DataError where another run works there or began with another plan.
        """
        self.prefix = prefix
        self.folder = Path(f"{prefix}.work")
        self._lock = _lock_folder(self.folder)
        self.units: list[UnitEntry] = []
        self.documents = self.tokens = 0
        """Of all finished units."""
        self.sources: dict[str, str] = {}
        self._synced = time.monotonic()
        self._digest = xxhash.xxh3_128()
        self._dtype = np.dtype(plan["dtype"])
        try:
            self._open(plan, restart)
        except BaseException:
            self._lock.close()
            raise

    def _open(self, plan: dict[str, Any], restart: bool) -> None:
        described = self.folder / "plan.json"
        # Without its plan, as a restart that was cut short may leave it, work is nobody's.
        if restart or not described.exists():
            _drop_work(self.folder)
        if described.exists():
            _check_same(self.folder, _read_plan(described), plan)
        else:
            write_atomically(described, json.dumps(plan, indent=1).encode() + b"\n")
        for file in self.folder.glob("unit-*"):  # of a killed run
            file.unlink()
        self._tokens = _open_update(self.folder / "tokens")
        self._lengths = _open_update(self.folder / "lengths")
        self._lines = self._read_back()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self._tokens, self._lengths, self._lines):
            # A full disk fails here once more; what is not whole is cut off by the next run.
            with suppress(OSError):
                stream.close()
        if self.folder.exists():
            for file in self.folder.glob("unit-*"):
                file.unlink()
            if not self.units:
                shutil.rmtree(self.folder)
        self._lock.close()

    def add_unit(self, result: UnitResult, token_budget: int | None) -> None:
        """Takes over the next unit's files; up to the document that reaches the budget."""
        number = len(self.units)
        tokens, lengths = (path(self.folder, number) for path in (tokens_file, lengths_file))
        if token_budget is not None and self.tokens + result.tokens >= token_budget:
            result = _cut(result, tokens, lengths, self._dtype, token_budget - self.tokens)
        digest = xxhash.xxh3_128()
        for block in read_blocks(tokens):
            digest.update(block)
            self._digest.update(block)
            self._tokens.write(block)
        for block in read_blocks(lengths):
            self._lengths.write(block)
        entry = UnitEntry(**result._asdict(), unit=number, xxh3=digest.hexdigest())
        self._tokens.flush()
        self._lengths.flush()
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self._sync()
        self._write_line(entry)
        self._count(entry)
        tokens.unlink()
        lengths.unlink()

    def _count(self, entry: UnitEntry) -> None:
        self.units.append(entry)
        self.documents += entry.documents
        self.tokens += entry.tokens

    def add_source(self, name: str, xxh3: str) -> None:
        """Remembers a source's hash."""
        self._write_line(SourceEntry(source=name, xxh3=xxh3))
        self.sources[name] = xxh3

    def _write_line(self, entry: BaseModel) -> None:
        self._lines.write(entry.model_dump_json() + "\n")
        self._lines.flush()

    def _sync(self) -> None:
        for stream in (self._tokens, self._lengths, self._lines):
            os.fsync(stream.fileno())
        self._synced = time.monotonic()

    def _read_back(self) -> TextIO:
        """Reads the journal, checks what it tells of, cuts off what is not whole."""
        path = self.folder / "journal.jsonl"
        path.touch()
        good = 0
        ends = [0, 0]
        for line in path.read_bytes().splitlines(keepends=True):
            entry = _parsed(line)
            if entry is None or (isinstance(entry, UnitEntry) and not self._is_kept(entry, ends)):
                break
            if isinstance(entry, UnitEntry):
                self._count(entry)
            else:
                self.sources[entry.source] = entry.xxh3
            good += len(line)
        os.truncate(path, good)
        for stream, end in zip((self._tokens, self._lengths), ends, strict=True):
            stream.truncate(end)
            stream.seek(end)
        return path.open("a", encoding="utf-8")

    def _is_kept(self, entry: UnitEntry, ends: list[int]) -> bool:
        """Whether the unit's bytes are there; moves `ends` behind them."""
        if entry.unit != len(self.units):
            return False
        if os.fstat(self._lengths.fileno()).st_size < ends[1] + 4 * entry.documents:
            return False
        self._lengths.seek(ends[1])
        raw = self._lengths.read(4 * entry.documents)
        if np.frombuffer(raw, np.int32).sum(dtype=np.int64) != entry.tokens:
            return False
        self._tokens.seek(ends[0])
        left = size = entry.tokens * self._dtype.itemsize
        digest, running = xxhash.xxh3_128(), self._digest.copy()
        while left and (block := self._tokens.read(min(left, 1 << 20))):
            digest.update(block)
            running.update(block)
            left -= len(block)
        if left or digest.hexdigest() != entry.xxh3:
            return False
        self._digest = running
        ends[0] += size
        ends[1] += len(raw)
        return True

    def write_outputs(self) -> list[FileRecord]:
        """Writes the index beside the tokens; both reach the disk. Their records."""
        self._sync()
        digest = xxhash.xxh3_128()
        index = self.folder / "index"
        with index.open("wb", buffering=1 << 20) as stream:

            def write(content: bytes | memoryview) -> None:
                digest.update(content)
                stream.write(content)

            write_index(
                write,
                self._dtype,
                self.documents,
                self.documents,
                lambda: read_table(self._lengths, np.int32),
            )
            stream.flush()
            os.fsync(stream.fileno())
        return [
            FileRecord(
                name=bin_path(self.prefix).name,
                bytes=self.tokens * self._dtype.itemsize,
                xxh3=self._digest.hexdigest(),
            ),
            FileRecord(
                name=idx_path(self.prefix).name,
                bytes=index.stat().st_size,
                xxh3=digest.hexdigest(),
            ),
        ]

    def publish(self, manifest: bytes) -> None:
        """Gives the outputs their names and removes the folder; may be cut short anywhere."""
        write_atomically(self.folder / "manifest.json", manifest)
        _rename_all(self.prefix, self.folder)

    @property
    def skipped_rows(self) -> list[str]:
        """The first rows that were left out."""
        return [row for entry in self.units for row in entry.skipped_rows][:MOST_LISTED]


def finish_publishing(prefix: str | Path) -> None:
    """Renames what a run that was cut short while publishing has left."""
    folder = Path(f"{prefix}.work")
    if not (folder / "manifest.json").exists():
        return
    with _lock_folder(folder):
        if (folder / "manifest.json").exists():
            _rename_all(prefix, folder)


def _rename_all(prefix: str | Path, folder: Path) -> None:
    tokens, index = folder / "tokens", folder / "index"
    if tokens.exists():
        # In this order a cut leaves an index missing, never one that belongs to other data.
        remove_published(prefix)
        tokens.replace(bin_path(prefix))
    if index.exists():
        index.replace(idx_path(prefix))
    (folder / "manifest.json").replace(manifest_path(prefix))
    sync_path(folder.parent)
    shutil.rmtree(folder)


def _parsed(line: bytes) -> UnitEntry | SourceEntry | None:
    if not line.endswith(b"\n"):
        return None
    try:
        values = json.loads(line)
        return (UnitEntry if "unit" in values else SourceEntry).model_validate(values)
    except (ValueError, TypeError, RecursionError):  # also of what is no object
        return None


def _cut(
    result: UnitResult, tokens: Path, lengths: Path, dtype: np.dtype, budget: int
) -> UnitResult:
    """The unit's first documents, up to the one that reaches `budget` tokens."""
    ends = np.cumsum(np.fromfile(lengths, np.int32), dtype=np.int64)
    documents = int(np.searchsorted(ends, budget)) + 1
    os.truncate(lengths, 4 * documents)
    os.truncate(tokens, int(ends[documents - 1]) * dtype.itemsize)
    return result._replace(documents=documents, tokens=int(ends[documents - 1]))


def _open_update(path: Path) -> BinaryIO:
    path.touch()
    return path.open("r+b", buffering=WRITE_BYTES)


def _lock_folder(folder: Path) -> BinaryIO:
    """The folder's lock, held until it is closed or the process ends. Makes the folder."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = (folder / "lock").open("ab")
        except FileNotFoundError:  # another run has just finished here
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise DataError(
                f"{folder}: another run is working there; wait for it, or give another --out"
            ) from error
        try:
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / "lock")):
                return lock
        except FileNotFoundError:
            pass
        lock.close()


def _drop_work(folder: Path) -> None:
    """Raises DataError where the folder holds something else."""
    files = [file for file in folder.iterdir() if file.name != "lock"]
    for file in files:
        if not file.name.startswith(_NAMES) or file.is_dir():
            raise DataError(
                f"{file}: no file of a run of prepare, whose folder this would be; move it away, "
                "or give another --out"
            )
    for file in files:
        file.unlink()


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        plan = None
    if not isinstance(plan, dict):
        raise DataError(f"{path}: damaged; drop the work in its folder with --restart")
    return plan


def _check_same(folder: Path, begun: dict[str, Any], plan: dict[str, Any]) -> None:
    plan = json.loads(json.dumps(plan))
    different = [key for key in {**begun, **plan} if begun.get(key) != plan.get(key)]
    if different:
        raise DataError(
            f"{folder}: begun with other {', '.join(different)}; give what it was begun with, or "
            "drop its work with --restart"
        )

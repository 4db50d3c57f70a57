"""Documents from files: plain text (one document per file) and JSON lines, in a fixed order."""

from __future__ import annotations

import glob
import gzip
import io
import json
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from data_tools.manifest import DataError, FileRecord

JSON_LINES = (".jsonl", ".jsonl.gz")
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    """A text and where it came from: a file, or a file and a row counted from 1."""

    text: str
    source: str


class Corpus:
    """The documents of some inputs, in order. Iterating reads the files anew.

    `records` names the files read whole in the current pass; `bytes_read` of `bytes_total` (as
    stored: of a .gz the compressed bytes) tells how far it is.
    """

    def __init__(self, inputs: Sequence[str | Path], text_column: str = "text"):
        self.files = find_files(inputs)
        self.text_column = text_column
        self.bytes_total = sum(file.stat().st_size for file in self.files)
        self.bytes_read = 0
        self.records: list[FileRecord] = []

    def __iter__(self) -> Iterator[Document]:
        self.bytes_read = 0
        self.records = []
        for file in self.files:
            with _HashingReader(file, self) as raw:
                if file.name.endswith(JSON_LINES):
                    yield from _json_lines(file, raw, self.text_column)
                else:
                    yield Document(_utf8(raw.readall(), str(file)), str(file))
                self.records.append(raw.record())


class _HashingReader(io.FileIO):
    """A file that hashes what is read from it, so that sources are read once."""

    def __init__(self, path: Path, corpus: Corpus):
        super().__init__(path)
        self.path = path
        self.corpus = corpus
        self.digest = xxhash.xxh3_128()
        self.bytes = 0

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def, override]
        count = super().readinto(buffer)
        self._count(memoryview(buffer)[:count])
        return count

    def readall(self) -> bytes:
        content = super().readall()
        self._count(content)
        return content

    def _count(self, content: bytes | memoryview) -> None:
        self.digest.update(content)
        self.bytes += len(content)
        self.corpus.bytes_read += len(content)

    def record(self) -> FileRecord:
        return FileRecord(name=str(self.path), bytes=self.bytes, xxh3=self.digest.hexdigest())


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """The files that the inputs name: files, folders (all files below) and glob patterns.

    In the order of the inputs, sorted by name within a folder or a pattern; below a folder, hidden
    files and folders and `__pycache__` are left out. Raises DataError where an input names nothing
    or a file comes twice.
    """
    if not inputs:
        raise DataError("no inputs; give files, folders or patterns")
    files: list[Path] = []
    for given in inputs:
        path = Path(given)
        if path.is_file():
            found = [path]
        elif path.is_dir():
            found = sorted(file for file in path.rglob("*") if _is_visible(file, path))
        else:
            found = sorted(Path(name) for name in glob.glob(str(given), recursive=True))
            found = [file for file in found if file.is_file()]
        if not found:
            raise DataError(f"{given}: no such file, or no file in it; check the path")
        files += found
    seen: set[Path] = set()
    for file in files:
        if file in seen:
            raise DataError(f"{file}: given twice; name it once and weigh data in the blend")
        seen.add(file)
    return files


def _is_visible(file: Path, folder: Path) -> bool:
    parts = file.relative_to(folder).parts
    hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
    return file.is_file() and not hidden


def _utf8(raw: bytes, source: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source}: not UTF-8 (byte {error.start}); convert the file or leave it out"
        ) from error


def _json_lines(file: Path, raw: _HashingReader, text_column: str) -> Iterator[Document]:
    lines = io.BufferedReader(raw, _READ_BYTES)
    stream: Iterable[bytes] = lines
    if file.suffix == ".gz":
        stream = gzip.GzipFile(fileobj=lines, mode="rb")
    row = 0
    try:
        for row, line in enumerate(stream, start=1):
            if line.strip():
                source = f"{file}, row {row}"
                yield Document(_text(_utf8(line, source), text_column, source), source)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{file}, after row {row}: damaged or cut-off gzip ({error}); fetch the file again"
        ) from error


def _text(line: str, text_column: str, source: str) -> str:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(
            f"{source}: not valid JSON, or cut off ({error}); mend or remove the row"
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{source}: a JSON {type(row).__name__}; each row must be an object")
    if text_column not in row:
        columns = ", ".join(map(str, row)) or "none"
        raise DataError(
            f"{source}: no column {text_column!r} (it has: {columns}); choose one with "
            "--text-column"
        )
    text = row[text_column]
    if not isinstance(text, str):
        raise DataError(
            f"{source}: column {text_column!r} holds {type(text).__name__}, not text; mend or "
            "remove the row"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{source}: half of a surrogate pair at character {error.start}; mend the row"
        ) from error
    return text


def sample_texts(documents: Iterable[Document], max_bytes: int) -> list[str]:
    """Whole documents spread evenly over the corpus, together at most max_bytes (UTF-8).

    One pass: every n-th document is kept, and n doubles whenever the kept ones grow too large.
    The first document is kept whatever its size.
    """
    kept: list[tuple[str, int]] = []
    stride, size = 1, 0
    for number, document in enumerate(documents):
        if number % stride:
            continue
        kept.append((document.text, len(document.text.encode("utf-8"))))
        size += kept[-1][1]
        while size > max_bytes and len(kept) > 1:
            kept = kept[::2]
            stride *= 2
            size = sum(length for _, length in kept)
    return [text for text, _ in kept]


def stdlib_sources() -> list[Path]:
    """The running Python's own library as a corpus: its *.py files, sorted (12 MB in 3.11).

    Without site-packages, without the tests (many distributions ship none) and without the few
    files that are not UTF-8.
    """
    root = stdlib_root()
    left_out = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    files = []
    for file in sorted(root.rglob("*.py")):
        if left_out.isdisjoint(file.relative_to(root).parts) and _is_utf8(file):
            files.append(file)
    return files


def stdlib_root() -> Path:
    """The folder that `stdlib_sources` lists."""
    return Path(sysconfig.get_paths()["stdlib"])


def _is_utf8(file: Path) -> bool:
    try:
        file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


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

"""Which files the inputs name, in a fixed order, and their documents one after the other."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data_tools.hub import fetch_from_hub, is_on_hub
from data_tools.manifest import DataError
from data_tools.readers import FORMATS, kind_of
from data_tools.rows import Document, Format, ReadOptions


class Source(NamedTuple):
    """A file, and what it was like when it was found."""

    path: Path
    kind: str
    bytes: int
    mtime_ns: int

    @property
    def format(self) -> Format:
        """How it is read."""
        return FORMATS[self.kind]


class Corpus:
    """The documents of some inputs, in order; empty texts are left out.

    Iterating reads the files anew. Raises DataError at the first row that cannot be used.
    """

    def __init__(self, inputs: Sequence[str | Path], text_column: str = "text"):
        self.sources = find_sources(inputs)
        self.options = ReadOptions(text_column)

    def __iter__(self) -> Iterator[Document]:
        for source in self.sources:
            for piece in source.format.pieces(source.path, self.options):
                for row in source.format.read(source.path, piece, self.options):
                    if isinstance(row, Document):
                        yield row
                    elif not row.is_empty:
                        raise DataError(str(row))


def find_sources(inputs: Sequence[str | Path]) -> list[Source]:
    """The files that the inputs name: files, folders (all files below), patterns, hub datasets.

    In the order of the inputs, sorted by name within a folder or a pattern; below a folder, hidden
    files and folders and `__pycache__` are left out. `hf://datasets/OWNER/NAME[/FOLDER]` is fetched
    into the hub's cache. Raises DataError where an input names nothing, a file comes twice, or a
    folder mixes tables with other files.
    """
    if not inputs:
        raise DataError("no inputs; give files, folders or patterns")
    files: list[Path] = []
    for given in inputs:
        files += _files(given)
    seen: set[Path] = set()
    for file in files:
        if file in seen:
            raise DataError(f"{file}: given twice; name it once and weigh data in the blend")
        seen.add(file)
    stats = [file.stat() for file in files]
    return [
        Source(file, kind_of(file), stat.st_size, stat.st_mtime_ns)
        for file, stat in zip(files, stats, strict=True)
    ]


def _files(given: str | Path) -> list[Path]:
    path = Path(given)
    if is_on_hub(given):
        path = fetch_from_hub(str(given))
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if _is_visible(file, path))
        _check_one_kind(path, found)
    else:
        found = sorted(Path(name) for name in glob.glob(str(given), recursive=True))
        found = [file for file in found if file.is_file()]
    if not found:
        raise DataError(f"{given}: no such file, or no file in it; check the path")
    return found


def _is_visible(file: Path, folder: Path) -> bool:
    parts = file.relative_to(folder).parts
    hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
    return file.is_file() and not hidden


def _check_one_kind(folder: Path, files: list[Path]) -> None:
    """A README beside Parquet files is no document, and no guess is made that it is none."""
    kinds = {kind_of(file): file for file in files}
    if "text" in kinds and len(kinds) > 1:
        kind, other = next((kind, file) for kind, file in kinds.items() if kind != "text")
        raise DataError(
            f"{folder}: holds {kind} files and others ({kinds['text'].name}); name those that are "
            f"meant by a pattern, such as '{folder}/**/*{other.suffix}'"
        )


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

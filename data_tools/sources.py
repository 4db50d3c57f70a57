"""Which files the inputs name, in a fixed order, and their documents one after the other."""

from __future__ import annotations

import functools
import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data_tools.hub import fetch_from_hub, is_blob, is_on_hub
from data_tools.manifest import DataError, printable
from data_tools.readers import FORMATS, kind_of
from data_tools.rows import Document, Format, ReadOptions


class Source(NamedTuple):
    """A file, and what it was like when it was found."""

    path: Path
    kind: str
    bytes: int
    mtime_ns: int

    @property
    def name(self) -> str:
        """Its path, as records can hold it."""
        return printable(self.path)

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


def find_sources(
    inputs: Sequence[str | Path], *, outputs: str | Path | None = None
) -> list[Source]:
    """The files that the inputs name: files, folders (all files below), patterns, hub datasets.

    In the order of the inputs, sorted by name within a folder or a pattern; below a folder, hidden
    files and folders and `__pycache__` are left out, and links are followed.
    `hf://datasets/OWNER/NAME[/FOLDER]` is fetched into the hub's cache. outputs: the prefix that is
    to be written. Raises DataError where an input names nothing, or something that is neither a
    file nor a folder, a file comes twice, a folder mixes tables with other files, cannot be read,
    or is where the outputs are to lie.
    """
    if not inputs:
        raise DataError("no inputs; give files, folders or patterns")
    # What is amiss with local inputs shows before anything is downloaded.
    local = {given: _find(given, outputs) for given in inputs if not is_on_hub(given)}
    sources: list[Source] = []
    for given in inputs:
        sources += local[given] if given in local else _find(given, outputs)
    _check_once(sources)
    return sources


def _find(given: str | Path, outputs: str | Path | None) -> list[Source]:
    path = fetch_from_hub(str(given)) if is_on_hub(given) else Path(given)
    if path.is_file():
        return [_source(path)]
    if path.is_dir():
        found = [_source(file) for file in _files_below(path, outputs)]
        _check_one_kind(path, found)
    else:
        names = sorted(Path(name) for name in glob.glob(str(given), recursive=True))
        found = [_source(file) for file in names if not os.path.isdir(file)]
    if not found:
        raise DataError(f"{given}: no such file, or no file in it; check the path")
    return found


def _source(file: Path) -> Source:
    """Raises DataError where it is no file."""
    try:
        found = file.stat()
    except FileNotFoundError:
        fault = "a link to nothing, or gone meanwhile"
    except OSError as error:
        fault = f"cannot be read ({error.strerror})"
    else:
        if stat.S_ISREG(found.st_mode):
            return Source(file, kind_of(file), found.st_size, found.st_mtime_ns)
        fault = "neither a file nor a folder"
    raise DataError(f"{file}: {fault}; mend it, or name the files that are meant by a pattern")


def _files_below(folder: Path, outputs: str | Path | None) -> list[Path]:
    """All that is visible and no folder, in order. Raises DataError where a folder is amiss."""
    found: list[Path] = []
    walked: dict[Path, Path] = {}
    waiting = [folder]
    while waiting:
        inner = waiting.pop()
        real = Path(os.path.realpath(inner))
        if real in walked:  # by a link; one to a folder around it would never end
            raise DataError(
                f"{inner}: the same folder as {walked[real]}; remove the link, or name the files "
                "that are meant by a pattern"
            )
        walked[real] = inner
        files, folders = _listed(inner)
        found += files
        waiting += folders
    if outputs is not None:
        _check_apart(folder, walked, outputs)
    return sorted(found)


def _listed(folder: Path) -> tuple[list[Path], list[Path]]:
    """(files and the like, folders) that a folder shows."""
    files: list[Path] = []
    folders: list[Path] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.name != "__pycache__":
                    (folders if os.path.isdir(entry) else files).append(Path(entry.path))
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be read ({error.strerror}); mend it, or name the files that are "
            "meant by a pattern"
        ) from error
    return files, folders


def _check_apart(folder: Path, walked: Iterable[Path], outputs: str | Path) -> None:
    """What a killed run leaves would be read as input by the next."""
    around = Path(os.path.realpath(Path(outputs).parent))
    if not {around, *around.parents}.isdisjoint(walked):
        raise DataError(
            f"{outputs} lies in the input folder {folder}; give an --out elsewhere, or name the "
            "inputs by a pattern"
        )


def _check_once(sources: Sequence[Source]) -> None:
    """Raises DataError where two names are those of one file."""
    real_folder = functools.cache(os.path.realpath)
    seen: dict[str, Path] = {}
    for file in (source.path for source in sources):
        real = os.path.join(real_folder(file.parent), file.name)
        if os.path.islink(real) and not is_blob(target := Path(os.path.realpath(real))):
            real = str(target)
        if real in seen:
            also = "" if seen[real] == file else f", also as {seen[real]}"
            raise DataError(f"{file}: given twice{also}; name it once and weigh data in the blend")
        seen[real] = file


def _check_one_kind(folder: Path, sources: Sequence[Source]) -> None:
    """A README beside Parquet files is no document, and no guess is made that it is none."""
    kinds = {source.kind: source.path for source in sources}
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

"""The contents of SmolLM-Corpus' python-edu part, which holds blob ids only.

Each content is a gzip object of the Software Heritage archive, found by its id. Some were deleted
at their authors' wish. OUT/text/ gets JSON lines in the order of the ids, one file per PART_ROWS
rows of the input; OUT/left-out/ names, file by file, the ids without a usable content, and why. A
file appears when all of its ids were answered: the next call goes on with those that are missing.
"""

from __future__ import annotations

import gzip
import http.client
import json
import random
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from data_tools.manifest import DataError, write_atomically
from data_tools.readers import FORMATS
from data_tools.rows import Document, Piece, ReadOptions
from data_tools.sources import find_sources

ENDPOINT = "https://softwareheritage.s3.amazonaws.com/content"
PART_ROWS = 5000
# A part of at least so many rows, all of them gone, tells of the address rather than of the rows.
_ALL_GONE = 100
# Answers that another try does not change: the object is not there, or not for us.
_GONE = {403: "forbidden", 404: "deleted", 410: "deleted"}


@dataclass(frozen=True)
class FetchSettings:
    """How to fetch."""

    endpoint: str = ENDPOINT
    connections: int = 64
    tries: int = 8
    """Per content; the waits between them double from first_wait, up to a minute, at random."""
    first_wait: float = 0.5
    timeout: float = 30.0
    """Seconds without a byte."""


class Content(NamedTuple):
    """What became of one blob id: a text, or the reason for having none."""

    blob_id: str
    text: str | None
    note: str | None = None


@dataclass(frozen=True)
class FetchProgress:
    """Counts so far, those of earlier calls included."""

    parts: int
    parts_total: int
    contents: int
    left_out: int


def fetch_python_edu(
    inputs: Sequence[str | Path],
    out: str | Path,
    settings: FetchSettings | None = None,
    progress: Callable[[FetchProgress], None] = lambda state: None,
) -> FetchProgress:
    """Fetches the contents of the `blob_id` column of the inputs (Parquet) into OUT.

    Raises DataError where an input is no such table, a content could not be had after all tries, or
    none of a whole part is there (what is done stays, and the same call goes on).
    """
    settings = settings or FetchSettings()
    folders = Path(out) / "text", Path(out) / "left-out"
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    parts = _parts(inputs)
    _check_same_parts(Path(out) / "parts.json", parts)
    contents = left_out = 0
    with ThreadPoolExecutor(settings.connections) as pool:
        client = _Client(settings)
        for number, (file, piece) in enumerate(parts):
            name = f"part-{number:05d}"
            done = folders[1] / f"{name}.jsonl"
            if not done.exists():
                found = list(pool.map(client.fetch, _blob_ids(file, piece)))
                if len(found) >= _ALL_GONE and not any(content.text for content in found):
                    notes = ", ".join(sorted({content.note or "" for content in found}))
                    raise DataError(
                        f"{settings.endpoint}: none of {len(found)} contents is there ({notes}); "
                        "check --endpoint and the network"
                    )
                _write_part(found, folders[0] / f"{name}.jsonl.gz", done)
            lines = [json.loads(line) for line in done.read_text("utf-8").splitlines()]
            missing = sum(not line["kept"] for line in lines)
            left_out += missing
            contents += piece.stop - piece.start - missing
            progress(FetchProgress(number + 1, len(parts), contents, left_out))
    return FetchProgress(len(parts), len(parts), contents, left_out)


def _parts(inputs: Sequence[str | Path]) -> list[tuple[Path, Piece]]:
    options = ReadOptions("blob_id")
    parts = []
    for source in find_sources(inputs):
        if source.kind != "parquet":
            raise DataError(f"{source.path}: not a Parquet file; give python-edu's")
        pieces = source.format.pieces(source.path, options)
        rows = pieces[-1].stop if pieces else 0
        parts += [
            (source.path, Piece(start, min(start + PART_ROWS, rows), 0))
            for start in range(0, rows, PART_ROWS)
        ]
    return parts


def _check_same_parts(path: Path, parts: list[tuple[Path, Piece]]) -> None:
    described = [[str(file), piece.start, piece.stop] for file, piece in parts]
    if not path.exists():
        write_atomically(path, json.dumps(described).encode())
    elif json.loads(path.read_bytes()) != described:
        raise DataError(f"{path}: begun with other inputs; give those, or another --out")


def _blob_ids(file: Path, piece: Piece) -> Iterator[str]:
    for row in FORMATS["parquet"].read(file, piece, ReadOptions("blob_id")):
        if not isinstance(row, Document):
            raise DataError(str(row))
        # It becomes a part of an address.
        if not row.text.isalnum() or not row.text.isascii():
            raise DataError(f"{row.source}: {row.text[:60]!r} is no blob id; fetch the file again")
        yield row.text


def _write_part(found: list[Content], texts: Path, left_out: Path) -> None:
    lines = [
        json.dumps({"blob_id": content.blob_id, "text": content.text}) + "\n"
        for content in found
        if content.text
    ]
    notes = [
        json.dumps({"blob_id": content.blob_id, "note": content.note, "kept": bool(content.text)})
        for content in found
        if content.note
    ]
    if lines:
        # Without a time stamp, the same contents give the same bytes.
        write_atomically(texts, gzip.compress("".join(lines).encode(), mtime=0))
    # Last: where it exists, the part is done.
    write_atomically(left_out, "".join(note + "\n" for note in notes).encode())


class _Client:
    """Keeps a connection per thread."""

    def __init__(self, settings: FetchSettings):
        self.settings = settings
        self.address = urlsplit(settings.endpoint.rstrip("/"))
        kinds = {"https": http.client.HTTPSConnection, "http": http.client.HTTPConnection}
        if self.address.scheme not in kinds or not self.address.hostname:
            raise DataError(f"{settings.endpoint}: not an http(s) address; give another --endpoint")
        self._kind = kinds[self.address.scheme]
        self._local = threading.local()

    def fetch(self, blob_id: str) -> Content:
        """The content, or why there is none. Raises DataError after the last try."""
        reason = ""
        for attempt in range(self.settings.tries):
            if attempt:
                longest = min(60.0, self.settings.first_wait * 2 ** (attempt - 1))
                time.sleep(random.uniform(longest / 2, longest))
            try:
                status, body = self._get(blob_id)
                if status in _GONE:
                    return Content(blob_id, None, _GONE[status])
                if status == 200:
                    return _decoded(blob_id, gzip.decompress(body))
                reason = f"status {status}"
            except (http.client.HTTPException, OSError, EOFError, zlib.error) as error:
                self._close()
                reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{self.settings.endpoint}/{blob_id}: no content after {self.settings.tries} tries "
            f"({' '.join(reason.split())}); the same command goes on from here"
        )

    def _get(self, blob_id: str) -> tuple[int, bytes]:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._kind(
                self.address.netloc, timeout=self.settings.timeout
            )
        connection.request("GET", f"{self.address.path}/{blob_id}")
        response = connection.getresponse()
        return response.status, response.read()

    def _close(self) -> None:
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None


def _decoded(blob_id: str, raw: bytes) -> Content:
    """As the data set's own recipe: bytes that are not UTF-8 are left out, and that is noted."""
    if not raw:
        return Content(blob_id, None, "empty")
    try:
        return Content(blob_id, raw.decode("utf-8"))
    except UnicodeDecodeError:
        note = "bytes that are not UTF-8 left out"
        return Content(blob_id, raw.decode("utf-8", errors="ignore"), note)

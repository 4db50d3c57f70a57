"""The contents of SmolLM-Corpus' python-edu part, which holds blob ids only.

Each content is a gzip object of the Software Heritage archive, found by its id. Some were deleted
at their authors' wish. OUT/text/ gets JSON lines in the order of the ids, one file per PART_ROWS
rows of the input; OUT/left-out/ names, file by file, the ids without a usable content, and why. A
file appears when all of its ids were answered: the next call goes on with those that are missing.
OUT/parts.json says which rows the parts are of.
"""

from __future__ import annotations

import gzip
import http.client
import json
import random
import re
import ssl
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from data_tools.manifest import DataError, write_atomically
from data_tools.readers import FORMATS
from data_tools.rows import Document, Piece, ReadOptions, one_line
from data_tools.sources import find_sources

ENDPOINT = "https://softwareheritage.s3.amazonaws.com/content"
PART_ROWS = 5000
# A part of at least so many rows, all of them gone, tells of the address rather than of the rows.
_ALL_GONE = 100
# Answers that another try does not change: the object is not there, or not for us.
_GONE = {403: "forbidden", 404: "deleted", 410: "deleted"}
_PORTS = {"http": 80, "https": 443}
_PATH = re.compile("[!-~]*")


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

    Raises DataError where an input is no such table, the settings are no such, OUT holds parts of
    other inputs or of unknown ones, a content could not be had after all tries, or none of a whole
    part is there (what is done stays, and the same call goes on). Whatever ends it, nothing more is
    asked for.
    """
    settings = settings or FetchSettings()
    out = Path(out)
    client = _Client(settings)
    parts = _parts(inputs, out)
    _begin(out, parts)
    contents = left_out = 0
    with client:
        for number, (file, piece) in enumerate(parts):
            missing = _missing(out, number, piece)
            if missing is None:
                found = client.fetch_all(list(_blob_ids(file, piece)))
                _check_some_there(found, settings.endpoint)
                _write_part(found, *_files(out, number))
                missing = sum(not content.text for content in found)
            left_out += missing
            contents += piece.stop - piece.start - missing
            progress(FetchProgress(number + 1, len(parts), contents, left_out))
    return FetchProgress(len(parts), len(parts), contents, left_out)


def _parts(inputs: Sequence[str | Path], out: Path) -> list[tuple[Path, Piece]]:
    options = ReadOptions("blob_id")
    parts = []
    for source in find_sources(inputs, outputs=out / "text"):
        if source.kind != "parquet":
            raise DataError(f"{source.path}: not a Parquet file; give python-edu's")
        try:
            pieces = source.format.pieces(source.path, options)
        except DataError as error:  # its mend is for prepare
            fault = str(error).rpartition("; ")[0]
            raise DataError(f"{fault}; give python-edu's Parquet files") from error
        rows = pieces[-1].stop if pieces else 0
        parts += [
            (source.path, Piece(start, min(start + PART_ROWS, rows), 0))
            for start in range(0, rows, PART_ROWS)
        ]
    return parts


def _files(out: Path, number: int) -> tuple[Path, Path]:
    """(the part's texts, its left-out rows)"""
    name = f"part-{number:05d}.jsonl"
    return out / "text" / f"{name}.gz", out / "left-out" / name


def _begin(out: Path, parts: list[tuple[Path, Piece]]) -> None:
    """Makes the folders. Raises DataError where they hold parts that are not known to be these."""
    plan = out / "parts.json"
    described = [[str(file), piece.start, piece.stop] for file, piece in parts]
    for folder in (out / "text", out / "left-out"):
        folder.mkdir(parents=True, exist_ok=True)
    held = any(any((out / name).glob("part-*")) for name in ("text", "left-out"))
    if not plan.exists() and not held:
        write_atomically(plan, json.dumps(described).encode())
        return
    begun = _read_plan(plan)
    if begun is None:
        raise DataError(
            f"{plan}: missing or damaged, so whose parts lie beside it is not known; give another "
            "--out, or remove text/, left-out/ and parts.json there"
        )
    if begun != described:
        raise DataError(f"{plan}: begun with other inputs; give those, or another --out")


def _read_plan(plan: Path) -> list[list[str | int]] | None:
    """None where it is missing, damaged or of another form."""
    try:
        begun = json.loads(plan.read_bytes())
        is_plan = all([*map(type, row)] == [str, int, int] for row in begun)
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return None
    return begun if is_plan and isinstance(begun, list) else None


def _missing(out: Path, number: int, piece: Piece) -> int | None:
    """How many rows of a part have no content; None where the part is still to be fetched."""
    texts, left_out = _files(out, number)
    try:
        lines = [json.loads(line) for line in left_out.read_text("utf-8").splitlines()]
        missing = sum(not line["kept"] for line in lines)
    except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
        return None
    rows = piece.stop - piece.start
    is_there = texts.is_file() and texts.stat().st_size > 0
    return missing if missing == rows or (missing < rows and is_there) else None


def _blob_ids(file: Path, piece: Piece) -> Iterator[str]:
    for row in FORMATS["parquet"].read(file, piece, ReadOptions("blob_id")):
        if not isinstance(row, Document):
            raise DataError(str(row))
        # It becomes a part of an address.
        if not row.text.isalnum() or not row.text.isascii():
            raise DataError(f"{row.source}: {row.text[:60]!r} is no blob id; fetch the file again")
        yield row.text


def _check_some_there(found: list[Content], endpoint: str) -> None:
    if len(found) >= _ALL_GONE and not any(content.text for content in found):
        notes = ", ".join(sorted({content.note or "" for content in found}))
        raise DataError(
            f"{endpoint}: none of {len(found)} contents is there ({notes}); check --endpoint and "
            "the network"
        )


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
    # Of a part that is fetched again, the old files do not stay beside the new ones.
    left_out.unlink(missing_ok=True)
    texts.unlink(missing_ok=True)
    if lines:
        # Without a time stamp, the same contents give the same bytes.
        write_atomically(texts, gzip.compress("".join(lines).encode(), mtime=0))
    # Last: where it exists, the part is done.
    write_atomically(left_out, "".join(note + "\n" for note in notes).encode())


class _Client:
    """Asks from several threads, each with a connection. A context manager: leaving it ends them.

    They are daemons, and not an executor's: a process that is to end waits for none of them,
    whatever it waits for itself.
    """

    def __init__(self, settings: FetchSettings):
        """Raises DataError where the settings are none."""
        if settings.connections < 1 or settings.tries < 1:
            raise DataError("connections and tries; give numbers above 0")
        self.settings = settings
        open_one, self._path = _opened(settings)
        self._threads = [
            threading.Thread(target=self._work, args=(open_one(),), name="fetching", daemon=True)
            for _ in range(min(settings.connections, PART_ROWS))
        ]
        self._asked: SimpleQueue[tuple[int, str] | None] = SimpleQueue()
        self._answers: SimpleQueue[tuple[int, Content | BaseException]] = SimpleQueue()
        self._stopped = threading.Event()

    def __enter__(self) -> _Client:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        for _ in self._threads:
            self._asked.put(None)

    def fetch_all(self, blob_ids: Sequence[str]) -> list[Content]:
        """The contents in the order of the ids.

        Raises DataError where one fails after the last try: no other is asked for any more.
        """
        for question in enumerate(blob_ids):
            self._asked.put(question)
        found: dict[int, Content] = {}
        while len(found) < len(blob_ids):
            number, answer = self._answers.get()
            if isinstance(answer, BaseException):
                raise answer
            found[number] = answer
        return [found[number] for number in range(len(blob_ids))]

    def _work(self, connection: http.client.HTTPConnection) -> None:
        while (question := self._asked.get()) and not self._stopped.is_set():
            number, blob_id = question
            try:
                self._answers.put((number, self._fetch(connection, blob_id)))
            except BaseException as error:  # for the caller, who waits for an answer
                self._answers.put((number, error))
                self._stopped.set()
        connection.close()

    def _fetch(self, connection: http.client.HTTPConnection, blob_id: str) -> Content:
        reason = ""
        for attempt in range(self.settings.tries):
            longest = min(60.0, self.settings.first_wait * 2 ** min(attempt - 1, 30))
            if attempt and self._stopped.wait(random.uniform(longest / 2, longest)):
                break  # nobody waits for this answer any more
            try:
                connection.request("GET", f"{self._path}/{blob_id}")
                response = connection.getresponse()
                status, body = response.status, response.read()
                if status in _GONE:
                    return Content(blob_id, None, _GONE[status])
                # No object is zero bytes: gzip's head and end are some twenty.
                if status == 200 and body:
                    return _decoded(blob_id, gzip.decompress(body))
                reason = f"status {status}, {len(body)} bytes"
            except (http.client.HTTPException, OSError, EOFError, zlib.error) as error:
                connection.close()
                reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{self.settings.endpoint}/{blob_id}: no content after {self.settings.tries} tries "
            f"({one_line(reason)}); the same command goes on from here"
        )


def _opened(settings: FetchSettings) -> tuple[Callable[[], http.client.HTTPConnection], str]:
    """(what makes a connection, the path on it). Raises DataError where no such address can be."""
    try:
        address = urlsplit(settings.endpoint.rstrip("/"))
        host, port = (address.hostname or "").encode("idna").decode(), address.port
        is_address = host and address.username is None and not address.query + address.fragment
        # What is not ASCII, or a blank, would have to be written otherwise, and how is not clear.
        if address.scheme not in _PORTS or not is_address or not _PATH.fullmatch(address.path):
            raise ValueError("it is http(s)://HOST[:PORT]/PATH, the path percent-encoded")
        # The port is always told: of an IPv6 address, its end would be taken for one.
        options: dict[str, Any] = {"port": _PORTS[address.scheme] if port is None else port}
        kind: type[http.client.HTTPConnection] = http.client.HTTPConnection
        if address.scheme == "https":  # reading the certificates once is enough
            kind, options["context"] = http.client.HTTPSConnection, ssl.create_default_context()
        open_one = partial(kind, host, timeout=settings.timeout, **options)
        open_one()  # looks at the host's name, connects to nothing
    except (ValueError, http.client.HTTPException) as error:
        raise DataError(
            f"{settings.endpoint!r}: not an http(s) address ({one_line(error)}); give another "
            "--endpoint"
        ) from error
    return open_one, address.path


def _decoded(blob_id: str, raw: bytes) -> Content:
    """As the data set's own recipe: bytes that are not UTF-8 are left out, and that is noted."""
    if not raw:
        return Content(blob_id, None, "empty")
    try:
        return Content(blob_id, raw.decode("utf-8"))
    except UnicodeDecodeError:
        note = "bytes that are not UTF-8 left out"
        return Content(blob_id, raw.decode("utf-8", errors="ignore"), note)

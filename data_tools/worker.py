"""One unit of work, in this process or in one of several: texts in, two small files out."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_tools.engines import CheckedTokenizer
from data_tools.indexed_writer import MOST_TOKENS_PER_SEQUENCE, token_dtype
from data_tools.manifest import MOST_LISTED, DataError, hash_file
from data_tools.rows import Document, Fault, ReadOptions
from data_tools.tokenizers import JsonTokenizer, TextError, Tokenizer, load_tokenizer
from data_tools.units import Unit, read_unit

# A batch ends here, so that memory follows neither the documents' number nor their length: the
# `tokenizers` package needs some 100 bytes a token of a batch, and is no faster on larger ones.
_BATCH_DOCUMENTS = 64
_BATCH_CHARACTERS = 1 << 18
_MOST_NAMED = 8


@dataclass(frozen=True)
class Job:
    """What a worker needs to know besides its unit."""

    tokenizer: Path
    eod_token: str | None
    parse_special: bool
    engine: str
    """Of the library: "tokenizers", "tiktoken" or "sentencepiece"; chosen and checked before."""
    append_eod: bool
    skip_faults: bool
    read: ReadOptions
    folder: Path
    """Where the results go."""

    def load_tokenizer(self) -> Tokenizer:
        """A tokenizer of this process' own."""
        tokenizer = load_tokenizer(
            self.tokenizer,
            eod_token=self.eod_token,
            threads=1,
            parse_special=self.parse_special,
        )
        if self.engine != tokenizer.engine and isinstance(tokenizer, JsonTokenizer):
            return CheckedTokenizer(tokenizer)
        return tokenizer


class UnitResult(NamedTuple):
    """What became of a unit; its tokens and lengths lie in two files."""

    documents: int
    tokens: int
    empty: int
    skipped: int
    skipped_rows: list[str]
    """The first of them."""


def tokens_file(folder: Path, number: int) -> Path:
    """Token ids of unit `number`, document after document."""
    return folder / f"unit-{number}.tokens"


def lengths_file(folder: Path, number: int) -> Path:
    """int32 tokens of each document of unit `number`."""
    return folder / f"unit-{number}.lengths"


class Encoder:
    """Does units with one tokenizer."""

    def __init__(self, job: Job, tokenizer: Tokenizer):
        self.job = job
        self.tokenizer = tokenizer
        self.dtype = token_dtype(self.tokenizer.vocab_size)

    def encode(self, number: int, unit: Unit) -> UnitResult:
        """Writes the unit's two files. Raises DataError at the first fault that is not skipped."""
        counts = {"documents": 0, "tokens": 0, "empty": 0, "skipped": 0}
        listed: list[str] = []
        with (
            tokens_file(self.job.folder, number).open("wb") as tokens,
            lengths_file(self.job.folder, number).open("wb") as lengths,
        ):
            for batch in _batches(read_unit(unit, self.job.read)):
                if isinstance(batch, Fault):
                    if not self.job.skip_faults:
                        raise DataError(str(batch))
                    counts["skipped"] += batch.rows
                    counts["empty"] += batch.is_empty
                    if len(listed) < MOST_LISTED:
                        listed.append(str(batch))
                    continue
                counts["documents"] += len(batch)
                counts["tokens"] += self._write(batch, tokens, lengths)
        return UnitResult(**counts, skipped_rows=listed)

    def _write(self, batch: list[Document], tokens: BinaryIO, lengths: BinaryIO) -> int:
        try:
            encoded = self.tokenizer.encode_batch([document.text for document in batch])
        except TextError as error:
            raise DataError(f"{batch[error.row].source}: {error}") from error
        sizes = np.array([ids.size for ids in encoded])
        self._check(batch, encoded, sizes)
        if self.job.append_eod:
            end = np.array([self.tokenizer.eod_id], dtype=np.int32)
            encoded = [part for ids in encoded for part in (ids, end)]
            sizes += 1
        joined = np.concatenate(encoded)
        tokens.write(joined.astype(self.dtype).data)
        lengths.write(sizes.astype(np.int32).data)
        return joined.size

    def _check(self, batch: list[Document], encoded: list[np.ndarray], sizes: np.ndarray) -> None:
        joined = np.concatenate(encoded)
        low, high = joined.min(initial=0), joined.max(initial=0)
        if low < 0 or high >= self.tokenizer.vocab_size:
            document = _first(batch, encoded, joined == (low if low < 0 else high))
            raise DataError(
                f"{document.source}: token id {low if low < 0 else high} lies outside the "
                f"vocabulary of {self.tokenizer.vocab_size}; mend the tokenizer's file"
            )
        if sizes.max() >= MOST_TOKENS_PER_SEQUENCE:
            raise DataError(f"{batch[int(sizes.argmax())].source}: 2^31 tokens or more; cut it")
        forged = joined == self.tokenizer.eod_id
        if not self.job.parse_special and forged.any():
            document = _first(batch, encoded, forged)
            raise DataError(
                f"{document.source}: its text contains the end-of-document token "
                f"{self.tokenizer.eod_id}, which would cut it in two; choose another --eod-token"
            )


def _first(batch: list[Document], encoded: list[np.ndarray], found: np.ndarray) -> Document:
    """The document of the first token of `found`."""
    ends = np.cumsum([ids.size for ids in encoded])
    return batch[int(np.searchsorted(ends, found.argmax(), side="right"))]


def _batches(rows: Iterable[Document | Fault]) -> Iterator[list[Document] | Fault]:
    """Documents in batches; a fault comes after the documents before it."""
    batch: list[Document] = []
    characters = 0
    for row in rows:
        if isinstance(row, Document):
            batch.append(row)
            characters += len(row.text)
        full = len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS
        if batch and (full or isinstance(row, Fault)):
            yield batch
            batch, characters = [], 0
        if isinstance(row, Fault):
            yield row
    if batch:
        yield batch


# ---- several processes ---------------------------------------------------------------------------


class Workers:
    """Does units and hashes files, in `count` processes; with one, in this process.

    A context manager; leaving it by an exception ends the processes at once.
    """

    def __init__(self, job: Job, tokenizer: Tokenizer, count: int):
        self.job = job
        self.count = count
        self._given: list[tuple[int, Unit, Future[UnitResult]]] = []
        self._local = Encoder(job, tokenizer) if count == 1 else None
        self._pool: ProcessPoolExecutor | None = None
        if count > 1:
            # Not forked: libraries with threads of their own do not survive it.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(count, context, _start_worker, (job,))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._pool:
            if error:
                # A second Ctrl-C would else leave the interpreter waiting for what nobody needs.
                # Python 3.14 has a name for it, terminate_workers.
                for process in list((self._pool._processes or {}).values()):
                    process.terminate()
            self._pool.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise ChildProcessError(
                f"a worker process died, killed or out of memory{self._at_work()}; the same "
                "command goes on, with fewer --workers perhaps"
            ) from error

    def _at_work(self) -> str:
        """The files of the units that were begun and not finished."""
        files = [
            str(source.path)
            for number, unit, future in self._given
            if not future.cancelled()
            and future.exception()
            and tokens_file(self.job.folder, number).exists()
            for source, _ in unit
        ]
        shown = list(dict.fromkeys(files))[:_MOST_NAMED]
        return f" (at work on {', '.join(shown)})" if shown else ""

    def encode(self, number: int, unit: Unit) -> Future[UnitResult]:
        """The unit's result, its files written."""
        if self._local:
            return _now(self._local.encode, number, unit)
        future = self._submit(_encode, number, unit)
        self._given = [given for given in self._given if not given[2].done()]
        self._given.append((number, unit, future))
        return future

    def hash_file(self, path: Path) -> Future[str]:
        """xxh3-128 of a file."""
        return _now(hash_file, path) if self._local else self._submit(hash_file, path)

    def _submit(self, function: Any, *arguments: object) -> Future[Any]:
        assert self._pool
        # A process that is started inherits the mask: Ctrl-C is not for it, from its first moment.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._pool.submit(function, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _now(function: Any, *arguments: object) -> Future[Any]:
    done: Future[Any] = Future()
    try:
        done.set_result(function(*arguments))
    except Exception as error:
        done.set_exception(error)
    return done


_encoder: Encoder | None = None


def _start_worker(job: Job) -> None:
    global _encoder
    # One process per core: libraries that start threads of their own would fight for the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(job, job.load_tokenizer())


def _end_with_parent() -> None:
    """A parent that is killed cannot tell its workers to stop."""
    parent = multiprocessing.parent_process()
    assert parent
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _encode(number: int, unit: Unit) -> UnitResult:
    assert _encoder
    return _encoder.encode(number, unit)

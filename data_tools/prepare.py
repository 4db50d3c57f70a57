"""Documents in, PREFIX.bin, PREFIX.idx and PREFIX.manifest.json out.

The sources are cut into units (units.py), which workers tokenize in any order (worker.py). One
process takes their results over in order and writes down what is done (journal.py). So the bytes do
not depend on the number of workers, nor on how often the run was killed.
"""

from __future__ import annotations

import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any

from data_tools.engines import choose_engine
from data_tools.hub import fetch_first_rows
from data_tools.indexed_writer import check_free, token_dtype
from data_tools.journal import Journal, finish_publishing
from data_tools.manifest import (
    MOST_LISTED,
    DataError,
    FileRecord,
    Manifest,
    Options,
    check_counts,
    check_indexed,
    hash_file,
    manifest_path,
    read_manifest,
)
from data_tools.rows import Document, ReadOptions
from data_tools.sources import Source, find_sources
from data_tools.tokenizers import Tokenizer, load_tokenizer, usable_cpus
from data_tools.units import Plan, Shard, Unit, make_plan, read_unit
from data_tools.worker import Job, UnitResult, Workers


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to prepare; those that decide the bytes are in the manifest's options."""

    text_column: str = "text"
    append_eod: bool = True
    """End each document with the tokenizer's end-of-document id."""
    eod_token: str | None = None
    """That token's text, where the tokenizer does not tell."""
    parse_special: bool = False
    """Let special tokens that are written out in a text become their ids."""
    engine: str = "auto"
    """See engines.ENGINES."""
    workers: int = 0
    """Processes; 0: one per CPU that this process may use."""
    skip_faults: bool = False
    """Leave out and list what cannot be used; else the first stops the run."""
    max_document_bytes: int = 32 << 20
    fraction: float | None = None
    """Of each input's rows or bytes, from the start."""
    token_budget: int | None = None
    """Stop after the document that reaches it."""
    shard: Shard | None = None
    restart: bool = False
    """Drop what an earlier run under the same prefix left unfinished."""
    reuse: bool = False
    """Take outputs that are there and were made from the same inputs by the same settings."""

    def check(self) -> None:
        """Raises DataError for what does not go together."""
        if self.shard and not 1 <= self.shard.index <= self.shard.count:
            raise DataError(f"shard {self.shard}; give i/n with i from 1 to n")
        if self.shard and self.token_budget is not None:
            raise DataError("a shard cannot know when all reach --token-budget; leave one out")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise DataError(f"fraction {self.fraction}; give a number above 0 and up to 1")
        if self.token_budget is not None and self.token_budget < 1:
            raise DataError(f"token budget {self.token_budget}; give a number above 0")

    def read_options(self) -> ReadOptions:
        """What the readers need of it."""
        return ReadOptions(self.text_column, self.max_document_bytes)

    def options(self) -> Options:
        """What the manifest keeps of it."""
        return Options(
            text_column=self.text_column,
            append_eod=self.append_eod,
            parse_special=self.parse_special,
            max_document_bytes=self.max_document_bytes,
            fraction=self.fraction,
            token_budget=self.token_budget,
            shard=str(self.shard) if self.shard else None,
        )


@dataclass(frozen=True)
class Progress:
    """How far `prepare` is. Bytes are counted as stored on disk."""

    bytes_read: int
    bytes_total: int
    documents: int
    tokens: int
    bytes_resumed: int
    """Of bytes_read, those that an earlier run had done."""
    seconds: float
    """Since this run began."""


def prepare(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    out_prefix: str | Path,
    settings: Settings | None = None,
    *,
    progress: Callable[[Progress], None] = lambda state: None,
    say: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Tokenizes `inputs` (files, folders, globs; see sources) under `out_prefix`.

    Each document becomes one sequence. The outputs appear all or not at all, and a run that fails
    leaves earlier outputs of the same prefix as they were. What it has finished stays in
    PREFIX.work/: the same call goes on from there. progress: called after each unit; say: gets
    lines for the user. Raises DataError for bad input, OSError where the disk fails. Several
    workers are spawned: a script that calls this guards its main module.
    """
    settings = settings or Settings()
    settings.check()
    finish_publishing(out_prefix)
    reference = load_tokenizer(
        tokenizer, eod_token=settings.eod_token, threads=1, parse_special=settings.parse_special
    )
    check_free(out_prefix)
    files, rows_elsewhere = fetch_first_rows(inputs, settings.fraction)
    plan = make_plan(
        find_sources(files, outputs=out_prefix),
        settings.read_options(),
        skip_faults=settings.skip_faults,
        fraction=settings.fraction,
        rows_elsewhere=rows_elsewhere,
        shard=settings.shard,
    )
    if not plan.units and settings.shard is None:
        raise DataError(
            f"{inputs[0]}: nothing to prepare in the inputs; give other files or shards"
        )
    if settings.reuse and (made := _made_before(plan, out_prefix, reference, settings)):
        say(f"{out_prefix}: already prepared")
        return made
    chosen, why = choose_engine(
        reference, settings.engine, lambda: _sample(plan, settings.read_options())
    )
    say(why)
    description = _describe(plan, chosen, settings)
    with Journal(out_prefix, description, restart=settings.restart) as journal:
        if journal.units:
            say(f"going on after unit {len(journal.units)} of {len(plan.units)}")
        job = Job(
            tokenizer=Path(tokenizer),
            eod_token=settings.eod_token,
            parse_special=settings.parse_special,
            engine=chosen.engine,
            append_eod=settings.append_eod,
            skip_faults=settings.skip_faults,
            read=settings.read_options(),
            folder=journal.folder,
        )
        _work(plan, journal, job, chosen, settings, progress)
        manifest = _manifest(plan, journal, chosen, settings)
        journal.publish(manifest.stored())
    return manifest


def _made_before(
    plan: Plan, prefix: str | Path, tokenizer: Tokenizer, settings: Settings
) -> Manifest | None:
    manifest = read_manifest(prefix)
    if manifest is None or manifest.tokenizer != tokenizer.record():
        return None
    if manifest.options != settings.options() or (manifest.skipped and not settings.skip_faults):
        return None
    given = plan.sources
    budget = settings.token_budget
    if budget is not None and manifest.tokens >= budget:  # the rest was not needed
        given = given[: len(manifest.sources)]
    elif manifest.plan != plan.digest:  # of more or fewer rows, or cut otherwise
        return None
    if manifest.plan is None:  # made of several, or of a part
        return None
    written = manifest_path(prefix).stat().st_mtime_ns
    if len(given) != len(manifest.sources) or not all(
        _is_recorded(source, record, written)
        for source, record in zip(given, manifest.sources, strict=True)
    ):
        return None
    try:
        check_counts(check_indexed(prefix), manifest)
    except DataError:  # they will be written anew
        return None
    return manifest


def _is_recorded(source: Source, record: FileRecord, written: int) -> bool:
    """Whether the file is the one of the record, which was written at that time, in ns."""
    if (source.name, source.bytes) != (record.name, record.bytes):
        return False
    # A copy may keep the time of its original, but not that of its own last change.
    changed = max(source.mtime_ns, source.path.stat().st_ctime_ns)
    return changed <= written or hash_file(source.path) == record.xxh3


def _sample(plan: Plan, options: ReadOptions) -> list[str]:
    """Texts from places all over the plan; a two-hundredth of it, within bounds."""
    left = max(1 << 16, min(1 << 20, plan.bytes // 200))
    units = plan.units[:: max(1, -(-len(plan.units) // 16))]
    texts = []
    for unit in units:
        share = left // len(units)
        for row in read_unit(unit, options):
            if isinstance(row, Document):
                texts.append(row.text[:share])
                share -= len(texts[-1])
            if share <= 0:
                break
    return texts


def _describe(plan: Plan, tokenizer: Tokenizer, settings: Settings) -> dict[str, Any]:
    """All that the bytes depend on."""
    return {
        "sources": [[source.name, source.bytes, source.mtime_ns] for source in plan.sources],
        "units": plan.digest,
        "tokenizer": tokenizer.record().model_dump(),
        "options": settings.options().model_dump(),
        "engine": tokenizer.engine,
        "dtype": str(token_dtype(tokenizer.vocab_size)),
        "libraries": {name: one for name, one in versions().items() if name in _TOKENIZING},
    }


def _work(
    plan: Plan,
    journal: Journal,
    job: Job,
    tokenizer: Tokenizer,
    settings: Settings,
    progress: Callable[[Progress], None],
) -> None:
    """Does the units and hashes their sources, as far as neither is done."""
    began = time.monotonic()
    sizes = (sum(part.piece.bytes for part in unit) for unit in plan.units)
    read = list(accumulate(sizes, initial=0))  # after so many units
    resumed = read[len(journal.units)]
    if not settings.skip_faults and journal.skipped_rows:
        raise DataError(journal.skipped_rows[0])
    count = settings.workers or usable_cpus()
    count = min(count, max(1, len(plan.units) - len(journal.units)))
    with Workers(job, tokenizer, count) as workers:
        hashes: dict[str, Future[str]] = {}
        for result in _results(plan, journal, settings, workers, hashes):
            journal.add_unit(result, settings.token_budget)
            _take_hashes(journal, hashes, only_done=True)
            progress(
                Progress(
                    bytes_read=read[len(journal.units)],
                    bytes_total=read[-1],
                    documents=journal.documents,
                    tokens=journal.tokens,
                    bytes_resumed=resumed,
                    seconds=time.monotonic() - began,
                )
            )
        _ask_hashes(workers, journal, hashes, plan.units[: len(journal.units)])
        _take_hashes(journal, hashes, only_done=False)
    if not journal.tokens and settings.shard is None:
        raise DataError(f"{plan.sources[0].path}: no text in the inputs; give files with some")
    for source in plan.sources:
        stat = source.path.stat()
        if (stat.st_size, stat.st_mtime_ns) != (source.bytes, source.mtime_ns):
            raise DataError(f"{source.path}: changed while it was read; start over with --restart")


def _results(
    plan: Plan,
    journal: Journal,
    settings: Settings,
    workers: Workers,
    hashes: dict[str, Future[str]],
) -> Iterator[UnitResult]:
    """The units' results in order; a bounded number of units is ahead."""
    waiting: deque[Future[UnitResult]] = deque()
    following = len(journal.units)
    ahead = 1 if workers.count == 1 else 2 * workers.count
    while not _is_done(plan, journal, settings):
        while following < len(plan.units) and len(waiting) < ahead:
            unit = plan.units[following]
            _ask_hashes(workers, journal, hashes, [unit])
            waiting.append(workers.encode(following, unit))
            following += 1
        yield waiting.popleft().result()


def _is_done(plan: Plan, journal: Journal, settings: Settings) -> bool:
    budget = settings.token_budget
    return len(journal.units) == len(plan.units) or (
        budget is not None and journal.tokens >= budget
    )


def _ask_hashes(
    workers: Workers, journal: Journal, hashes: dict[str, Future[str]], units: Sequence[Unit]
) -> None:
    """Has the units' sources hashed, once each; the read warms the cache for the unit."""
    for unit in units:
        for source, _ in unit:
            name = source.name
            if name not in journal.sources and name not in hashes:
                hashes[name] = workers.hash_file(source.path)


def _take_hashes(journal: Journal, hashes: dict[str, Future[str]], *, only_done: bool) -> None:
    for name in [name for name, future in hashes.items() if future.done() or not only_done]:
        journal.add_source(name, hashes.pop(name).result())


def _manifest(plan: Plan, journal: Journal, tokenizer: Tokenizer, settings: Settings) -> Manifest:
    read = {part.source for unit in plan.units[: len(journal.units)] for part in unit}
    return Manifest.model_validate(
        {
            "sources": [
                FileRecord(
                    name=source.name,
                    bytes=source.bytes,
                    xxh3=journal.sources[source.name],
                )
                for source in plan.sources
                if source in read
            ],
            "tokenizer": tokenizer.record(),
            "options": settings.options(),
            "dtype": str(token_dtype(tokenizer.vocab_size)),
            "documents": journal.documents,
            "empty_documents": sum(entry.empty for entry in journal.units),
            "skipped": sum(entry.skipped for entry in journal.units) + len(plan.faults),
            "skipped_rows": [*map(str, plan.faults), *journal.skipped_rows][:MOST_LISTED],
            "tokens": journal.tokens,
            "plan": plan.digest,
            "engine": tokenizer.engine,
            "outputs": journal.write_outputs(),
            "versions": versions(),
        }
    )


_TOKENIZING = ("sentencepiece", "tokenizers", "tiktoken")


def versions() -> dict[str, str]:
    """Of the packages that make the tokens, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in ("taid-megatron", "numpy", "pyarrow", *_TOKENIZING):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # pyarrow and tiktoken are optional
            continue
    return found

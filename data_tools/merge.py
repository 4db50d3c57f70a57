"""Prepared files laid one after the other, or dealt out by the documents' hashes."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path

import numpy as np
import xxhash

from data_tools.indexed_writer import IndexedWriter, check_free, remove_published
from data_tools.manifest import (
    CHUNK_ROWS,
    MOST_LISTED,
    DataError,
    FileRecord,
    IndexedFiles,
    Manifest,
    bin_path,
    check_content,
    check_counts,
    check_indexed,
    hash_file,
    idx_path,
    manifest_path,
    map_blocks,
    read_manifest,
)

_DOCUMENTS_PER_STEP = 1 << 16


# Larger ones would read back faster, and cost more than that to write on virtual machines.
_BLOCK_BYTES = 1 << 18


def merge(prefixes: Sequence[str | Path], out_prefix: str | Path) -> Manifest:
    """Joins prepared data in the given order; memory is constant.

    What is read is hashed on the way and compared with its manifest. Shards have to be all of
    one run, in order: then the result is what one run would have written. Raises DataError where a
    file is damaged, two do not belong together, or the output is an input.
    """
    if len(prefixes) < 2:
        raise DataError("nothing to merge; give two prefixes or more")
    _check_outputs([out_prefix], prefixes)
    parts = [_checked(prefix) for prefix in prefixes]
    manifests = [manifest for _, manifest in parts]
    _check_alike(prefixes, manifests)
    are_shards = _check_shards(prefixes, manifests)
    first = manifests[0]
    dtype = np.dtype(first.dtype)
    vocab_size = first.tokenizer.vocab_size
    with IndexedWriter(out_prefix, vocab_size, dtype, _BLOCK_BYTES // 2) as writer:
        for files, manifest in parts:
            _copy_tokens(files, manifest, writer)
            _copy_tables(files, writer)
        merged = first.changed(
            **_joined_description(manifests),
            plan=first.plan if are_shards else None,
            documents=writer.num_documents,
            tokens=writer.num_tokens,
            derived_from=[str(prefix) for prefix in prefixes],
            outputs=writer.complete(),
        )
        writer.describe(merged)
        writer.publish()
    return merged


def split(
    prefix: str | Path, shares: Mapping[str, float], out_prefix: str | Path, *, seed: int = 0
) -> dict[str, Manifest]:
    """Deals the documents out to OUT-NAME, by the hash of each document's tokens and the seed.

    shares: name -> share of the documents; they add up to 1. Equal documents go the same way, and
    none changes sides when others come or go. No part takes its name before all are written. Raises
    DataError where the files are damaged, an output is the input, or the shares are none.
    """
    if len(shares) < 2 or any(not 0 < share < 1 for share in shares.values()):
        raise DataError(f"shares {dict(shares)}; give two or more, each between 0 and 1")
    for name in shares:
        if not name or Path(name).name != name:
            raise DataError(f"{name!r} names no file; give NAME=SHARE with a name without folders")
    if abs(sum(shares.values()) - 1) > 1e-9:
        raise DataError(f"shares {dict(shares)} add up to {sum(shares.values()):g}; make it 1")
    out_prefixes = [f"{out_prefix}-{name}" for name in shares]
    _check_outputs(out_prefixes, [prefix])
    files, manifest = _checked(prefix)
    bounds = [int(bound * 2**64) for bound in accumulate(shares.values())][:-1]
    dtype, vocab_size = np.dtype(manifest.dtype), manifest.tokenizer.vocab_size
    with ExitStack() as stack:
        writers = [
            stack.enter_context(IndexedWriter(out, vocab_size, dtype)) for out in out_prefixes
        ]
        digest = _deal(files, writers, bounds, seed)
        check_content(bin_path(prefix), manifest.outputs[0], digest)
        for name, writer in zip(shares, writers, strict=True):
            if not writer.num_documents:
                raise DataError(f"{prefix}: no document falls to {name}; give it a larger share")
        made = {}
        for (name, share), writer in zip(shares.items(), writers, strict=True):
            made[name] = manifest.changed(
                documents=writer.num_documents,
                tokens=writer.num_tokens,
                plan=None,
                derived_from=[f"{prefix}, split {name} {share:g}, seed {seed}"],
                outputs=writer.complete(),
            )
            writer.describe(made[name])
        for out in out_prefixes:  # a cut between two parts leaves no old one beside a new one
            remove_published(out)
        for writer in writers:
            writer.publish()
    return made


def _check_outputs(out_prefixes: Sequence[str | Path], prefixes: Sequence[str | Path]) -> None:
    """Raises DataError where an output is one of the inputs, however spelt, or cannot be made."""
    inputs = {os.path.realpath(bin_path(prefix)): prefix for prefix in prefixes}
    for out in out_prefixes:
        if (same := inputs.get(os.path.realpath(bin_path(out)))) is not None:
            raise DataError(f"{out}: is the input {same}; give another --out")
        check_free(out)


def _checked(prefix: str | Path) -> tuple[IndexedFiles, Manifest]:
    files = check_indexed(prefix)
    manifest = read_manifest(prefix)
    if manifest is None:
        raise DataError(
            f"{manifest_path(prefix)}: no such file; which tokenizer made the data is not known"
        )
    check_counts(files, manifest)
    index = idx_path(prefix)
    check_content(index, manifest.outputs[1], hash_file(index))
    return files, manifest


def _check_alike(prefixes: Sequence[str | Path], manifests: Sequence[Manifest]) -> None:
    traits = [
        {
            "tokenizer": (manifest.tokenizer.fingerprint, manifest.tokenizer.vocab_size),
            "token type": manifest.dtype,
            "end of document": (manifest.options.append_eod, manifest.tokenizer.eod_id),
            "--parse-special": manifest.options.parse_special,
        }
        for manifest in manifests
    ]
    _check_same(prefixes, traits, "prepare both alike")


def _check_shards(prefixes: Sequence[str | Path], manifests: Sequence[Manifest]) -> bool:
    """Whether these are shards: then all those of one run, in order, or DataError."""
    shards = [manifest.options.shard for manifest in manifests]
    if not any(shards):
        return False
    wanted = [f"{index}/{len(shards)}" for index in range(1, len(shards) + 1)]
    if shards != wanted:
        raise DataError(
            f"{prefixes[0]}: shards {', '.join(map(str, shards))} in that order; give all of one "
            "run, from the first to the last"
        )
    mend = "give shards of one run"
    options = [manifest.options.model_dump(exclude={"shard"}) for manifest in manifests]
    _check_same(prefixes, options, mend)
    plans = [{"cut of the sources": manifest.plan} for manifest in manifests]
    _check_same(prefixes, plans, mend)
    read: dict[str, FileRecord] = {}
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        for source in manifest.sources:
            if read.setdefault(source.name, source) != source:
                raise DataError(
                    f"{manifest_path(prefix)}: {source.name} is not what another shard has read; "
                    "it was changed in between, so prepare all shards again"
                )
    return True


def _check_same(
    prefixes: Sequence[str | Path], traits: Sequence[Mapping[str, object]], mend: str
) -> None:
    """Raises DataError at the first trait that is not as the first prefix has it."""
    for prefix, found in zip(prefixes, traits, strict=True):
        for name, value in found.items():
            if value != traits[0][name]:
                raise DataError(
                    f"{manifest_path(prefix)}: another {name} than {prefixes[0]}'s; {mend}"
                )


def _joined_description(manifests: Sequence[Manifest]) -> dict[str, object]:
    """What is true of all, and the sums of what is counted."""
    options = [manifest.options for manifest in manifests]
    limits: dict[str, object] = {}
    for name in ("max_document_bytes", "fraction", "token_budget"):
        values = {getattr(one, name) for one in options}
        limits[name] = values.pop() if len(values) == 1 else None
    columns = _joined(one.text_column for one in options)
    packages = dict.fromkeys(name for manifest in manifests for name in manifest.versions)
    sources = {(one.name, one.xxh3): one for manifest in manifests for one in manifest.sources}
    return {
        "sources": list(sources.values()),
        "options": options[0].model_copy(update={"shard": None, "text_column": columns, **limits}),
        "empty_documents": sum(manifest.empty_documents for manifest in manifests),
        "skipped": sum(manifest.skipped for manifest in manifests),
        "skipped_rows": [row for manifest in manifests for row in manifest.skipped_rows][
            :MOST_LISTED
        ],
        "engine": _joined(manifest.engine for manifest in manifests) or None,
        "versions": {
            name: _joined(manifest.versions.get(name) for manifest in manifests)
            for name in packages
        },
    }


def _joined(values: Iterable[str | None]) -> str:
    return ", ".join(dict.fromkeys(value for value in values if value))


def _copy_tokens(files: IndexedFiles, manifest: Manifest, writer: IndexedWriter) -> None:
    data = bin_path(files.prefix)
    # Up to the end of the first part, what is written has that part's hash.
    digest = xxhash.xxh3_128() if writer.num_tokens else writer.digest
    # At multiples of their size in what is written.
    first = _BLOCK_BYTES - writer.num_tokens * writer.dtype.itemsize % _BLOCK_BYTES
    for block in map_blocks(data, _BLOCK_BYTES, first):
        if digest is not writer.digest:
            digest.update(block)
        writer.add_tokens(block)
    check_content(data, manifest.outputs[0], digest.hexdigest())


def _copy_tables(files: IndexedFiles, writer: IndexedWriter) -> None:
    lengths, documents = files.sequence_lengths(), files.document_indices()
    for first in range(0, files.num_documents, CHUNK_ROWS):
        ends = documents[first : first + CHUNK_ROWS + 1]
        writer.add_tables(lengths[ends[0] : ends[-1]], np.diff(ends))


def _deal(
    files: IndexedFiles, writers: Sequence[IndexedWriter], bounds: list[int], seed: int
) -> str:
    """Returns the hash of the tokens."""
    digest = xxhash.xxh3_128()
    lengths, documents = files.sequence_lengths(), files.document_indices()
    with bin_path(files.prefix).open("rb", buffering=1 << 20) as stream:
        for first in range(0, files.num_documents, _DOCUMENTS_PER_STEP):
            ends = np.array(documents[first : first + _DOCUMENTS_PER_STEP + 1])
            cut = np.array(lengths[ends[0] : ends[-1]])
            offsets = np.concatenate(([0], np.cumsum(cut, dtype=np.int64)))
            sizes = np.diff(offsets[ends - ends[0]]) * files.dtype.itemsize
            sides = np.empty(sizes.size, dtype=np.int64)
            for number, size in enumerate(sizes.tolist()):
                tokens = stream.read(size)
                digest.update(tokens)
                side = bisect_right(bounds, xxhash.xxh3_64_intdigest(tokens, seed))
                writers[side].add_tokens(tokens)
                sides[number] = side
            counts = np.diff(ends)
            of_sequence = np.repeat(sides, counts)
            for side, writer in enumerate(writers):
                writer.add_tables(cut[of_sequence == side], counts[sides == side])
    return digest.hexdigest()

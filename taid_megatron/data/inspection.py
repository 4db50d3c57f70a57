"""Whether prepared files can be trusted, before the first step: what opening them does not show.

megatron-core opens a .bin that was cut off and fails hours later; a flipped byte in an .idx makes
it return other tokens without a word; a token id beyond the vocabulary ends a GPU's kernel.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_tools.manifest import (
    FileRecord,
    IndexedFiles,
    bin_path,
    check_indexed,
    hash_file,
    idx_path,
    manifest_path,
    read_manifest,
)
from taid_megatron.config.errors import UserError

# Without `full`: so many stretches of the .bin, evenly spread, both ends among them.
SAMPLED_BLOCKS = 64
BLOCK_TOKENS = 1 << 20


def inspect(prefix: str | Path, *, vocab_size: int, full: bool) -> None:
    """Check PREFIX.bin and PREFIX.idx; reads all of the index and a part of the tokens.

    Always: the index row by row, its hash where there is a manifest, the ids of up to 64 Mi tokens
    in 64 places. full: the .bin's hash and every token id. Raises UserError or DataError naming
    file, fault and, for an id outside [0, vocab_size), the document.
    """
    files = check_indexed(prefix, deep=True)
    manifest = read_manifest(prefix)
    for record in manifest.outputs if manifest else ():
        if record.name.endswith(".idx"):
            _check_hash(prefix, idx_path(prefix), record)
        elif full:
            _check_hash(prefix, bin_path(prefix), record)
    _check_ids(files, vocab_size, full)


def _check_hash(prefix: str | Path, path: Path, record: FileRecord) -> None:
    if path.stat().st_size != record.bytes or hash_file(path) != record.xxh3:
        raise UserError(
            f"{path}: its content is not what {manifest_path(prefix)} describes; copy both files "
            "again, or prepare the data again"
        )


def _check_ids(files: IndexedFiles, vocab_size: int, full: bool) -> None:
    if files.num_tokens == 0:
        return
    path = bin_path(files.prefix)
    tokens = np.memmap(path, files.dtype, mode="r")
    last = max(0, files.num_tokens - BLOCK_TOKENS)
    if full or files.num_tokens <= SAMPLED_BLOCKS * BLOCK_TOKENS:
        starts = np.arange(0, files.num_tokens, BLOCK_TOKENS)
    else:
        starts = np.linspace(0, last, SAMPLED_BLOCKS).astype(np.int64)
    for start in starts:
        block = tokens[start : start + BLOCK_TOKENS]
        if 0 <= int(block.min()) and int(block.max()) < vocab_size:
            continue
        place = int(start) + int(np.flatnonzero((block < 0) | (block >= vocab_size))[0])
        raise UserError(
            f"{path}: token id {int(tokens[place])} in document {_document(files, place)}, the "
            f"models share the ids 0 to {vocab_size - 1}; prepare the data with their tokenizer"
        )


def _document(files: IndexedFiles, place: int) -> int:
    """Number of the document that holds a token, both counted from 0."""
    offset = place * files.dtype.itemsize
    # the last sequence that starts at or before it: empty ones share their successor's start
    sequence = int(np.searchsorted(files.sequence_pointers(), offset, side="right")) - 1
    return int(np.searchsorted(files.document_indices(), sequence, side="right")) - 1

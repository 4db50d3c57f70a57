"""Documents in, PREFIX.bin, PREFIX.idx and PREFIX.manifest.json out."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from data_tools.indexed_writer import IndexedWriter
from data_tools.manifest import DataError, Manifest, Options, write_manifest
from data_tools.sources import Corpus, Document
from data_tools.tokenizers import Tokenizer

# A batch of long documents ends here, so that memory does not follow their length. Characters.
_BATCH_CHARACTERS = 8 << 20


@dataclass(frozen=True)
class Progress:
    """How far `prepare` is. Bytes are counted as stored on disk."""

    bytes_read: int
    bytes_total: int
    documents: int
    tokens: int


def prepare(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer,
    out_prefix: str | Path,
    *,
    text_column: str = "text",
    append_eod: bool = True,
    batch_documents: int = 500,
    progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Tokenizes `inputs` (files, folders, globs; see sources) under `out_prefix`.

    Each document becomes one sequence, ended by the tokenizer's end-of-document id where
    append_eod. Documents without a token (empty texts) are left out and counted. progress: called
    after each batch. The outputs appear all or not at all; a run that fails leaves earlier outputs
    of the same prefix as they were. Raises DataError for bad input, OSError where the disk fails.
    """
    corpus = Corpus(inputs, text_column)
    empty_documents = 0
    with IndexedWriter(out_prefix, tokenizer.vocab_size) as writer:
        for batch in _batches(corpus, batch_documents):
            empty_documents += _write(writer, batch, tokenizer, append_eod)
            if progress:
                progress(
                    Progress(
                        bytes_read=corpus.bytes_read,
                        bytes_total=corpus.bytes_total,
                        documents=writer.num_documents,
                        tokens=writer.num_tokens,
                    )
                )
        if not writer.num_tokens:
            raise DataError(f"{inputs[0]}: no text in the inputs; give files that are not empty")
        outputs = writer.finish()
    manifest = Manifest.model_validate(
        {
            "sources": corpus.records,
            "tokenizer": tokenizer.record(),
            "options": Options(text_column=text_column, append_eod=append_eod),
            "dtype": str(writer.dtype),
            "documents": writer.num_documents,
            "empty_documents": empty_documents,
            "tokens": writer.num_tokens,
            "outputs": outputs,
            "versions": _versions(),
        }
    )
    write_manifest(out_prefix, manifest)
    return manifest


def _batches(documents: Iterable[Document], batch_documents: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) >= batch_documents or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write(
    writer: IndexedWriter, documents: list[Document], tokenizer: Tokenizer, append_eod: bool
) -> int:
    """Appends the documents; returns how many were left out for having no token."""
    empty = 0
    encoded = tokenizer.encode_batch([document.text for document in documents])
    for document, tokens in zip(documents, encoded, strict=True):
        if not tokens.size:
            empty += 1
            continue
        if (tokens == tokenizer.eod_id).any():
            raise DataError(
                f"{document.source}: its text contains the end-of-document token "
                f"{tokenizer.eod_id}, which would cut it in two; choose another --eod-token"
            )
        if append_eod:
            tokens = np.append(tokens, np.int32(tokenizer.eod_id))
        writer.add_document(tokens, name=document.source)
    return empty


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("taid-megatron", "numpy", "sentencepiece", "tokenizers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # tokenizers is optional
            continue
    return versions

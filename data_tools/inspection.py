"""What prepared files hold: counts, lengths, some documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_tools.lengths import Lengths, document_lengths, histogram_picture, histogram_text
from data_tools.manifest import DataError, check_counts, check_indexed, read_manifest
from data_tools.tokenizers import Tokenizer, load_tokenizer
from data_tools.verify import check_same_tokenizer


def describe(
    prefix: str | Path,
    tokenizer: str | Path | None = None,
    *,
    eod_token: str | None = None,
    shown: range = range(1),
    histogram: Path | None = None,
) -> tuple[str, dict[str, Any]]:
    """(text for people, values for machines).

    tokenizer: decodes the documents, which else are shown as ids. shown: numbers of documents, from
    0 on; those beyond the last are left out. histogram: a PNG to write. Raises DataError where a
    file is damaged, the tokenizer is another, or the picture cannot be drawn.
    """
    files = check_indexed(prefix, deep=True)
    manifest = read_manifest(prefix)
    if manifest:
        check_counts(files, manifest)
    model = load_tokenizer(tokenizer, eod_token=eod_token) if tokenizer else None
    if model and manifest:
        check_same_tokenizer(prefix, manifest, model)
    lines = [
        f"documents: {files.num_documents:,}",
        f"sequences: {files.num_sequences:,}",
        f"tokens: {files.num_tokens:,}",
        f"token type: {files.dtype}",
    ]
    values: dict[str, Any] = {
        "documents": files.num_documents,
        "sequences": files.num_sequences,
        "tokens": files.num_tokens,
        "dtype": str(files.dtype),
    }
    if manifest:
        made_by = manifest.tokenizer
        lines += [
            f"tokenizer: {made_by.name} ({made_by.kind}, {made_by.vocab_size:,} ids)",
            f"end of document: {made_by.eod_id if manifest.options.append_eod else 'none'}",
            f"left out: {manifest.skipped:,}",
        ]
        values["manifest"] = manifest.model_dump()
    if files.num_documents:
        lengths = document_lengths(files)
        told, values["lengths"] = _told(lengths)
        lines += told
        if histogram:
            histogram_picture(lengths, histogram, Path(prefix).name)
    texts = {
        number: _shown(f"{prefix}.bin, document {number}", files.document(number).tolist(), model)
        for number in range(shown.start, min(shown.stop, files.num_documents), shown.step)
    }
    values["texts"] = texts
    for number, text in texts.items():
        lines += [f"--- document {number}", text]
    return "\n".join(lines), values


def _told(lengths: Lengths) -> tuple[list[str], dict[str, Any]]:
    percentiles = lengths.percentiles()
    lines = [
        f"tokens in a document: mean {lengths.mean:,.1f}, from {lengths.smallest:,} to "
        f"{lengths.largest:,}; "
        + ", ".join(f"{percent}% up to {value:,}" for percent, value in percentiles.items()),
        histogram_text(lengths),
    ]
    return lines, {
        "mean": lengths.mean,
        "smallest": lengths.smallest,
        "largest": lengths.largest,
        "percentiles": percentiles,
        "histogram": lengths.by_powers_of_two(),
    }


def _shown(place: str, ids: list[int], model: Tokenizer | None) -> str:
    if model is None:
        return " ".join(map(str, ids))
    if ids and ids[-1] == model.eod_id:
        ids = ids[:-1]
    # Of a file without a manifest. Some libraries leave out, or break off over, what they lack.
    is_known = not ids or 0 <= min(ids) <= max(ids) < model.vocab_size
    try:
        if is_known:
            return model.decode(ids)
    except KeyError:  # a gap in the vocabulary
        pass
    raise DataError(
        f"{place}: an id that {model.path} does not have; give the tokenizer that made it"
    )

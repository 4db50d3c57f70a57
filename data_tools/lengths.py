"""Lengths of documents: figures, and a histogram as text or picture. Memory is constant."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.manifest import (
    CHUNK_ROWS,
    DataError,
    IndexedFiles,
    printable,
    write_atomically,
)

# Longer documents share the last bin; all figures but their percentiles stay exact.
_LONGEST_COUNTED = 1 << 20
_PERCENTILES = (1, 10, 50, 90, 99)


@dataclass(frozen=True)
class Lengths:
    """Of the documents, in tokens."""

    counts: np.ndarray
    """Documents of each length. int64 [longest + 1]."""
    smallest: int
    largest: int
    mean: float

    def percentiles(self) -> dict[int, int]:
        """Percent -> the length that so many documents do not exceed."""
        total = np.cumsum(self.counts)
        ranks = [max(1, -(-percent * int(total[-1]) // 100)) for percent in _PERCENTILES]
        return dict(zip(_PERCENTILES, np.searchsorted(total, ranks).tolist(), strict=True))

    def by_powers_of_two(self) -> list[tuple[int, int]]:
        """(first length, documents) of the bins 0, 1, 2-3, 4-7, ... up to the longest."""
        edges = [0] + [1 << power for power in range(self.counts.size.bit_length())]
        sums = np.add.reduceat(self.counts, [edge for edge in edges if edge < self.counts.size])
        return list(zip(edges, sums.tolist(), strict=False))


def document_lengths(files: IndexedFiles) -> Lengths:
    """Reads the index once."""
    counts = np.zeros(1, dtype=np.int64)
    smallest, largest = np.iinfo(np.int64).max, 0
    lengths, documents = files.sequence_lengths(), files.document_indices()
    for first in range(0, files.num_documents, CHUNK_ROWS):
        ends = documents[first : first + CHUNK_ROWS + 1]
        total = np.concatenate(([0], np.cumsum(lengths[ends[0] : ends[-1]], dtype=np.int64)))
        found = np.diff(total[ends - ends[0]])
        smallest = min(smallest, int(found.min()))
        largest = max(largest, int(found.max()))
        more = np.bincount(np.minimum(found, _LONGEST_COUNTED))
        counts = np.pad(counts, (0, max(0, more.size - counts.size)))
        counts[: more.size] += more
    mean = files.num_tokens / max(1, files.num_documents)
    return Lengths(counts, min(smallest, largest), largest, mean)


def histogram_text(lengths: Lengths, width: int = 40) -> str:
    """A bar of `width` characters at most per power of two."""
    bins = lengths.by_powers_of_two()
    most = max(count for _, count in bins)
    rows = [f"{'tokens':>10}  documents"]
    for start, count in bins:
        bar = "#" * -(-count * width // max(1, most))
        rows.append(f"{start:>10,}  {count:>12,}  {bar}".rstrip())
    return "\n".join(rows)


def histogram_picture(lengths: Lengths, out: Path, title: str) -> None:
    """Writes a PNG, whole or not at all.

    Raises DataError where matplotlib is missing, or the name is another kind's or a folder's.
    """
    if out.suffix != ".png":
        raise DataError(f"{out}: the picture is a PNG; give a name that ends in .png")
    if out.is_dir():
        raise DataError(f"{out}: is a folder; give another --histogram")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError(
            f"{out}: drawing needs matplotlib; pip install matplotlib, or leave out --histogram"
        ) from error
    bins = lengths.by_powers_of_two()
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar([f"{start:,}" for start, _ in bins], [count for _, count in bins], width=1.0, ec="w")
    axes.tick_params(axis="x", labelrotation=60)
    axes.set(xlabel="tokens in a document, from", ylabel="documents")
    axes.set_title(printable(title), parse_math=False)  # a name may hold dollars
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, picture.getvalue())

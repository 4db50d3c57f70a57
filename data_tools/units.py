"""What `prepare` works on: the sources cut into units, the same whoever does them and however many.

A unit is some pieces of files that follow each other. Its number is its place in the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from data_tools import rows
from data_tools.hub import share_of
from data_tools.manifest import DataError, printable
from data_tools.rows import Fault, Piece, ReadOptions, Row
from data_tools.sources import Source

_MOST_PIECES = 4096  # of one unit: a folder of very small files


class Part(NamedTuple):
    """A piece of a source."""

    source: Source
    piece: Piece


Unit = tuple[Part, ...]


@dataclass(frozen=True)
class Shard:
    """The index-th (from 1) of `count` contiguous parts of the units."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True)
class Plan:
    """The work of one run."""

    units: list[Unit]
    faults: list[Fault]
    """Files that cannot be read at all, where such are skipped."""
    digest: str
    """Of how all sources are cut, whatever the shard; by their names without their folders."""

    @property
    def sources(self) -> list[Source]:
        """The files that the units read, in order."""
        return list(dict.fromkeys(part.source for unit in self.units for part in unit))

    @property
    def bytes(self) -> int:
        """Of all pieces, as stored."""
        return sum(part.piece.bytes for unit in self.units for part in unit)


def make_plan(
    sources: Sequence[Source],
    options: ReadOptions,
    *,
    skip_faults: bool = False,
    fraction: float | None = None,
    rows_elsewhere: int = 0,
    shard: Shard | None = None,
) -> Plan:
    """Cuts the sources into units.

    skip_faults: collect files that cannot be read, do not raise. fraction: the first share of all
    rows (tables) or bytes (other files), rounded up; rows_elsewhere: of files behind the sources,
    which are not needed for it. shard: keep that part of the units only. Raises DataError.
    """
    parts: list[Part] = []
    faults: list[Fault] = []
    for source in sources:
        try:
            pieces = source.format.pieces(source.path, options)
        except DataError as error:
            if not skip_faults:
                raise
            name, _, reason = str(error).partition(": ")
            faults.append(Fault(name, reason))
            continue
        parts += [Part(source, piece) for piece in pieces]
    if fraction is not None:
        parts = _first(parts, fraction, rows_elsewhere)
    units = list(_units(parts))
    digest = _digest(units)
    if shard is not None:
        units = units[_start(shard.index - 1, shard, units) : _start(shard.index, shard, units)]
        faults = faults if shard.index == 1 else []
    return Plan(units, faults, digest)


def _digest(units: list[Unit]) -> str:
    """xxh3-128, hex. Another version may cut otherwise: its shards do not go with this one's."""
    digest = xxhash.xxh3_128()
    for unit in units:
        # On another machine the same files may lie in another folder.
        named = [(printable(source.path.name), source.bytes, *piece) for source, piece in unit]
        digest.update(f"{named}\n".encode())
    return digest.hexdigest()


def _start(index: int, shard: Shard, units: list[Unit]) -> int:
    return index * len(units) // shard.count


def _first(parts: list[Part], fraction: float, rows_elsewhere: int) -> list[Part]:
    by_rows = {part.source.format.counts == "rows" for part in parts}
    if len(by_rows) > 1:
        raise DataError("a fraction of tables together with other files; prepare them apart")
    sizes = [_size(part) for part in parts]
    left = share_of(sum(sizes) + rows_elsewhere, fraction)
    kept: list[Part] = []
    for part, size in zip(parts, sizes, strict=True):
        if left <= 0:
            break
        kept.append(part if size <= left else _shortened(part, left))
        left -= size
    return kept


def _size(part: Part) -> int:
    """In rows or bytes."""
    is_whole = part.source.format.counts == "files"
    return part.piece.bytes if is_whole else part.piece.stop - part.piece.start


def _shortened(part: Part, size: int) -> Part:
    """Its first rows, or the lines that start in its first bytes; what cannot be cut stays."""
    piece = part.piece
    if part.source.format.counts == "files":
        return part
    share = piece.bytes * size // (piece.stop - piece.start)
    return Part(part.source, Piece(piece.start, piece.start + size, share))


def _units(parts: list[Part]) -> Iterator[Unit]:
    unit: list[Part] = []
    size = 0
    for part in parts:
        if unit and (size + part.piece.bytes > rows.PIECE_BYTES or len(unit) == _MOST_PIECES):
            yield tuple(unit)
            unit, size = [], 0
        unit.append(part)
        size += part.piece.bytes
    if unit:
        yield tuple(unit)


def read_unit(unit: Unit, options: ReadOptions) -> Iterator[Row]:
    """The rows of a unit, in order."""
    for source, piece in unit:
        yield from source.format.read(source.path, piece, options)

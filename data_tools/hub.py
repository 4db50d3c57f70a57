"""Data sets of the Hugging Face hub, by name: hf://datasets/OWNER/NAME[/FOLDER]."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path, PurePosixPath

from data_tools.manifest import DataError
from data_tools.rows import import_arrow, one_line

HUB = "hf://datasets/"
_ENDINGS = ("parquet", "arrow", "jsonl", "jsonl.gz", "jsonl.zst")
_CONNECTIONS = 16


def is_on_hub(given: str | Path) -> bool:
    """Whether an input is an address of a data set, not a path."""
    return str(given).startswith(HUB)


def is_blob(file: Path) -> bool:
    """Whether it is a content in the hub's cache; files of equal content are links to one."""
    return file.parent.name == "blobs" and file.parent.parent.name.startswith("datasets--")


def fetch_from_hub(address: str) -> Path:
    """The local folder of a data set, downloaded where it is not in the hub's cache.

    Only Parquet, Arrow and JSON-lines files are fetched. Raises DataError where that fails.
    """
    name, folder = _parts(address)
    revision, files = _listed(address, name, folder)
    patterns = [f"{glob.escape(folder)}*.{end}" for end in _ENDINGS]  # the hub's * takes in /
    wanted = [file for file in files if file.endswith(_ENDINGS)]
    return _download(address, name, revision, patterns, wanted) / folder


def fetch_first_rows(
    inputs: Sequence[str | Path], fraction: float | None
) -> tuple[Sequence[str | Path], int]:
    """(the inputs to read, rows of the data set that are not among them).

    Of one Parquet data set of the hub, only its first files are downloaded, those that hold the
    fraction of all rows; the others' descriptions tell how many rows they have. Other inputs stay
    as they are. Raises DataError.
    """
    if fraction is None or len(inputs) != 1 or not is_on_hub(inputs[0]):
        return inputs, 0
    address = str(inputs[0])
    name, folder = _parts(address)
    revision, files = _listed(address, name, folder)
    tables = [file for file in files if file.endswith(".parquet")]
    if not tables or any(file.endswith(_ENDINGS) for file in {*files} - {*tables}):
        return inputs, 0
    with _asking(address), ThreadPoolExecutor(_CONNECTIONS) as pool:
        places = [f"datasets/{name}@{revision}/{file}" for file in tables]
        counts = list(pool.map(_count_rows, places))
    # The same share as units.py takes of local files.
    wanted = share_of(sum(counts), fraction)
    needed = 1 + sum(rows < wanted for rows in accumulate(counts))
    first = tables[:needed]
    local = _download(address, name, revision, [*map(glob.escape, first)], first)
    return [local / file for file in first], sum(counts[needed:])


def share_of(total: int, fraction: float) -> int:
    """So many of `total`, rounded up; exact for what people write: 0.1 of 10 is 1, not 2."""
    return max(1, math.ceil(round(total * fraction, 6)))


def _count_rows(place: str) -> int:
    import huggingface_hub

    import_arrow(Path(place))
    import pyarrow.parquet

    with huggingface_hub.HfFileSystem().open(place) as stream:
        return pyarrow.parquet.read_metadata(stream).num_rows


def _parts(address: str) -> tuple[str, str]:
    """(OWNER/NAME, FOLDER/ or nothing)."""
    parts = address.removeprefix(HUB).strip("/").split("/")
    if len(parts) < 2 or not all(parts):
        raise DataError(f"{address}: not {HUB}OWNER/NAME or {HUB}OWNER/NAME/FOLDER; mend it")
    return "/".join(parts[:2]), "/".join([*parts[2:], ""])


def _listed(address: str, name: str, folder: str) -> tuple[str, list[str]]:
    """(the revision, its files below the folder in the order of a local one's, hidden ones not)."""
    with _asking(address):
        import huggingface_hub

        about = huggingface_hub.HfApi().dataset_info(name)
    found = sorted(PurePosixPath(sibling.rfilename) for sibling in about.siblings or [])
    visible = [str(file) for file in found if not any(p.startswith(".") for p in file.parts)]
    return str(about.sha), [file for file in visible if file.startswith(folder)]


def _download(
    address: str, name: str, revision: str, patterns: list[str], wanted: list[str]
) -> Path:
    """Raises DataError where a wanted file is not there afterwards."""
    with _asking(address):
        import huggingface_hub

        local = Path(
            huggingface_hub.snapshot_download(
                name, repo_type="dataset", allow_patterns=patterns, revision=revision
            )
        )
    # Without an answer from the hub, the client takes what its cache happens to hold.
    if missing := [file for file in wanted if not (local / file).exists()]:
        raise DataError(
            f"{address}: {len(missing)} files are missing after the download, {missing[0]} among "
            "them; give the same command again, or give a local copy"
        )
    return local


@contextmanager
def _asking(address: str) -> Iterator[None]:
    """Raises DataError where the hub, or the way to it, fails."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # the client raises what its transport raises, too
        reason = one_line(error)[:300]
        raise DataError(
            f"{address}: could not be fetched ({type(error).__name__}: {reason}); check name, "
            "network and HF_ENDPOINT, or give a local copy"
        ) from error

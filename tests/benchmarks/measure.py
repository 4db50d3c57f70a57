"""What the benchmarks share: interleaved timing, peak memory, results as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MIB = 2**20


def peak_bytes(*, reset: bool = False) -> int:
    """Peak resident size of this program (Linux), since the last reset.

    getrusage would count what the parent held before this program was started.
    """
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def memory_of_tree(pid: int) -> int:
    """Bytes that a process and all below it hold at this moment (Linux).

    Anonymous pages shared by a fork count once, and mapped files count as the largest process has
    them: other programs that map the same libraries change nothing.
    """
    anonymous = files = 0
    for one in _tree(pid):
        try:
            text = Path(f"/proc/{one}/smaps_rollup").read_text()
        except OSError:  # it has ended
            continue
        sizes = {key: int(text.split(f"\n{key}:")[1].split()[0]) for key in _SIZES}
        anonymous += sizes["Pss_Anon"]
        files = max(files, sizes["Rss"] - sizes["Anonymous"])
    return (anonymous + files) * 1024


_SIZES = ("Rss", "Pss_Anon", "Anonymous")


def _tree(pid: int) -> list[int]:
    try:
        tasks = Path(f"/proc/{pid}/task").glob("*/children")
        below = [int(child) for task in tasks for child in task.read_text().split()]
    except OSError:
        below = []
    return [pid, *(one for child in below for one in _tree(child))]


def write_json(path: Path | None, results: dict[str, Any]) -> None:
    """The results of a run, where a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n")

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


def write_json(path: Path | None, results: dict[str, Any]) -> None:
    """The results of a run, where a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n")

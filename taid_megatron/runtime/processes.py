"""Processes of this host, told apart from later ones that got the same number."""

from __future__ import annotations

from typing import Any

import psutil

_SAME_START_SECONDS = 2.0


def runs(pid: Any, started: Any) -> bool:
    """Whether process `pid`, begun at `started` (seconds since the epoch), is there and no zombie.

    What cannot be a process, being read from a damaged file, is none.
    """
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < _SAME_START_SECONDS
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, TypeError, ValueError, OverflowError):
        return False

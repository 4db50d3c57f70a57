"""What a rank refuses, told to those who do not see its exit code: launch script and other ranks.

torchrun ends with 1 whatever its ranks end with, and a rank on another node waits minutes for one
that has left before they joined. Neither is needed where a process runs alone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from taid_megatron.config.errors import UserError

Result = TypeVar("Result")

REFUSALS = "TAID_REFUSALS"
_stores: list[Any] = []
"""Where no agent has one, a rank's own store serves the others until they have joined."""
_calls = itertools.count()


def tell_launcher(message: str) -> None:
    """Add the line to the file that launch/torchrun.sh named, if it started this process."""
    if path := os.environ.get(REFUSALS):
        with contextlib.suppress(OSError), Path(path).open("a") as file:
            file.write(f"{message}\n")  # one write: lines of several ranks do not mix


def agreed(check: Callable[[], Result], timeout_minutes: float) -> Result:
    """What `check` returns here, once no rank has raised; to be called on every rank, unjoined.

    What it raises on any rank is raised on all: its own on that rank, on the others a UserError, or
    a RuntimeError where it is none, with its text, rank and host.
    """
    import torch.distributed as dist

    from data_tools.manifest import DataError

    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():
        return check()
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
    _stores.append(store)
    store = dist.PrefixStore(f"agreed_{next(_calls)}", store)
    error: Exception | None = None
    result: Result | None = None
    try:
        result = check()
    except Exception as raised:
        error = raised
        text = f"rank {rank} on {socket.gethostname()}: {raised}"
        store.set("fault", json.dumps([isinstance(raised, (UserError, DataError)), text]))
    _wait_for_all(store, "checked", size, timeout)
    if not store.check(["fault"]):
        return result  # type: ignore[return-value]
    is_users, text = json.loads(store.get("fault"))
    # the store goes with the first node's torchrun: nobody leaves before all have read it
    _wait_for_all(store, "read", size, timeout)
    if error is not None:
        raise error
    raise UserError(text) if is_users else RuntimeError(text)


def _wait_for_all(store: Any, what: str, size: int, timeout: timedelta) -> None:
    """Return once every rank is here: one wait each, however many there are."""
    if store.add(what, 1) == size:
        store.set(f"{what} by all", "")
    store.wait([f"{what} by all"], timeout)

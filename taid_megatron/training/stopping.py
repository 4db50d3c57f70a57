"""Stopping on a signal, how a run ended, and one writer per run folder."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from data_tools.manifest import DataError, write_atomically
from taid_megatron.config.errors import UserError
from taid_megatron.config.secrets import hidden
from taid_megatron.runtime.log import get_logger
from taid_megatron.runtime.processes import runs

STOPPED = 75  # EX_TEMPFAIL: resume
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LOCK, STATUS = "run.lock", "run_status.json"
_HEARTBEAT_SECONDS = 15.0
_STALE_SECONDS = 120.0


class Signals:
    """While entered, a first SIGTERM or SIGUSR1 is noted and a second one ends the process.

    The second acts as it would without this: at once, and the process dies of the signal. Where the
    main thread waits in a call (for another rank, say) Python runs no handler until it returns. The
    system still writes each signal's number into a pipe; a thread reads it there, and ends the
    process at the second with exit code 128 and its number.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._fd_before = -1

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python has no signals
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._fd_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            _forget_pipe_in_children()
            threading.Thread(
                target=_leave_at_second, args=(self._pipe[0],), name="signals", daemon=True
            ).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(self._fd_before)
            os.close(self._pipe[1])  # which ends the thread

    def _note(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number).name
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)


def _leave_at_second(pipe: int) -> None:
    with os.fdopen(pipe, "rb", buffering=0) as numbers:
        seen = 0
        while number := numbers.read(1):
            seen += number[0] in _SIGNALS
            if seen == 2:
                os._exit(128 + number[0])


@functools.cache
def _forget_pipe_in_children() -> None:
    """A forked child (a checkpoint's writer) would write its own signals into this rank's pipe."""
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def write_status(folder: Path, state: str, code: int | None, **more: Any) -> None:
    """run_status.json: torchrun hides the ranks' exit codes. code: None while the run goes on."""
    if "error" in more:
        more["error"] = hidden(more["error"])
    content = {"state": state, "exit_code": code, **more}
    write_atomically(folder / STATUS, json.dumps(content, indent=1).encode() + b"\n")


def write_failure(folder: Path, code: int, error: str) -> None:
    """run_status.json of a run that cannot end by itself any more; on any one rank."""
    try:
        started = json.loads((folder / STATUS).read_text()).get("started")
    except (OSError, ValueError):
        started = None
    write_status(folder, "failed", code, started=started, ended=time.time(), error=error)


class RunLock:
    """RUN/run.lock: who writes in a run folder. One per folder, on one rank; see `hold`.

    It names process and host and is touched every 15 seconds. A lock is stale where its process is
    gone from this host, or, of another host, where it has not been touched for two minutes.
    """

    def __init__(self, folder: Path):
        self._path = folder / LOCK
        self._token = secrets.token_hex(8)
        self._over = threading.Event()

    def take(self) -> None:
        """Take the lock. Raises UserError where another live run has it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_name(f"{LOCK}.{self._token}")
        here = psutil.Process()
        owner = {"host": socket.gethostname(), "pid": here.pid, "started": here.create_time()}
        new.write_text(json.dumps({**owner, "token": self._token}))
        try:
            try:
                os.link(new, self._path)
            except FileExistsError:
                self._refuse_live(new)
                os.replace(new, self._path)
        finally:
            new.unlink(missing_ok=True)
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def check(self) -> None:
        """Raise UserError where another run has taken the folder since (this one was held up)."""
        if self._owner().get("token") != self._token:
            raise UserError(
                f"{self._path}: the run folder now belongs to another run; this one writes nothing "
                "more"
            )

    def release(self) -> None:
        """Give the folder free. Leaves another run's lock alone."""
        self._over.set()
        if self._owner().get("token") == self._token:
            self._path.unlink(missing_ok=True)

    def _refuse_live(self, new: Path) -> None:
        owner = self._owner()
        host, pid = owner.get("host"), owner.get("pid")
        who = f"process {pid} on {host}" if pid else "something that cannot be read"
        # ages by the file system's clock, which both hosts share
        age = new.stat().st_mtime - self._touched()
        if host == socket.gethostname():
            live = runs(pid, owner.get("started"))
        else:
            live = age < _STALE_SECONDS
        if live:
            raise UserError(
                f"{self._path}: {who} writes in this run folder (last sign of "
                f"life {max(age, 0):.0f} s ago); stop it, or name another run.folder"
            )
        get_logger().warning(f"{self._path}: taken over from {who}, which is gone")

    def _touched(self) -> float:
        try:
            return self._path.stat().st_mtime
        except OSError:
            return 0.0

    def _owner(self) -> dict[str, Any]:
        try:
            owner = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _beat(self) -> None:
        while not self._over.wait(_HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._path)


def exit_code(error: BaseException) -> int:
    """What a command ends with that failed so: 2 where the user can mend it, else 1."""
    return 2 if isinstance(error, (UserError, DataError)) else 1


@contextlib.contextmanager
def recorded(folder: Path) -> Iterator[dict[str, Any]]:
    """Keep run_status.json true from here to the end; for the one rank that writes.

    The body puts `exit_code`, and what else is worth telling, into what it is given. An exception
    is recorded with the code that it leads to.
    """
    started = time.time()
    write_status(folder, "running", None, started=started)
    told: dict[str, Any] = {"exit_code": 0}
    try:
        yield told
    except BaseException as error:
        text = " ".join(str(error).split()) or type(error).__name__
        ended = {"started": started, "ended": time.time(), "error": text}
        write_status(folder, "failed", exit_code(error), **ended)
        raise
    code = told.pop("exit_code")
    state = "stopped" if code == STOPPED else "done"
    write_status(folder, state, code, started=started, ended=time.time(), **told)

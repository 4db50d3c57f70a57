"""A process that brings one rank's files to the disk while the rank trains on.

The rank writes its files into memory (`memory_file`) and hands them over; the process copies them
to the disk, hashes them meanwhile, and answers with sizes and hashes. It is started anew for every
save, by exec, and imports neither torch nor numpy: a process forked from one that has CUDA, NCCL
and their threads may hang in a lock that none of its threads holds. It dies with its rank, stopped
or not, and leaves signals to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

_START = (
    "import json, sys; job = json.loads(sys.argv[1]); sys.path[:] = job['path']; "
    "from taid_megatron.checkpointing.writer import main; main(job)"
)
_BLOCK_BYTES = 1 << 20
_PR_SET_PDEATHSIG = 1
_KILL_SECONDS = 5.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class WriterError(RuntimeError):
    """A writer died, or took longer than it may."""


def memory_file(name: str) -> BinaryIO:
    """An empty file in memory. /proc/self/fd/<its fileno> opens it by name, here alone."""
    return os.fdopen(os.memfd_create(name), "rb", buffering=0)


class Writer:
    """A running process that writes files; `done` is to be asked until it says so."""

    def __init__(self, files: Mapping[Path, BinaryIO], *, timeout: float) -> None:
        """files: where to write what; the memory files are closed here. timeout: seconds."""
        self._timeout, self._started = timeout, time.monotonic()
        job = {
            "path": sys.path,
            "parent": os.getpid(),
            "files": [[str(path), memory.fileno()] for path, memory in files.items()],
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(job)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            pass_fds=[memory.fileno() for memory in files.values()],
            start_new_session=True,  # what is sent to the ranks' group is not meant for it
        )
        for memory in files.values():
            memory.close()
        self.records: dict[str, tuple[int, str]] = {}
        """Once done: file name -> (bytes, xxh3-128 in hex)."""

    def done(self) -> bool:
        """Whether everything is on the disk.

        Raises WriterError where it died or its time is over, OSError where writing failed.
        """
        if self.records:
            return True
        code = self._process.poll()
        if code is None:
            if time.monotonic() - self._started > self._timeout:
                raise WriterError(
                    f"its writer, process {self._process.pid}, has not finished within "
                    f"{self._timeout:g} s: look at the disk, or raise checkpoint.writer_timeout"
                )
            return False
        assert self._process.stdout is not None
        answer = json.loads(self._process.stdout.read() or b"{}")
        if "errno" in answer:
            raise OSError(answer["errno"], answer["text"], answer["file"])
        if code != 0 or "records" not in answer:
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise WriterError(f"its writer, process {self._process.pid}, died ({how})")
        self.records = {name: (size, digest) for name, size, digest in answer["records"]}
        return True

    def close(self) -> None:
        """End the process, whatever it is at. Bounded: one that hangs in the disk is left to it."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_KILL_SECONDS)
        if self._process.stdout is not None:
            self._process.stdout.close()


def main(job: dict[str, Any]) -> None:
    """The process's own work."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != job["parent"]:  # it went before that was in force
        return
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    answer: dict[str, Any] = {"records": []}
    for path, descriptor in job["files"]:
        try:
            answer["records"].append([Path(path).name, *_copy(descriptor, path)])
        except OSError as error:
            answer = {"errno": error.errno, "text": error.strerror, "file": path}
            break
    print(json.dumps(answer), flush=True)


def _copy(descriptor: int, path: str) -> tuple[int, str]:
    """Copy a memory file to the disk, a thread hashing it meanwhile; its bytes and their hash."""
    with (
        _mapped(descriptor) as content,
        open(path, "xb") as target,
        ThreadPoolExecutor(max_workers=1) as beside,
    ):
        digest = beside.submit(_hash, content)
        for start in range(0, len(content), _BLOCK_BYTES):
            target.write(content[start : start + _BLOCK_BYTES])
        target.flush()
        os.fsync(target.fileno())
        return len(content), digest.result()


def _hash(content: memoryview) -> str:
    digest = xxhash.xxh3_128()
    for start in range(0, len(content), _BLOCK_BYTES):
        digest.update(content[start : start + _BLOCK_BYTES])
    return digest.hexdigest()


@contextmanager
def _mapped(descriptor: int) -> Iterator[memoryview]:
    """A memory file's content, which nobody writes to any more; closes it."""
    with open(descriptor, "rb"):
        if not os.fstat(descriptor).st_size:  # nothing cannot be mapped
            yield memoryview(b"")
            return
        with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as whole, memoryview(whole) as content:
            yield content

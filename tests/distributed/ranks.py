"""Run a function on several gloo ranks of this machine, as if it were a call."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# How long the other ranks may still report after one has failed: the first failure in time is the
# cause, and the others' ("connection closed by peer") follow within moments.
GRACE_SECONDS = 0.5
POLL_SECONDS = 0.005


class RankFailure(RuntimeError):
    """What went wrong on a rank, with that rank's traceback in the message."""


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 120,
    grace: float = GRACE_SECONDS,
) -> list[Any]:
    """Return [function(rank, world_size, *args) for every rank], each in a process of its own.

    The ranks are forked: `function` may be a closure, and they start with what is imported and with
    the random state of the caller. Each runs torch on one thread, in a default gloo process group,
    with RANK, LOCAL_RANK and WORLD_SIZE set. Results come back by pickle. `grace`: seconds that the
    other ranks may go on after one has failed.

    Raises:
        Exception: what a rank raised (the first in time), with a RankFailure as its cause that
            holds the rank's traceback.
        RankFailure: a rank died, or its exception or result does not pickle.
        TimeoutError: some rank did not end in `timeout` seconds; the message holds their stacks.
    """
    context = multiprocessing.get_context("fork")
    # Buffered text would be written once more by every fork.
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryDirectory(prefix="ranks_") as name:
        folder = Path(name)
        ranks = [
            context.Process(
                target=_rank_main,
                args=(rank, world_size, folder, timeout, function, args),
                name=f"rank {rank} of {world_size}",
                daemon=False,  # a rank that saves a checkpoint starts processes of its own
            )
            for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            ended = _wait(ranks, folder, timeout, grace)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()
        return _collect(world_size, folder, ended)


def _rank_main(
    rank: int,
    world_size: int,
    folder: Path,
    timeout: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """Body of one rank: report the result or the exception in a file, then end."""
    stacks = (folder / f"{rank}.stacks").open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    if any(interface == "lo" for _, interface in socket.if_nameindex()):
        # Else gloo looks up the host's name, which not every machine can resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        # A rank that is done at once would else close connections that others still wait for.
        dist.barrier()
        report = ("result", function(rank, world_size, *args))
    except BaseException as error:  # pytest.fail and pytest.skip are no Exceptions
        report = ("error", (time.time(), error, traceback.format_exc()))
    _write(folder / f"{rank}.report", report)
    if report[0] == "error":
        os._exit(1)
    dist.destroy_process_group()


def _write(path: Path, report: tuple[str, Any]) -> None:
    """Write a report so that it appears whole or not at all."""
    kind, content = report
    try:
        if kind == "error" and isinstance(content[1], (SystemExit, KeyboardInterrupt)):
            raise TypeError("raised in the caller, it would end the caller")
        data = pickle.dumps(report)
        if kind == "error":
            pickle.loads(data)  # some exceptions pickle and then cannot be built again
    except Exception as problem:
        if kind == "error":
            moment, error, text = content
        else:
            moment, error, text = time.time(), problem, traceback.format_exc()
        replacement = RankFailure(f"{type(error).__name__}: {error}")
        data = pickle.dumps(("error", (moment, replacement, text)))
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    partial.rename(path)


def _wait(ranks: list[BaseProcess], folder: Path, timeout: float, grace: float) -> dict[int, int]:
    """Exit codes of the ranks that ended by themselves: of all, or once one has failed.

    Raises TimeoutError where none failed and some still run after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        codes = {rank: process.exitcode for rank, process in enumerate(ranks)}
        ended = {rank: code for rank, code in codes.items() if code is not None}
        if len(ended) == len(ranks):
            return ended
        failed = any(ended.values())
        if failed:
            deadline = min(deadline, time.monotonic() + grace)
        if time.monotonic() >= deadline:
            if failed:
                return ended
            raise TimeoutError(_describe_stuck(ranks, folder, timeout))
        time.sleep(POLL_SECONDS)


def _describe_stuck(ranks: list[BaseProcess], folder: Path, timeout: float) -> str:
    """Which ranks still run, and where they are."""
    stuck = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for rank in stuck:
        if (folder / f"{rank}.stacks").exists():  # else the signal would end it
            os.kill(ranks[rank].pid, signal.SIGUSR1)
    time.sleep(GRACE_SECONDS)
    stacks = "\n".join(
        f"rank {rank}:\n{path.read_text()}"
        for rank in stuck
        if (path := folder / f"{rank}.stacks").exists()
    )
    return f"ranks {stuck} of {len(ranks)} still ran after {timeout} s\n{stacks}"


def _collect(world_size: int, folder: Path, ended: dict[int, int]) -> list[Any]:
    """The ranks' results, or the failure that came first."""
    reports: dict[int, tuple[str, Any]] = {}
    for rank in range(world_size):
        path = folder / f"{rank}.report"
        if path.exists():
            reports[rank] = pickle.loads(path.read_bytes())
    died = {rank: code for rank, code in ended.items() if rank not in reports}
    deaths = f"ranks that ended without a report, by exit code: {died}" if died else ""
    errors = [(*content, rank) for rank, (kind, content) in reports.items() if kind == "error"]
    if errors:
        _, error, text, rank = min(errors, key=lambda item: item[0])
        raise error from RankFailure(f"on rank {rank} of {world_size}:\n{text}{deaths}")
    if died:
        raise RankFailure(deaths)
    return [reports[rank][1] for rank in range(world_size)]

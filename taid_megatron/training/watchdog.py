"""No wait without bound: a dead, stopped or hung rank ends the run on all ranks, and is named.

A collective that waits for a rank which is gone cannot be interrupted. But the main thread gives
the interpreter free while it waits, so each rank has two small threads beside it. One writes a sign
of life into the ranks' store every two seconds and reads the others'; it may block there. The other
one never blocks: it looks at its own rank's clock and at what was read (diagnosis.py), and ends the
process.

    a rank's process is gone from its host             named within some 5 s
    a rank tells nothing: stopped, or its host down    silence_timeout (while loading: 10 minutes)
    a rank left with an error                          5 s, with its error and exit code
    a rank's main thread stays in one phase            its limit and 5 s

Rank 0 watches all; the others watch rank 0 and those of their own host. Who finds something first
sets one key in the store: that rank speaks and writes run_status.json, the others follow.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType, TracebackType

import psutil
import torch.distributed as dist

from taid_megatron.runtime.log import get_logger
from taid_megatron.training import diagnosis
from taid_megatron.training.diagnosis import Evidence, Heard, Identity, Sign, Verdict
from taid_megatron.training.stopping import exit_code, write_failure

_TICK_SECONDS = 1.0
_HELD_UP_SECONDS = 5.0
_LOADING_SILENCE_SECONDS = 600.0
"""While loading a call may hold the interpreter for minutes (an index is built in one)."""
_VERDICT, _NONE = "verdict", "none"
_COMMUNICATION = ("torch/distributed", "megatron/core")


class Watchdog:
    """While entered, this rank shows that it lives, and ends with the others when one of them does.

    To be entered on every rank at once, after the ranks have joined. folder: the run's, whose
    run_status.json tells of it; None: no run, nothing to resume. store: of all ranks, for this
    object alone; None for a run of one rank. step_timeout, phase_timeout: seconds for a step, and
    for everything else (the first step too). silence_timeout: seconds that a rank may tell nothing
    and the store not answer. on_end: what this rank must still give back. The end
    is os._exit, which alone leaves a collective that waits: exit code 1, or 2 where a rank failed
    with something that the user can mend.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        rank: int,
        size: int,
        store: dist.Store | None,
        step_timeout: float,
        phase_timeout: float,
        silence_timeout: float,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder, self._rank, self._size, self._store = folder, rank, size, store
        self._step_timeout, self._phase_timeout = step_timeout, phase_timeout
        self._silence_timeout = silence_timeout
        self._on_end = on_end
        self._main = threading.main_thread()
        self._peers = [Identity.here()] * size
        self._others: dict[int, Heard] = {}
        self._gone: dict[int, float] = {}
        self._stepped = False
        self._last_sign: Sign | None = None
        self._told_last = threading.Event()
        self._found: Verdict | None = None
        self._verdict: Verdict | None = None
        self._asked = False
        self._wake, self._over = threading.Event(), threading.Event()
        self._leaving = threading.Lock()
        self._now = ("loading", time.monotonic(), phase_timeout, _LOADING_SILENCE_SECONDS)

    def step(self, number: int) -> None:
        """Step `number` begins. The first one of a process may take as long as any other phase."""
        self._begin(f"step {number}", self._step_timeout if self._stepped else self._phase_timeout)
        self._stepped = True

    def phase(self, name: str) -> None:
        """Something else than a step begins: an evaluation, a save."""
        self._begin(name, self._phase_timeout)

    def _begin(self, phase: str, limit: float) -> None:
        loaded = self._now[3] != self._silence_timeout
        # one assignment, for the other threads read all of it together
        self._now = (phase, time.monotonic(), limit, self._silence_timeout)
        if loaded:  # to be told at once: a rank stopped now would have its silence while loading
            self._wake.set()

    def __enter__(self) -> Watchdog:
        self._exchanged = self._ticked = time.monotonic()
        if self._store is not None:
            mine = self._peers[self._rank]
            dist.all_gather_object(self._peers, mine)
            unheard = Sign("runs", "loading", silence=_LOADING_SILENCE_SECONDS)
            self._others = {
                rank: Heard(unheard, self._exchanged)
                for rank in range(self._size)
                if rank != self._rank
                and (0 in (rank, self._rank) or self._peers[rank].host == mine.host)
            }
            self._store.compare_set(_VERDICT, "", _NONE)
            threading.Thread(target=self._exchange, name="signs of life", daemon=True).start()
        threading.Thread(target=self._judge, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self._store is not None and _lost_connection(error):
            # The cause is another rank: the judge finds out, says so and ends the process.
            self._asked = True
            self._over.wait(self._silence_timeout + 3 * diagnosis.BEAT_SECONDS)
        with self._leaving:
            self._over.set()
        self._last_sign = Sign("left", self._now[0])
        if error is not None:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:2000]
            self._last_sign = Sign("failed", self._now[0], code=exit_code(error), error=text)
        self._wake.set()
        if self._store is not None:
            self._told_last.wait(diagnosis.GRACE_SECONDS)  # no longer: the store may be gone

    def _sign(self) -> Sign:
        phase, began, limit, silence = self._now
        seconds = round(time.monotonic() - began, 1)
        sign = Sign("runs", phase, seconds, silence, number=time.monotonic_ns())
        if seconds <= limit:
            return sign
        place, waits = _place(sys._current_frames().get(self._main.ident or 0))
        return replace(sign, state="hangs", place=place, waits=waits)

    # --- the thread that may block

    def _exchange(self) -> None:
        while True:
            last = self._last_sign
            with contextlib.suppress(RuntimeError):  # a store that fails is as one that is silent
                self._tell_and_hear(last or self._sign())
            if last is not None:
                self._told_last.set()
                return
            self._wake.wait(diagnosis.BEAT_SECONDS)
            self._wake.clear()

    def _tell_and_hear(self, sign: Sign) -> None:
        store = self._store
        assert store is not None
        store.set(_key(self._rank), json.dumps(asdict(sign)))
        if self._found is not None:
            store.compare_set(_VERDICT, _NONE, json.dumps(asdict(self._found)))
        ranks = [rank for rank in self._others if store.check([_key(rank)])]
        verdict, *signs = store.multi_get([_VERDICT, *map(_key, ranks)])
        now = time.monotonic()
        for rank, text in zip(ranks, signs, strict=True):
            heard = Sign(**json.loads(text))
            if heard != self._others[rank].sign:
                self._others[rank] = Heard(heard, now)
        self._exchanged = now
        if verdict.decode() != _NONE:
            self._verdict = Verdict(**json.loads(verdict))

    # --- the thread that never blocks

    def _judge(self) -> None:
        found_at = 0.0
        while not self._over.wait(_TICK_SECONDS):
            now = time.monotonic()
            held_up, self._ticked = now - self._ticked - _TICK_SECONDS, now
            if held_up > _HELD_UP_SECONDS:
                self._forgive(held_up, now)
            elif self._verdict is not None:
                self._leave(self._verdict)
            elif self._found is None:
                self._found, found_at = diagnosis.diagnose(self._evidence(now)), now
                if self._found is not None:
                    self._wake.set()  # to say so in the store
                    if self._store is None:
                        self._leave(self._found)
            elif now - found_at > diagnosis.GRACE_SECONDS:
                self._leave(self._found)  # the store does not answer: each for itself

    def _forgive(self, seconds: float, now: float) -> None:
        """This process was stopped itself, and its clock was not: nobody is to blame for it."""
        phase, began, limit, silence = self._now
        self._now = (phase, began + seconds, limit, silence)
        self._exchanged = now
        self._gone.clear()
        self._others = {rank: Heard(heard.sign, now) for rank, heard in self._others.items()}

    def _evidence(self, now: float) -> Evidence:
        host = self._peers[self._rank].host
        for rank in self._others:
            if self._peers[rank].host != host or self._peers[rank].runs():
                self._gone.pop(rank, None)
            else:
                self._gone.setdefault(rank, now)
        phase, began, limit, _ = self._now
        return Evidence(
            rank=self._rank,
            size=self._size,
            own=self._sign(),
            now=now,
            exchanged=self._exchanged,
            silence=self._silence_timeout,
            peers=self._peers,
            others=dict(self._others),
            gone=dict(self._gone),
            own_limit_passed=now - began - limit,
            asked=self._asked,
        )

    def _leave(self, verdict: Verdict) -> None:
        """End this process, and with it those that nobody else would."""
        with self._leaving:
            if self._over.is_set():  # the main thread is on its way out by itself
                return
            # Whatever goes wrong here, the process ends.
            with contextlib.suppress(Exception):
                if self._rank in verdict.ranks:
                    faulthandler.dump_traceback()
            with contextlib.suppress(Exception):
                if verdict.by == self._rank:
                    resume = "the run ends, to be resumed from its last checkpoint"
                    get_logger().error(f"{verdict.text}; {resume if self._folder else 'all end'}")
                    if self._folder is not None:
                        write_failure(self._folder, verdict.code, verdict.text)
            with contextlib.suppress(Exception):
                self._on_end()
            self._kill_what_stays(verdict)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(verdict.code)

    def _kill_what_stays(self, verdict: Verdict) -> None:
        """This rank's own children; ranks of this host that cannot end themselves, being stopped.

        A launcher would wait for such a one as long as for a rank that writes a checkpoint. A rank
        that still tells something ends by itself, once it has written where it hangs.
        """
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process().children(recursive=True):
                child.kill()
        host = self._peers[self._rank].host
        for rank in verdict.ranks:
            peer = self._peers[rank]
            heard = self._others.get(rank)
            quiet = heard and self._exchanged - heard.at > 3 * diagnosis.BEAT_SECONDS
            if quiet and peer.host == host and peer.runs():
                with contextlib.suppress(OSError):
                    os.kill(peer.pid, signal.SIGKILL)


def _key(rank: int) -> str:
    return f"sign_{rank}"


def _lost_connection(error: BaseException) -> bool:
    """Whether it says no more than that another rank has gone."""
    words = ("gloo", "nccl", "connection", "rank 0 failed")
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in words)


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread is, as text, and whether that is a message between ranks."""
    if frame is None:
        return "", False
    code = frame.f_code
    path = Path(code.co_filename)
    waits = any(part in path.as_posix() for part in _COMMUNICATION)
    return f"{path.name}:{frame.f_lineno} in {code.co_name}", waits

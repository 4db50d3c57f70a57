"""Which rank ended or holds up a run, from what this rank has heard of the others.

Values in, a verdict out; watchdog.py collects the values and acts on the verdict. Times are seconds
of this rank's own monotonic clock: nothing is compared between hosts.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
from dataclasses import dataclass, field
from typing import Literal

import psutil

from taid_megatron.runtime.processes import runs

BEAT_SECONDS = 2.0
"""Between two signs of life of a rank."""
GRACE_SECONDS = 5.0
"""After a rank failed, for the others to fail with it; after one hangs, for all to say where."""


@dataclass(frozen=True)
class Identity:
    """A rank's process. `host` tells containers of one host apart."""

    host: str
    pid: int
    started: float

    @classmethod
    def here(cls) -> Identity:
        """Of this process."""
        host = socket.gethostname()
        with contextlib.suppress(OSError):
            host += f" {os.readlink('/proc/self/ns/pid')}"
        return cls(host, os.getpid(), psutil.Process().create_time())

    def runs(self) -> bool:
        """Whether it is there; to be asked on its own host."""
        return runs(self.pid, self.started)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host.split()[0]}"


@dataclass(frozen=True)
class Sign:
    """What a rank last told of itself."""

    state: Literal["runs", "hangs", "failed", "left"]
    """hangs: in one phase for longer than it may be. failed: leaves with an error."""
    phase: str
    """Such as 'step 7'."""
    seconds: float = 0.0
    """In this phase."""
    silence: float = math.inf
    """Seconds that it may tell nothing in this phase."""
    place: str = ""
    """hangs: where its main thread is."""
    waits: bool = False
    """hangs: whether that is a message between ranks."""
    code: int = 1
    """failed: exit code."""
    error: str = ""
    """failed: the cause."""
    number: int = 0
    """So that each differs from the one before."""

    @property
    def is_last(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ("failed", "left")


@dataclass(frozen=True)
class Verdict:
    """Why the run ends."""

    text: str
    ranks: list[int]
    """Who is to blame."""
    code: int = 1
    by: int = 0
    """The rank that found out: the one that speaks."""


@dataclass
class Heard:
    """The last sign of another rank, and when it came."""

    sign: Sign
    at: float


@dataclass
class Evidence:
    """What a rank knows, at `now`."""

    rank: int
    size: int
    own: Sign
    now: float
    exchanged: float
    """When the store last answered this rank; what it heard is as old."""
    silence: float
    """Seconds that the store may not answer."""
    peers: list[Identity]
    others: dict[int, Heard] = field(default_factory=dict)
    """Of the ranks that this one watches."""
    gone: dict[int, float] = field(default_factory=dict)
    """Since when a process of this host is known to be gone."""
    own_limit_passed: float = -1.0
    """Seconds by which this rank is over its phase's limit; negative: it is not."""
    asked: bool = False
    """This rank failed with a lost connection and wants to know why: no grace for the cause."""


def diagnose(seen: Evidence) -> Verdict | None:
    """What ends the run, if anything does; the surest finding first."""
    return _died(seen) or _failed(seen) or _store_lost(seen) or _silent(seen) or _hangs(seen)


def _name(seen: Evidence, rank: int) -> str:
    return f"rank {rank} ({seen.peers[rank]})"


def _verdict(seen: Evidence, text: str, ranks: list[int], code: int = 1) -> Verdict:
    return Verdict(text, ranks, code, by=seen.rank)


def _died(seen: Evidence) -> Verdict | None:
    """A process that is gone without a last word, which may have been on its way for a while."""
    for rank, since in seen.gone.items():
        if seen.now - since > BEAT_SECONDS and not seen.others[rank].sign.is_last:
            phase = seen.others[rank].sign.phase
            return _verdict(seen, f"{_name(seen, rank)} died in {phase}", [rank])
    return None


def _failed(seen: Evidence) -> Verdict | None:
    grace = 0.0 if seen.asked else GRACE_SECONDS
    for rank, heard in seen.others.items():
        if heard.sign.state == "failed" and seen.now - heard.at >= grace:
            text = f"{_name(seen, rank)} failed in {heard.sign.phase}: {heard.sign.error}"
            return _verdict(seen, text, [rank], heard.sign.code)
    return None


def _store_lost(seen: Evidence) -> Verdict | None:
    seconds = seen.now - seen.exchanged
    if not seen.others or seconds <= seen.silence:
        return None
    text = (
        f"the ranks' store has not answered rank {seen.rank} for {seconds:.0f} s: the host of "
        "rank 0, or of its launcher, is gone or cannot be reached"
    )
    return _verdict(seen, text, [])


def _silent(seen: Evidence) -> Verdict | None:
    for rank, heard in seen.others.items():
        seconds = seen.exchanged - heard.at
        if seconds > heard.sign.silence and not heard.sign.is_last:
            text = (
                f"{_name(seen, rank)} has given no sign of life for {seconds:.0f} s; its last was "
                f"in {heard.sign.phase}"
            )
            return _verdict(seen, text, [rank])
    return None


def _hangs(seen: Evidence) -> Verdict | None:
    over = [seen.own_limit_passed]
    over += [seen.now - h.at for h in seen.others.values() if h.sign.state == "hangs"]
    # rank 0 hears all; the others speak where it does not
    if max(over) < (GRACE_SECONDS if seen.rank == 0 else 3 * GRACE_SECONDS):
        return None
    blamed = _to_blame(seen)
    sign = seen.own if blamed[0] == seen.rank else seen.others[blamed[0]].sign
    where = f"{sign.phase} for {sign.seconds:.0f} s" + (f", at {sign.place}" if sign.place else "")
    if len(blamed) == seen.size > 1:
        text = f"all ranks wait for one another in {where}"
    else:
        names = ", ".join(_name(seen, rank) for rank in blamed[:8])
        more = f" and {len(blamed) - 8} more" if len(blamed) > 8 else ""
        text = f"{names}{more} did not get on: in {where}"
    return _verdict(seen, text, blamed)


def _to_blame(seen: Evidence) -> list[int]:
    """Whom the others wait for, as far as it can be told; all where it cannot."""
    signs = {seen.rank: seen.own, **{rank: heard.sign for rank, heard in seen.others.items()}}
    quiet = [
        rank
        for rank, heard in seen.others.items()
        if seen.exchanged - heard.at > 3 * BEAT_SECONDS and not heard.sign.is_last
    ]
    elsewhere = [rank for rank, sign in signs.items() if sign.state == "hangs" and not sign.waits]
    behind = [rank for rank, sign in signs.items() if sign.state == "runs"]
    return sorted(quiet or elsewhere or behind or signs)

"""Which rank is blamed for what, from what was heard."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from taid_megatron.training.diagnosis import (
    GRACE_SECONDS,
    Evidence,
    Heard,
    Identity,
    Sign,
    diagnose,
)

HERE = Identity("here namespace", 1, 1.0)
NOW, SILENCE = 1000.0, 20.0
RUNS = Sign("runs", "step 7", 1.0, silence=SILENCE)
WAITS = Sign("hangs", "step 7", 31.0, place="distributed_c10d.py:9 in all_reduce", waits=True)
STANDS = Sign("hangs", "step 7", 31.0, place="loader.py:5 in read")
FAILED = Sign("failed", "step 7", code=2, error="UserError: no such file")
LEFT = Sign("left", "step 7")


def evidence(own: Sign = RUNS, *others: Sign, **more: Any) -> Evidence:
    """Rank 0's, of others that were all heard just now."""
    heard = {rank: Heard(sign, NOW) for rank, sign in enumerate(others, start=1)}
    size = len(others) + 1
    seen = Evidence(
        rank=0,
        size=size,
        own=own,
        now=NOW,
        exchanged=NOW,
        silence=SILENCE,
        peers=[HERE] * size,
        others=heard,
    )
    return replace(seen, **more)


def heard_ago(seen: Evidence, rank: int, seconds: float) -> Evidence:
    seen.others[rank].at -= seconds
    return seen


def hanging(own: Sign, *others: Sign) -> Evidence:
    """Everybody has said so for long enough."""
    seen = evidence(own, *others, own_limit_passed=GRACE_SECONDS)
    return seen


@pytest.mark.parametrize(
    "seen",
    [
        evidence(RUNS, RUNS, RUNS),
        heard_ago(evidence(RUNS, RUNS), 1, SILENCE),
        heard_ago(evidence(RUNS, LEFT), 1, 10 * SILENCE),
        heard_ago(evidence(RUNS, replace(RUNS, silence=3600.0)), 1, 10 * SILENCE),
        # what this rank did not hear itself is nobody's fault
        heard_ago(evidence(RUNS, RUNS, exchanged=NOW - SILENCE), 1, SILENCE + 1),
        evidence(RUNS, RUNS, gone={1: NOW - 1.0}),
        evidence(RUNS, LEFT, gone={1: NOW - 100.0}),
        evidence(RUNS, FAILED),
        evidence(WAITS, WAITS, own_limit_passed=GRACE_SECONDS - 1),
        evidence(WAITS, rank=3, own_limit_passed=2 * GRACE_SECONDS),  # rank 0 has the word first
        evidence(RUNS, now=NOW + 1e6),  # alone, there is no store to be lost
    ],
)
def test_nobody_is_blamed(seen: Evidence) -> None:
    assert diagnose(seen) is None


@pytest.mark.parametrize(
    ("seen", "ranks", "words"),
    [
        (evidence(RUNS, RUNS, RUNS, gone={2: NOW - 3.0}), [2], "died in step 7"),
        (heard_ago(evidence(RUNS, RUNS), 1, SILENCE + 1), [1], "for 21 s; its last was in"),
        (heard_ago(evidence(RUNS, FAILED), 1, 6.0), [1], "failed in step 7: UserError: no such"),
        (evidence(RUNS, FAILED, asked=True), [1], "failed in step 7"),
        (evidence(RUNS, RUNS, exchanged=NOW - 21.0), [], "store has not answered rank 0 for 21 s"),
        (hanging(WAITS, WAITS, STANDS, WAITS), [2], "in step 7 for 31 s, at loader.py:5 in read"),
        (hanging(STANDS, WAITS), [0], "rank 0 (process 1 on here) did not get on"),
        # stopped a moment ago: it could not say that it hangs
        (heard_ago(hanging(WAITS, WAITS, RUNS), 2, 7.0), [2], "rank 2 (process 1 on here) did"),
        (
            heard_ago(hanging(STANDS, RUNS, WAITS), 1, 7.0),
            [1],
            "rank 1 (process 1 on here) did not",
        ),
        (hanging(WAITS, replace(RUNS, phase="the save of step 6")), [1], "in the save of step 6"),
        (hanging(WAITS, WAITS, WAITS), [0, 1, 2], "all ranks wait for one another in step 7"),
        (hanging(STANDS), [0], "at loader.py"),
        (heard_ago(evidence(RUNS, STANDS), 1, GRACE_SECONDS), [1], "at loader.py"),
    ],
)
def test_the_rank_to_blame(seen: Evidence, ranks: list[int], words: str) -> None:
    verdict = diagnose(seen)
    assert verdict is not None
    assert verdict.ranks == ranks
    assert words in verdict.text
    assert verdict.code == (2 if "UserError" in verdict.text else 1)


def test_a_process_is_gone_when_it_has_ended_or_another_has_its_number() -> None:
    me = Identity.here()
    assert me.pid == os.getpid()
    assert me.runs()
    assert not replace(me, started=me.started - 100).runs()
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert not replace(me, pid=ended.pid).runs()  # a zombie
    ended.wait()
    assert not replace(me, pid=ended.pid).runs()

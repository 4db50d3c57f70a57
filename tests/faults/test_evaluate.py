"""A rank that dies ends an evaluation on all ranks and is named, as it ends a run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from taid_megatron.cli import main
from taid_megatron.evaluation import run

from ..distributed.ranks import RankFailure, run_ranks


def _evaluate(rank: int, size: int, model: Path) -> int:
    if rank == 1:
        run._means = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    return main(["evaluate", str(model), "parallel.tensor=2"])


def test_a_killed_rank_is_named_and_the_run_s_status_stays(straight: Path, capfd) -> None:
    with pytest.raises(RankFailure, match=rf"{{0: 1, 1: {-signal.SIGKILL}}}"):
        run_ranks(2, _evaluate, straight, grace=30)
    said = capfd.readouterr().err
    assert "rank 1 (process " in said
    assert "died in " in said
    assert "resumed" not in said
    status = json.loads((straight / "run_status.json").read_text())
    assert status["state"] == "done"

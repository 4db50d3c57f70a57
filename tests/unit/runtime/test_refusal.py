"""What one rank refuses ends all of them alike, before they have joined."""

from __future__ import annotations

import multiprocessing
import os
import socket

import torch.distributed as dist

from taid_megatron.config.errors import ConfigError, UserError
from taid_megatron.runtime import refusal

RANKS = 3


def _rank(rank: int, port: int, answers) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def check(faulty: int | None, error: Exception) -> int:
        if rank == faulty:
            raise error
        return rank

    cases = [(None, KeyError()), (2, ConfigError("no card; get one")), (0, ValueError("broken"))]
    found = []
    for case in cases:
        try:
            found.append(refusal.agreed(lambda case=case: check(*case), 1.0))
        except Exception as error:
            found.append((type(error), str(error)))
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)  # the store is still to be had
    dist.destroy_process_group()
    answers.put((rank, found))


def test_what_one_rank_finds_all_of_them_raise() -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(rank, port, answers)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    try:
        found = dict(answers.get(timeout=60) for _ in ranks)
    finally:
        for process in ranks:
            process.join(timeout=10)
            process.kill()
    here = socket.gethostname()
    mendable = (UserError, f"rank 2 on {here}: no card; get one")
    other = (RuntimeError, f"rank 0 on {here}: broken")
    assert found == {
        0: [0, mendable, (ValueError, "broken")],
        1: [1, mendable, other],
        2: [2, (ConfigError, "no card; get one"), other],
    }


def test_alone_nobody_is_asked(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert refusal.agreed(lambda: 7, 1.0) == 7


def test_lines_for_the_launch_script(tmp_path, monkeypatch) -> None:
    refusal.tell_launcher("nobody listens")
    monkeypatch.setenv("TAID_REFUSALS", str(tmp_path / "refusals"))
    refusal.tell_launcher("first")
    refusal.tell_launcher("second")
    assert (tmp_path / "refusals").read_text() == "first\nsecond\n"
    monkeypatch.setenv("TAID_REFUSALS", str(tmp_path / "none/refusals"))
    refusal.tell_launcher("lost, and the exit code stands")

"""The helper that the distributed tests stand on: results, failures and hangs come back."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import RankFailure, run_ranks


def test_results_come_back_in_rank_order_and_the_ranks_can_talk():
    offset = 10.0  # a closure: the ranks are forked

    def total(rank, world_size, factor):
        value = torch.tensor([rank * factor + offset])
        dist.all_reduce(value)
        return rank, world_size, value

    results = run_ranks(3, total, 2.0)
    assert [(rank, size) for rank, size, _ in results] == [(0, 3), (1, 3), (2, 3)]
    assert all(value.item() == 36.0 for _, _, value in results)


def test_an_exception_comes_back_with_its_type_and_the_ranks_traceback():
    def fail_on_one(rank, world_size):
        if rank == 1:
            raise ValueError("seven is not a prime here")
        time.sleep(60)  # rank 0 must not be waited for

    start = time.monotonic()
    with pytest.raises(ValueError, match="seven is not a prime") as caught:
        run_ranks(2, fail_on_one)
    assert "on rank 1 of 2" in str(caught.value.__cause__)
    assert "in fail_on_one" in str(caught.value.__cause__)
    assert time.monotonic() - start < 20


def test_a_rank_that_dies_is_named():
    with pytest.raises(RankFailure, match=r"\{1: 7\}"):
        run_ranks(2, lambda rank, world_size: os._exit(7) if rank == 1 else None)


def test_leaving_without_a_report_is_no_success():
    with pytest.raises(RankFailure, match=r"\{0: 0\}"):
        run_ranks(1, lambda rank, world_size: os._exit(0))


def test_an_exit_does_not_end_the_caller():
    def leave(rank, world_size):
        raise SystemExit(3)

    with pytest.raises(RankFailure, match="SystemExit: 3"):
        run_ranks(1, leave)


def test_a_result_that_does_not_pickle_is_a_failure():
    with pytest.raises(RankFailure, match=r"pickle|local object"):
        run_ranks(1, lambda rank, world_size: lambda: None)


def test_a_hang_ends_with_the_stacks_and_leaves_no_process():
    def hang(rank, world_size):
        if rank == 0:
            time.sleep(600)
        return os.getpid()

    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 2") as caught:
        run_ranks(2, hang, timeout=3)
    assert "in hang" in str(caught.value)

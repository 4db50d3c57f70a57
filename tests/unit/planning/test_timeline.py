"""The simulated schedules on stages of known duration."""

from __future__ import annotations

import pytest

from taid_megatron.planning.timeline import Durations, Operation, order, peak, simulate


def even(stages: int, forward: float = 1.0, backward: float = 2.0) -> Durations:
    return Durations(forward=[forward] * stages, backward=[backward] * stages)


@pytest.mark.parametrize("ranks", [1, 2, 4, 5])
@pytest.mark.parametrize("micro_batches", [1, 3, 8])
def test_1f1b_with_even_stages_has_the_known_length_and_bubble(ranks, micro_batches) -> None:
    timeline = simulate(even(ranks), ranks, 1, micro_batches)
    assert timeline.seconds == pytest.approx((micro_batches + ranks - 1) * 3.0)
    assert timeline.bubble == pytest.approx((ranks - 1) / (micro_batches + ranks - 1))


@pytest.mark.parametrize(
    ("ranks", "chunks", "groups"), [(2, 2, 1), (2, 2, 4), (4, 2, 2), (4, 3, 2)]
)
def test_chunks_divide_the_bubble(ranks, chunks, groups) -> None:
    micro_batches = ranks * groups
    timeline = simulate(even(ranks * chunks), ranks, chunks, micro_batches)
    # Narayanan et al., 2021: the bubble is (p - 1)(f + b) / v of the whole model's f and b per rank
    assert timeline.seconds == pytest.approx(micro_batches * chunks * 3.0 + (ranks - 1) * 3.0)


def test_uneven_stages_by_hand() -> None:
    durations = Durations(forward=[1.0, 3.0], backward=[2.0, 4.0])
    timeline = simulate(durations, 2, 1, 2)
    # rank 0: F0 0-1, F1 1-2, B0 8-10, B1 15-17;  rank 1: F0 1-4, B0 4-8, F1 8-11, B1 11-15
    assert timeline.seconds == pytest.approx(17.0)
    ends = {(e.rank, e.operation.backward, e.operation.micro_batch): e.end for e in timeline.events}
    assert ends == {
        (0, False, 0): 1.0,
        (0, False, 1): 2.0,
        (0, True, 0): 10.0,
        (0, True, 1): 17.0,
        (1, False, 0): 4.0,
        (1, True, 0): 8.0,
        (1, False, 1): 11.0,
        (1, True, 1): 15.0,
    }


@pytest.mark.parametrize(("overlapped", "seconds"), [(True, 19.0), (False, 19.0)])
def test_messages_delay_the_receiver(overlapped, seconds) -> None:
    durations = Durations(
        forward=[1.0, 3.0],
        backward=[2.0, 4.0],
        send_forward=0.5,
        send_backward=1.5,
        overlapped=overlapped,
    )
    timeline = simulate(durations, 2, 1, 2)
    # overlapped: F0 on rank 1 at 1.5-4.5, then 4, 3, 4 without a pause, 1.5, 2;
    # else rank 1 waits 1.5 after B0 before it goes on
    assert timeline.seconds == pytest.approx(seconds if overlapped else seconds + 1.5)


def test_a_rank_works_off_every_micro_batch_once() -> None:
    for chunks, micro_batches in ((1, 7), (3, 8)):
        for rank in range(4):
            done = order(rank, 4, chunks, micro_batches)
            assert len(set(done)) == len(done) == 2 * chunks * micro_batches
            assert {operation.stage % 4 for operation in done} == {rank}


def test_1f1b_keeps_as_many_micro_batches_as_stages_follow() -> None:
    held, extra = [1.0] * 4, [0.25] * 4
    assert [peak(rank, 4, 1, 16, held, extra) for rank in range(4)] == [4.25, 3.25, 2.25, 1.25]
    assert [peak(rank, 4, 1, 2, held, extra) for rank in range(4)] == [2.25, 2.25, 2.25, 1.25]


def test_the_order_is_megatrons() -> None:
    assert order(1, 2, 1, 2) == [
        *(Operation(False, 1, 0), Operation(True, 1, 0)),
        *(Operation(False, 1, 1), Operation(True, 1, 1)),
    ]
    # rank 0 of 2 with two chunks: 2 * 1 + 2 warm-up forwards
    assert [(o.backward, o.stage, o.micro_batch) for o in order(0, 2, 2, 2)] == [
        *((False, 0, 0), (False, 0, 1), (False, 2, 0), (False, 2, 1)),
        *((True, 2, 0), (True, 2, 1), (True, 0, 0), (True, 0, 1)),
    ]

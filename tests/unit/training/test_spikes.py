"""A loss that leaps up is found; noise, falls and the start of a run are not."""

from __future__ import annotations

import random

import pytest

from taid_megatron.training.spikes import RecentLosses


def fed(losses: list[float], deviations: float | None = 6.0) -> list[int]:
    """Which of the losses are spikes."""
    recent = RecentLosses()
    return [n for n, loss in enumerate(losses) if recent.add(loss, deviations) is not None]


def noisy(count: int, level: float = 2.0) -> list[float]:
    rng = random.Random(0)
    return [rng.gauss(level, 0.1) for _ in range(count)]


def test_a_leap_is_a_spike_and_told_in_deviations() -> None:
    losses = noisy(60)
    losses[40] = 5.0
    assert fed(losses) == [40]
    assert fed(losses, None) == []
    recent = RecentLosses()
    for loss in [1.9, 2.1] * 10:
        recent.add(loss, 6.0)
    assert recent.add(3.0, 6.0) == pytest.approx(10.0)


def test_what_is_no_spike() -> None:
    assert fed(noisy(500)) == []
    assert fed([*noisy(10), 50.0, *noisy(5)]) == []  # too early to tell
    assert fed([8.0 - n / 20 for n in range(120)]) == []
    assert fed([2.0] * 30 + [2.05] * 30) == []


def test_a_loss_that_stays_up_is_not_reported_for_ever() -> None:
    found = fed(noisy(50) + noisy(200, level=4.0))
    assert found[0] == 50
    assert len(found) < 10

"""Steps whose loss leaps up: found for the record, changing nothing of the run."""

from __future__ import annotations

import math
from collections import deque

_WINDOW, _AT_LEAST = 100, 20
_FLOOR = 0.01


class RecentLosses:
    """Losses of the last 100 steps, against which the next one is held.

    They are not saved: after a resume they are gathered anew, and the first 20 steps have no spike.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def add(self, loss: float, deviations: float | None) -> float | None:
        """Take in a step's loss; by how many standard deviations it is a spike, None if it is none.

        A spike is more than `deviations` above the mean of the window. The deviation counts as at
        least 1% of the mean, so that a loss that hardly moves has no spikes in its noise. A spike
        enters the window too: a loss that stays up is reported once or a few times, not for ever.
        """
        before = [*self._losses]
        self._losses.append(loss)
        if deviations is None or len(before) < _AT_LEAST:
            return None
        mean = math.fsum(before) / len(before)
        variance = math.fsum((each - mean) ** 2 for each in before) / len(before)
        above = (loss - mean) / max(math.sqrt(variance), _FLOOR * abs(mean), 1e-12)
        return above if above > deviations else None

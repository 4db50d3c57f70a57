"""The interpolation parameter t of TAID: how far the target stands between student and teacher."""

from __future__ import annotations

import math
from typing import Any

RULES = ("paper", "official")

# Keeps the relative change finite where the previous objective is 0. Source: the authors' code.
_EPSILON = 1e-15


class TAIDSchedule:
    """t as a function of the objectives seen so far; `update` is called once per optimizer step.

    With J[n] the objective of update n = 1, 2, ... (averaged over the whole global batch, so that
    every rank computes the same t):

        delta = (J[n-1] - J[n]) / (J[n-1] + epsilon)
        m     = beta * m + (1 - beta) * delta                          m starts at 0
        t     = min(t_end, max(t_linear, t + step))
        step  = alpha * sigmoid(m)              rule "paper"
                alpha * sigmoid(m) * (1 - t)    rule "official"

    `t_linear` runs from t_start to t_end over total_steps: at update n it has gone n steps under
    "paper" and n - 1 under "official". The first update has no J[n-1]: it records J and applies
    t_linear alone, which under "official" is t_start and changes nothing. `adaptive=False` leaves
    t = t_linear, the linear ablation.

    t never falls, never leaves [t_start, t_end], and stays at t_end after total_steps.

    Args:
        t_start: first value of t, 0 <= t_start <= t_end.
        t_end: last value of t, at most 1.
        alpha: largest step per update, 0 <= alpha <= 1.
        beta: decay of the momentum, 0 <= beta < 1.
        total_steps: optimizer steps of the whole run, at least 1.
        adaptive: False for the linear ablation.
        rule: "paper" for the published text, "official" for the authors' released code.

    Raises:
        ValueError: an argument is out of its range.

    Source: TAID (arXiv 2501.16937), Algorithm 1; the authors' released code for "official".
    """

    def __init__(
        self,
        t_start: float,
        t_end: float,
        alpha: float,
        beta: float,
        total_steps: int,
        adaptive: bool = True,
        rule: str = "paper",
    ) -> None:
        if not 0.0 <= t_start <= t_end <= 1.0:
            raise ValueError(
                f"t_start={t_start} and t_end={t_end} must satisfy 0 <= t_start <= t_end <= 1"
            )
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha={alpha} is not in [0, 1]")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"beta={beta} is not in [0, 1)")
        if not _is_count(total_steps) or total_steps < 1:
            raise ValueError(f"total_steps={total_steps!r} is not a whole number of at least 1")
        if rule not in RULES:
            raise ValueError(f"rule={rule!r} is not one of {', '.join(RULES)}")
        self._t_start = float(t_start)
        self._t_end = float(t_end)
        self._alpha = float(alpha)
        self._beta = float(beta)
        self._total_steps = total_steps
        self._adaptive = adaptive
        self._rule = rule

        self._t = self._t_start
        self._momentum = 0.0
        self._previous_objective: float | None = None
        self._num_updates = 0

    @property
    def t(self) -> float:
        """The value to use for the next optimizer step."""
        return self._t

    @property
    def momentum(self) -> float:
        """m, the smoothed relative fall of the objective."""
        return self._momentum

    @property
    def num_updates(self) -> int:
        """Updates done so far."""
        return self._num_updates

    def update(self, objective: float) -> float:
        """Take in the objective of one optimizer step and return the t for the next one.

        `objective` is J in nats per token: the divergence for "paper", -sum p_t log q for
        "official". Raises ValueError, and changes nothing, where it is not finite.
        """
        objective = float(objective)
        if not math.isfinite(objective):
            raise ValueError(
                f"objective={objective} at update {self._num_updates + 1} is not finite: "
                "skip the update for a step that was skipped"
            )
        # A divergence near zero can round to just below it.
        objective = max(objective, 0.0)
        previous, self._previous_objective = self._previous_objective, objective
        self._num_updates += 1
        if previous is None:
            self._t = max(self._t, self._linear())
            return self._t
        change = (previous - objective) / (previous + _EPSILON)
        self._momentum = self._beta * self._momentum + (1.0 - self._beta) * change
        self._t = min(self._t_end, max(self._linear(), self._t + self._step()))
        return self._t

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, as values that survive JSON bit for bit."""
        return {
            "t": self._t,
            "momentum": self._momentum,
            "previous_objective": self._previous_objective,
            "num_updates": self._num_updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict()` was taken.

        Raises ValueError, and changes nothing, where a key is missing or unknown, a value is not
        finite, or t lies outside this schedule's [t_start, t_end].
        """
        expected = set(self.state_dict())
        if set(state) != expected:
            raise ValueError(
                f"state of the TAID schedule: missing keys {sorted(expected - set(state))}, "
                f"unknown keys {sorted(set(state) - expected)}"
            )
        t = _finite("t", state["t"])
        if not self._t_start <= t <= self._t_end:
            raise ValueError(
                f"state's t={t} is outside [t_start={self._t_start}, t_end={self._t_end}]: "
                "resume with the t_start and t_end that the run was started with"
            )
        momentum = _finite("momentum", state["momentum"])
        previous = state["previous_objective"]
        if previous is not None:
            previous = _finite("previous_objective", previous)
        num_updates = state["num_updates"]
        if not _is_count(num_updates) or num_updates < 0:
            raise ValueError(f"state's num_updates={num_updates!r} is not a whole number >= 0")
        self._t = t
        self._momentum = momentum
        self._previous_objective = previous
        self._num_updates = num_updates

    def _linear(self) -> float:
        """t_linear of the current update, at most t_end."""
        done = self._num_updates if self._rule == "paper" else self._num_updates - 1
        fraction = min(1.0, done / self._total_steps)
        return min(self._t_end, self._t_start + (self._t_end - self._t_start) * fraction)

    def _step(self) -> float:
        """How far the momentum moves t at this update."""
        if not self._adaptive:
            return 0.0
        step = self._alpha * sigmoid(self._momentum)
        return step * (1.0 - self._t) if self._rule == "official" else step


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x) without overflow: the objective can jump by many orders of magnitude."""
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    grown = math.exp(x)
    return grown / (1.0 + grown)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"state's {name}={value!r} is not a finite number")
    return float(value)

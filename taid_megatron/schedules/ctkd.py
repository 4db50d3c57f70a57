"""The learned temperature of CTKD: as hard for the student as it can be made, by and by."""

from __future__ import annotations

import math
from typing import Any

from taid_megatron.schedules.taid import sigmoid

VARIANTS = ("paper", "official")

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


class CTKDTemperature:
    """One temperature for all tokens, moved against the student by a reversed gradient.

        T = start + span * sigmoid(theta)             theta starts at 1
        theta is trained by Adam on  -lambda dL/dtheta,  lambda = (1 - cos(pi n / N)) / 2

    L is the loss that the student lowers, n the updates done, N total_steps: the temperature learns
    to raise the loss, at first not at all and at the end with full weight. `update` is called once
    per optimizer step with the mean of dL/dT over the global batch, so that every rank has the same
    T. 'official' follows the TAID authors' code, which neither reverses nor raises lambda: theta
    lowers the loss too.

    Args:
        total_steps: optimizer steps of the whole run, at least 1.
        start: lowest temperature, above 0.
        span: how far the temperature reaches above `start`, above 0.
        lr: Adam's learning rate; None for the one that `update` is given.
        variant: "paper" or "official".

    Raises:
        ValueError: an argument is out of its range.

    Source: Curriculum Temperature for Knowledge Distillation (arXiv 2211.16231), global version.
    """

    def __init__(
        self,
        total_steps: int,
        start: float = 1.0,
        span: float = 20.0,
        lr: float | None = None,
        variant: str = "paper",
    ) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps={total_steps!r} is not a whole number of at least 1")
        for name, value in (("start", start), ("span", span), ("lr", 1.0 if lr is None else lr)):
            if not 0.0 < value < math.inf:
                raise ValueError(f"{name}={value} is not a finite number above 0")
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} is not one of {', '.join(VARIANTS)}")
        self._total_steps, self._start, self._span = total_steps, float(start), float(span)
        self._lr, self._variant = lr, variant
        self._state = {"theta": 1.0, "mean": 0.0, "mean_square": 0.0, "num_updates": 0}

    @property
    def value(self) -> float:
        """The temperature of the next optimizer step."""
        return self._start + self._span * sigmoid(self._state["theta"])

    @property
    def reversal(self) -> float:
        """What the next gradient is multiplied with: -lambda, or 1 for 'official'."""
        if self._variant == "official":
            return 1.0
        done = min(1.0, self._state["num_updates"] / self._total_steps)
        return -(1.0 - math.cos(math.pi * done)) / 2.0

    def update(self, gradient: float, lr: float) -> float:
        """Take in dL/dT of one optimizer step; return the temperature of the next one.

        Raises ValueError, and changes nothing, where the gradient is not finite.
        """
        if not math.isfinite(gradient):
            raise ValueError(f"gradient={gradient} in the temperature is not finite")
        state = self._state
        share = sigmoid(state["theta"])
        slope = self.reversal * gradient * self._span * share * (1.0 - share)
        count = state["num_updates"] + 1
        state["mean"] = _BETA1 * state["mean"] + (1.0 - _BETA1) * slope
        state["mean_square"] = _BETA2 * state["mean_square"] + (1.0 - _BETA2) * slope * slope
        mean = state["mean"] / (1.0 - _BETA1**count)
        root = math.sqrt(state["mean_square"] / (1.0 - _BETA2**count))
        state["theta"] -= (lr if self._lr is None else self._lr) * mean / (root + _EPSILON)
        state["num_updates"] = count
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, as values that survive JSON bit for bit."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict()` was taken. Raises ValueError where it is not one."""
        if set(state) != set(self._state):
            raise ValueError(
                f"state of the CTKD temperature has keys {sorted(state)}, not {sorted(self._state)}"
            )
        for name, value in state.items():
            whole = name == "num_updates"
            right = isinstance(value, int) if whole else isinstance(value, (int, float))
            if isinstance(value, bool) or not right or not math.isfinite(value):
                raise ValueError(f"state's {name}={value!r} is not a finite number")
        if state["num_updates"] < 0 or state["mean_square"] < 0:
            raise ValueError(f"state of the CTKD temperature has a negative count: {state}")
        self._state = dict(state)

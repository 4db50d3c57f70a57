"""The learned temperature of CTKD: reversed, raised by a cosine, restored exactly."""

import json
import math

import pytest

from taid_megatron.schedules import CTKDTemperature

STEPS = 10


def test_starts_where_theta_is_1():
    temperature = CTKDTemperature(STEPS, start=2.0, span=4.0)
    assert temperature.value == pytest.approx(2.0 + 4.0 / (1.0 + math.exp(-1.0)), rel=1e-15)


def test_the_gradient_is_reversed_and_raised_by_a_cosine():
    temperature = CTKDTemperature(STEPS, lr=1e-3)
    found = []
    for _ in range(STEPS + 2):
        found.append(temperature.reversal)
        temperature.update(1.0, lr=1.0)
    expected = [-(1 - math.cos(math.pi * n / STEPS)) / 2 for n in range(STEPS + 1)]
    assert found == pytest.approx([*expected, -1.0], abs=1e-15)
    assert found[0] == 0.0


def test_the_first_update_moves_nothing_and_later_ones_raise_the_loss():
    """dL/dT > 0: a higher temperature raises the loss, so it rises; and the other way round."""
    for sign in (1.0, -1.0):
        temperature = CTKDTemperature(STEPS, lr=0.01)
        first = temperature.value
        assert temperature.update(sign * 0.3, lr=1.0) == first
        values = [temperature.update(sign * 0.3, lr=1.0) for _ in range(5)]
        assert values == sorted(values, reverse=sign < 0)
        assert abs(values[-1] - first) > 1e-3


def test_official_lowers_the_loss_from_the_first_update_on():
    temperature = CTKDTemperature(STEPS, lr=0.01, variant="official")
    first = temperature.value
    assert temperature.reversal == 1.0
    assert temperature.update(0.3, lr=1.0) < first


def test_one_step_of_adam_by_hand():
    """With a bias-corrected first step Adam moves by lr times the gradient's sign."""
    temperature = CTKDTemperature(STEPS, start=1.0, span=2.0, variant="official")
    value = temperature.update(5.0, lr=0.25)
    assert value == pytest.approx(1.0 + 2.0 / (1.0 + math.exp(-0.75)), rel=1e-8)


def test_its_own_learning_rate_comes_before_the_students():
    own = CTKDTemperature(STEPS, lr=0.25, variant="official")
    students = CTKDTemperature(STEPS, variant="official")
    assert own.update(1.0, lr=9.0) == students.update(1.0, lr=0.25)


def test_a_restored_one_goes_on_bit_for_bit():
    straight = CTKDTemperature(STEPS, lr=0.05)
    stopped = CTKDTemperature(STEPS, lr=0.05)
    gradients = [0.3, -1.7, 0.01, 2.5, -0.4, 0.9]
    for gradient in gradients[:3]:
        straight.update(gradient, 1.0)
        stopped.update(gradient, 1.0)
    resumed = CTKDTemperature(STEPS, lr=0.05)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    for gradient in gradients[3:]:
        assert resumed.update(gradient, 1.0) == straight.update(gradient, 1.0)


def test_a_gradient_that_is_not_finite_changes_nothing():
    temperature = CTKDTemperature(STEPS)
    before = temperature.state_dict()
    for gradient in (math.nan, math.inf):
        with pytest.raises(ValueError, match="is not finite"):
            temperature.update(gradient, 1.0)
    assert temperature.state_dict() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total_steps": 0}, "total_steps=0"),
        ({"start": 0.0}, "start=0.0"),
        ({"span": math.inf}, "span=inf"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"variant": "text"}, "variant='text' is not one of paper, official"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        CTKDTemperature(**{"total_steps": STEPS, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "has keys"),
        ({"theta": math.nan}, "theta=nan is not a finite number"),
        ({"num_updates": 1.5}, "num_updates=1.5"),
        ({"mean_square": -1.0}, "negative"),
    ],
)
def test_bad_states(change, message):
    temperature = CTKDTemperature(STEPS)
    before = temperature.state_dict()
    with pytest.raises(ValueError, match=message):
        temperature.load_state_dict({**before, **change})
    assert temperature.state_dict() == before

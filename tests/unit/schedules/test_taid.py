"""t follows its two rules to the bit, keeps its bounds, and continues from saved state."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taid_megatron.schedules import TAIDSchedule

OBJECTIVES = [2.0, 1.0, 1.5, 1.5]


def make(rule="paper", **changes):
    arguments = {"t_start": 0.25, "t_end": 0.75, "alpha": 0.125, "beta": 0.5, "total_steps": 8}
    return TAIDSchedule(**{**arguments, "rule": rule, **changes})


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_paper_by_hand():
    """alpha 1/8, beta 1/2, t_linear gains 1/16 an update.

    n  J    delta  m       step            t_linear   t
    1  2.0  -      0       -               0.3125     0.3125
    2  1.0  1/2    1/4     sigmoid(1/4)/8  0.3750     0.3125 + 0.0703 = 0.3828
    3  1.5  -1/2   -1/8    0.0586          0.4375     0.4414
    4  1.5  0      -1/16   0.0605          0.5000     0.5019
    """
    schedule = make("paper")
    found = [schedule.update(objective) for objective in OBJECTIVES]
    second = 0.3125 + sigmoid(0.25) / 8
    third = second + sigmoid(-0.125) / 8
    fourth = third + sigmoid(-0.0625) / 8
    assert found == pytest.approx([0.3125, second, third, fourth], abs=1e-15)
    assert found == pytest.approx([0.3125, 0.3828, 0.4414, 0.5019], abs=1e-4)
    assert schedule.momentum == pytest.approx(-0.0625, abs=1e-15)


def test_official_by_hand():
    """As above with step * (1 - t), t_linear one update behind, and a first call that only records.

    n  J    m       step                t_linear   t
    1  2.0  0       -                   -          0.2500
    2  1.0  1/4     0.0703 * (1 - t)    0.3125     max(0.3125, 0.25 + 0.0527) = 0.3125
    3  1.5  -1/8    0.0586 * 0.6875     0.3750     max(0.3750, 0.3125 + 0.0403) = 0.3750
    4  1.5  -1/16   0.0605 * 0.6250     0.4375     max(0.4375, 0.3750 + 0.0378) = 0.4375
    """
    schedule = make("official")
    assert [schedule.update(objective) for objective in OBJECTIVES] == [0.25, 0.3125, 0.375, 0.4375]


def test_official_step_shrinks_with_1_minus_t():
    """So slow a t_linear that the step decides."""
    schedule = make("official", total_steps=10**9)
    schedule.update(2.0)
    second = 0.25 + sigmoid(0.25) / 8 * 0.75
    third = second + sigmoid(-0.125) / 8 * (1 - second)
    assert schedule.update(1.0) == pytest.approx(second, abs=1e-12)
    assert schedule.update(1.5) == pytest.approx(third, abs=1e-12)


def test_linear_ablation():
    paper, official = make("paper", adaptive=False), make("official", adaptive=False)
    assert [paper.update(1.0) for _ in range(9)] == [
        *(0.25 + n / 16 for n in range(1, 9)),
        0.75,
    ]
    assert [official.update(1.0) for _ in range(10)] == [
        *(0.25 + n / 16 for n in range(9)),
        0.75,
    ]


@pytest.mark.parametrize("rule", ["paper", "official"])
def test_the_first_objective_has_no_predecessor(rule):
    """Whatever its size, it moves neither momentum nor the step."""
    small, large = make(rule), make(rule)
    assert small.update(1e-6) == large.update(1e6)
    assert small.momentum == large.momentum == 0.0


@pytest.mark.parametrize("rule", ["paper", "official"])
def test_a_long_run_ends_at_t_end_and_stays(rule):
    schedule = make(rule, alpha=5e-4, beta=0.99, total_steps=100)
    values = [schedule.update(3.0 / (1 + n)) for n in range(150)]
    assert values[101] == values[-1] == 0.75
    assert max(values) == 0.75


@pytest.mark.parametrize("objective", [math.nan, math.inf, -math.inf])
def test_a_non_finite_objective_changes_nothing(objective):
    schedule = make()
    schedule.update(2.0)
    before = schedule.state_dict()
    with pytest.raises(ValueError, match=f"objective={objective} at update 2"):
        schedule.update(objective)
    assert schedule.state_dict() == before


def test_a_divergence_rounded_below_zero_is_zero():
    schedule, reference = make(), make()
    assert schedule.update(-1e-15) == reference.update(0.0)
    assert schedule.update(1.0) == reference.update(1.0)


def test_objectives_that_explode_do_not_overflow():
    schedule = make()
    for objective in (1e-300, 1e290, 1e-300, 1e290):
        assert 0.25 <= schedule.update(objective) <= 0.75


changes = st.fixed_dictionaries(
    {
        "alpha": st.floats(0, 1),
        "beta": st.floats(0, 0.999),
        "total_steps": st.integers(1, 30),
        "adaptive": st.booleans(),
        "rule": st.sampled_from(["paper", "official"]),
    }
)
bounds = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)
histories = st.lists(st.floats(0, 1e6), min_size=1, max_size=40)


@settings(deadline=None)  # a busy machine is no failure
@given(changes, bounds, histories)
def test_t_never_falls_never_leaves_its_bounds_and_is_never_below_linear(change, limits, history):
    t_start, t_end = limits
    schedule = make(**change, t_start=t_start, t_end=t_end)
    previous = schedule.t
    assert previous == t_start
    for n, objective in enumerate(history, start=1):
        t = schedule.update(objective)
        done = n if change["rule"] == "paper" else n - 1
        linear = t_start + (t_end - t_start) * min(1, done / change["total_steps"])
        assert schedule.t == t
        assert previous <= t <= t_end
        assert t >= min(linear, t_end)
        if not change["adaptive"]:
            assert t == pytest.approx(linear, abs=1e-12)
        previous = t


@settings(deadline=None)  # a busy machine is no failure
@given(changes, histories, st.integers(0, 40))
def test_continuing_from_json_equals_running_straight_bit_for_bit(change, history, cut):
    straight, first, second = make(**change), make(**change), make(**change)
    expected = [straight.update(objective) for objective in history]
    found = [first.update(objective) for objective in history[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    found += [second.update(objective) for objective in history[cut:]]
    assert found == expected
    assert second.state_dict() == straight.state_dict()


def test_the_state_is_four_values():
    schedule = make()
    assert schedule.state_dict() == {
        "t": 0.25,
        "momentum": 0.0,
        "previous_objective": None,
        "num_updates": 0,
    }
    schedule.update(2.0)
    assert schedule.state_dict() == {
        "t": 0.3125,
        "momentum": 0.0,
        "previous_objective": 2.0,
        "num_updates": 1,
    }
    assert schedule.num_updates == 1


GOOD = {"t": 0.5, "momentum": 0.1, "previous_objective": 2.0, "num_updates": 3}
BAD_STATES = {
    "missing": ({"t": 0.5, "momentum": 0.1, "num_updates": 3}, "missing keys .*previous_objective"),
    "unknown": ({**GOOD, "alpha": 0.1}, "unknown keys .*alpha"),
    "t above": ({**GOOD, "t": 0.8}, r"t=0.8 is outside \[t_start=0.25, t_end=0.75\]"),
    "t below": ({**GOOD, "t": 0.2}, "t=0.2 is outside"),
    "t nan": ({**GOOD, "t": math.nan}, "t=nan"),
    "t text": ({**GOOD, "t": "0.5"}, "t='0.5'"),
    "momentum": ({**GOOD, "momentum": math.inf}, "momentum=inf"),
    "objective": ({**GOOD, "previous_objective": math.nan}, "previous_objective=nan"),
    "negative count": ({**GOOD, "num_updates": -1}, "num_updates=-1"),
    "broken count": ({**GOOD, "num_updates": 1.5}, "num_updates=1.5"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_wrong_state_is_refused_and_changes_nothing(case):
    state, message = BAD_STATES[case]
    schedule = make()
    before = schedule.state_dict()
    with pytest.raises(ValueError, match=message):
        schedule.load_state_dict(state)
    assert schedule.state_dict() == before


BAD_ARGUMENTS = {
    "t_start below 0": ({"t_start": -0.1}, "t_start=-0.1"),
    "t_end above 1": ({"t_end": 1.1}, "t_end=1.1"),
    "reversed": ({"t_start": 0.8}, "t_start=0.8 and t_end=0.75"),
    "not a number": ({"t_end": math.nan}, "t_end=nan"),
    "alpha": ({"alpha": -1e-3}, "alpha=-0.001"),
    "alpha above": ({"alpha": 2}, "alpha=2"),
    "beta": ({"beta": 1.0}, "beta=1.0"),
    "beta below": ({"beta": -0.5}, "beta=-0.5"),
    "no steps": ({"total_steps": 0}, "total_steps=0"),
    "half a step": ({"total_steps": 1.5}, "total_steps=1.5"),
    "rule": ({"rule": "papers"}, "rule='papers' is not one of paper, official"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_wrong_arguments(case):
    change, message = BAD_ARGUMENTS[case]
    with pytest.raises(ValueError, match=message):
        make(**change)

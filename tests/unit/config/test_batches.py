from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from taid_megatron.config.batches import (
    batch_plan,
    batch_sizes,
    data_parallel_size,
    global_batch_size_at,
    num_microbatches,
    train_samples,
    train_steps,
)
from taid_megatron.config.schema import Config

from .configs import make


@st.composite
def ramped(draw: st.DrawFn) -> Config:
    start, increment = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    rampup = {"start": start, "increment": increment, "samples": draw(st.integers(1, 400))}
    length = {"steps": None, draw(st.sampled_from(["steps", "tokens"])): draw(st.integers(1, 3000))}
    return make(
        training__global_batch_size=start + increment * draw(st.integers(1, 8)),
        training__rampup=draw(st.sampled_from([rampup, rampup, None])),
        training__seq_length=draw(st.integers(1, 9)),
        **{f"training__{key}": value for key, value in length.items()},
    )


def walk(config: Config) -> tuple[int, int]:
    """(steps, samples) by taking one step after the other."""
    training, steps, samples = config.training, 0, 0

    def more() -> bool:
        if training.steps is not None:
            return steps < training.steps
        return samples * training.seq_length < training.tokens

    while more():
        samples += global_batch_size_at(config, samples)
        steps += 1
    return steps, samples


@settings(max_examples=150, deadline=None)
@given(config=ramped())
def test_steps_and_samples_equal_a_walk_through_the_run(config: Config):
    assert (train_steps(config), train_samples(config)) == walk(config)


@settings(max_examples=100, deadline=None)
@given(config=ramped(), consumed=st.integers(0, 500))
def test_the_batch_size_follows_its_definition(config: Config, consumed: int):
    """Grows by one increment per samples / n consumed; exact, in integers."""
    training = config.training
    size = global_batch_size_at(config, consumed)
    assert size in batch_sizes(training)
    if training.rampup is None:
        assert size == training.global_batch_size
        return
    grown = (size - training.rampup.start) // training.rampup.increment
    increments = len(batch_sizes(training)) - 1
    assert grown * training.rampup.samples <= consumed * increments
    assert grown == increments or (grown + 1) * training.rampup.samples > consumed * increments


def test_a_ramp_by_hand():
    config = make(
        training__global_batch_size=8,
        training__rampup={"start": 2, "increment": 2, "samples": 12},
        training__steps=7,
    )
    sizes = [global_batch_size_at(config, consumed) for consumed in (0, 3, 4, 8, 11, 12, 10**9)]
    assert sizes == [2, 2, 4, 6, 6, 8, 8]
    assert list(batch_plan(config)) == [(2, 2), (4, 1), (6, 1), (8, 3)]
    assert (train_steps(config), train_samples(config)) == (7, 38)


def test_a_step_may_jump_over_a_stage_of_the_ramp():
    config = make(
        training__global_batch_size=12,
        training__rampup={"start": 4, "increment": 4, "samples": 4},
        training__steps=3,
    )
    assert list(batch_plan(config)) == [(4, 1), (12, 2)]


def test_a_boundary_that_floats_miss():
    """int(3 / (3 / 59)) is 58: a ramp in floating point would be late by one increment."""
    config = make(
        training__global_batch_size=60,
        training__rampup={"start": 1, "increment": 1, "samples": 3},
    )
    assert int(3 / (3 / 59)) == 58
    assert global_batch_size_at(config, 3) == 60


def test_without_a_ramp_there_is_one_size():
    assert list(batch_sizes(make().training)) == [16]
    assert list(batch_plan(make())) == [(16, 100)]


def test_tokens_are_rounded_up_to_whole_steps():
    def steps(tokens: int) -> int:
        return train_steps(make(training__steps=None, training__tokens=tokens))

    one_step = 16 * 32
    assert [steps(tokens) for tokens in (1, one_step, one_step + 1)] == [1, 1, 2]


def test_replicas_and_micro_batches():
    config = make(
        parallel__tensor=2,
        parallel__pipeline=2,
        training__micro_batch_size=2,
        training__rampup={"start": 8, "increment": 8, "samples": 100},
    )
    assert data_parallel_size(config, 8) == 2
    assert num_microbatches(config, 8) == 2
    assert num_microbatches(config, 8, consumed_samples=100) == 4

"""How many sequences, micro-batches and optimizer steps a run has: exact integers, no state.

Ramp-up (`training.rampup`), after Megatron's: the global batch size starts at `start` and grows by
`increment` each time another `samples / n` sequences have been consumed, n being the number of
increments up to `global_batch_size`. Megatron divides in floating point; here it is integers, so
that every rank and every resumed run agrees on the step at which a size changes.
"""

from __future__ import annotations

from collections.abc import Iterator

from .schema import Config, Training


def data_parallel_size(config: Config, world_size: int) -> int:
    """Replicas of the pair: ranks / (tensor * pipeline * context)."""
    return world_size // config.parallel.model_ranks


def global_batch_size_at(config: Config, consumed_samples: int) -> int:
    """Sequences in the optimizer step that starts after `consumed_samples` sequences."""
    training = config.training
    if training.rampup is None:
        return training.global_batch_size
    sizes = batch_sizes(training)
    increments = len(sizes) - 1
    return sizes[min(increments, consumed_samples * increments // training.rampup.samples)]


def num_microbatches(config: Config, world_size: int, consumed_samples: int = 0) -> int:
    """Micro-batches per data-parallel rank in the optimizer step after `consumed_samples`."""
    per_pass = config.training.micro_batch_size * data_parallel_size(config, world_size)
    return global_batch_size_at(config, consumed_samples) // per_pass


def train_steps(config: Config) -> int:
    """Optimizer steps of the whole run; `training.tokens` rounded up to whole steps."""
    return sum(steps for _, steps in batch_plan(config))


def train_samples(config: Config) -> int:
    """Sequences that the whole run consumes."""
    return sum(size * steps for size, steps in batch_plan(config))


def batch_sizes(training: Training) -> range:
    """Every global batch size of the run, in order."""
    if training.rampup is None:
        return range(training.global_batch_size, training.global_batch_size + 1)
    start, increment = training.rampup.start, training.rampup.increment
    return range(start, training.global_batch_size + 1, increment)


def batch_plan(config: Config) -> Iterator[tuple[int, int]]:
    """(global batch size, optimizer steps of this size) in order, over the whole run."""
    training = config.training
    consumed = steps = 0
    sizes = batch_sizes(training)
    for stage, size in enumerate(sizes, start=1):
        left = _steps_left(training, size, consumed, steps)
        if training.rampup is not None and stage < len(sizes):
            grows_at = _ceil_div(stage * training.rampup.samples, len(sizes) - 1)
            left = min(left, _ceil_div(grows_at - consumed, size))
        # A large step may jump over a whole stage of the ramp: then no step has its size.
        if left > 0:
            yield size, left
            consumed += left * size
            steps += left


def _steps_left(training: Training, size: int, consumed: int, steps: int) -> int:
    """Steps up to the end of the run if all of them had this size."""
    if training.steps is not None:
        return training.steps - steps
    assert training.tokens is not None, "the schema asks for steps or tokens"
    return _ceil_div(_ceil_div(training.tokens, training.seq_length) - consumed, size)


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)

"""Generators saved as tensors go on exactly where they were."""

from __future__ import annotations

import random

import numpy
import torch

from tests.distributed.ranks import run_ranks


def _draw() -> list:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(2).tolist()
    return [random.random(), numpy.random.rand(2).tolist(), torch.rand(2).tolist(), tracked]


def _round_trip(rank: int, size: int) -> None:
    from taid_megatron.config.schema import Parallel
    from taid_megatron.runtime import distributed
    from taid_megatron.runtime.random_state import get_random_state, set_random_state

    world = distributed.start(Parallel(), seed=3)
    state = {name: tensor.clone() for name, tensor in get_random_state().items()}
    assert all(not tensor.is_floating_point() for tensor in state.values())
    first = _draw()
    assert _draw() != first
    set_random_state(state)
    assert _draw() == first
    distributed.stop(world)


def test_round_trip() -> None:
    run_ranks(1, _round_trip)

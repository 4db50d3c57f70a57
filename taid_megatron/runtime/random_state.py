"""The random generators of a rank as tensors, for checkpoints that need no pickle."""

from __future__ import annotations

import random

import numpy
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

_TRACKER = "megatron."


def get_random_state() -> dict[str, Tensor]:
    """Python's, numpy's, torch's, CUDA's and Megatron's generators, one integer tensor each."""
    _, python, _ = random.getstate()
    twister = numpy.random.get_state(legacy=False)["state"]
    state = {
        "python": torch.tensor(python, dtype=torch.int64),
        "numpy": torch.tensor([*twister["key"].tolist(), twister["pos"]], dtype=torch.int64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    for name, tracked in get_cuda_rng_tracker().get_states().items():
        state[_TRACKER + name] = tracked
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Put every generator back to what get_random_state returned."""
    random.setstate((3, tuple(state["python"].tolist()), None))
    *keys, position = state["numpy"].tolist()
    twister = {"key": numpy.array(keys, dtype=numpy.uint32), "pos": position}
    numpy.random.set_state({"bit_generator": "MT19937", "state": twister})
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu())
    tracker = get_cuda_rng_tracker()
    tracker.set_states(
        {
            name.removeprefix(_TRACKER): tracked.cpu()
            for name, tracked in state.items()
            if name.startswith(_TRACKER)
        }
    )

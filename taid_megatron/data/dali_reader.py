"""Micro-batches through an NVIDIA DALI pipeline: data.reader=dali.

The windows are those of the default reader, bit for bit, and in its order: the pipeline is fed with
its micro-batches and changes nothing in them. With CUDA it copies them to this rank's device on a
stream of its own, DEPTH ahead of what was asked for; without CUDA it is the same pipeline on the
CPU. Its position is the loader's consumed_samples: seeking makes a new pipeline.

Windows of tokens need no decoding, so there is little to gain beside pinned memory; docs/cluster.md
says when it pays.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch

from taid_megatron.config.errors import ConfigError
from taid_megatron.data.loader import MicroBatch

DEPTH = 2
"""Micro-batches within the pipeline, besides those that the loader's thread keeps ready."""


def require() -> None:
    """Import DALI. Raises ConfigError where that fails, whatever the reason."""
    try:
        import nvidia.dali.plugin.pytorch  # noqa: F401
    except Exception as error:  # a missing library of the system raises OSError
        raise ConfigError(
            f"data.reader=dali needs NVIDIA DALI, which cannot be imported ({error}): "
            "pip install nvidia-dali-cuda130 (CUDA 12: nvidia-dali-cuda120), or set data.reader=gpt"
        ) from error


def through_dali(batches: Iterator[MicroBatch], device: int | None) -> Iterator[MicroBatch]:
    """The same micro-batches out of a DALI pipeline, on CUDA device `device` (None: the CPU).

    All have the first one's fields and shapes. What `batches` raises is raised after the last
    micro-batch before it.
    """
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    if device is not None:
        torch.cuda.set_device(device)  # a new thread starts on device 0
    first = next(batches, None)
    if first is None:
        return
    source = _Source(chain([first], batches))
    pipeline = _pipeline(source, first, device)
    # The first batch on request, and no size: until the source ends.
    for [batch] in DALIGenericIterator(pipeline, [*first], prepare_first_batch=False):
        yield batch
    if source.fault is not None:
        raise source.fault


def _pipeline(source: _Source, first: MicroBatch, device: int | None) -> Any:
    from nvidia.dali import Pipeline, fn, types

    dtypes = {torch.int64: types.INT64, torch.int32: types.INT32, torch.float32: types.FLOAT}
    pipeline = Pipeline(
        batch_size=len(first["tokens"]),
        num_threads=1,
        device_id=device,
        prefetch_queue_depth=DEPTH,
        # Each output then owns its memory, and a step may hold many: none is copied out.
        exec_dynamic=True,
    )
    with pipeline:
        outputs = fn.external_source(
            source,
            num_outputs=len(first),
            batch=True,
            dtype=[dtypes[tensor.dtype] for tensor in first.values()],
            ndim=[tensor.ndim - 1 for tensor in first.values()],
        )
        if device is not None:
            outputs = [output.gpu() for output in outputs]
        pipeline.set_outputs(*outputs)
    return pipeline


class _Source:
    """What the pipeline pulls from. It pulls ahead, so a fault is kept until its turn."""

    def __init__(self, batches: Iterator[MicroBatch]):
        self._batches = batches
        self.fault: BaseException | None = None

    def __call__(self) -> list[np.ndarray]:
        try:
            return [tensor.numpy() for tensor in next(self._batches).values()]
        except StopIteration:
            raise
        except BaseException as fault:
            self.fault = fault
            raise StopIteration from fault

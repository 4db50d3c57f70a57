"""Micro-batches for one data-parallel rank, resumable from one integer.

Sample ids are consumed in order. With D data-parallel ranks and micro-batches of b samples, the
micro-batch number m after `consumed_samples` gives rank r the ids

    consumed_samples + (m * D + r) * b + 0 .. b-1

so a global batch of G samples is the ids consumed .. consumed + G - 1 whatever D and b are, and
layouts compare exactly. (Source of the order: Megatron-LM's sequential pretraining sampler.)
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Protocol

import torch

MicroBatch = dict[str, torch.Tensor]

Transport = Callable[[Iterator[MicroBatch], int | None], Iterator[MicroBatch]]
"""Micro-batches as they were read, and this rank's CUDA device or None, to those a step takes."""

_DTYPES = {
    "tokens": torch.int64,
    "labels": torch.int64,
    "loss_mask": torch.float32,
    "position_ids": torch.int64,
    "document_ids": torch.int32,
}
_OPTIONAL = {"document_ids"}

# The prefetching thread looks this often whether it should end. Seconds.
_POLL_SECONDS = 0.05
# Closing waits this long for a read under way; a hung file system must not hold up the exit.
_JOIN_SECONDS = 5.0


class MapDataset(Protocol):
    """What is loaded from: samples by id."""

    def __len__(self) -> int: ...

    def __getitem__(self, idx: int, /) -> Mapping[str, torch.Tensor]: ...


class DistributedBatches:
    """One optimizer step's micro-batches at a time, for one data-parallel rank.

    dataset: samples of `tokens`, `labels`, `loss_mask`, `position_ids` and, if it has them,
    `document_ids`, each [S]; other keys are left out. consumed_samples: of all ranks together, so
    far; the whole state. prefetch: micro-batches that a background thread keeps ready; 0: none.
    transport: how they leave that thread (default: in pinned memory where CUDA is available).
    Close it, or use it as a context manager.
    """

    def __init__(
        self,
        dataset: MapDataset,
        *,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        consumed_samples: int = 0,
        prefetch: int = 8,
        transport: Transport | None = None,
    ):
        if micro_batch_size < 1 or prefetch < 0 or not 0 <= dp_rank < dp_size:
            raise ValueError(
                f"micro_batch_size {micro_batch_size}, prefetch {prefetch}, dp_rank {dp_rank} of "
                f"{dp_size}: need at least 1, at least 0, and a rank below the number of ranks"
            )
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.prefetch = prefetch
        self.transport = transport or pinned
        self._stream: Iterator[MicroBatch] | _Prefetcher | None = None
        self._consumed_samples = 0
        self.seek(consumed_samples)

    def __enter__(self) -> DistributedBatches:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def consumed_samples(self) -> int:
        """Samples given out to all ranks so far: what a checkpoint keeps."""
        return self._consumed_samples

    def seek(self, consumed_samples: int) -> None:
        """Continues at `consumed_samples`, in constant time. Raises ValueError outside the data."""
        if not 0 <= consumed_samples <= len(self.dataset):
            raise ValueError(
                f"consumed_samples {consumed_samples} lies outside the {len(self.dataset)} "
                "samples of the dataset; resume with the data that the run was started with"
            )
        self.close()
        self._consumed_samples = consumed_samples

    def sample_ids(self, global_batch_size: int) -> range:
        """Ids that the next step takes, over all ranks. Raises ValueError as `step` does."""
        per_micro_batch = self.micro_batch_size * self.dp_size
        if global_batch_size < 1 or global_batch_size % per_micro_batch:
            raise ValueError(
                f"global_batch_size {global_batch_size} is no multiple of micro_batch_size "
                f"{self.micro_batch_size} x {self.dp_size} data-parallel ranks; change one of them"
            )
        end = self._consumed_samples + global_batch_size
        if end > len(self.dataset):
            raise ValueError(
                f"the step needs samples up to {end}, the dataset has {len(self.dataset)}; build "
                "it for as many samples as the run takes"
            )
        return range(self._consumed_samples, end)

    def step(self, global_batch_size: int) -> list[MicroBatch]:
        """This rank's micro-batches of the next optimizer step, and moves on by the global batch.

        Each: tokens, labels, position_ids int64 [b, S]; loss_mask float32 [b, S]; document_ids
        int32 [b, S] if the dataset has them; where they lie is the transport's matter. What the
        dataset raises is raised here, and nothing is consumed. ValueError: an uneven global batch,
        or the end of the data.
        """
        ids = self.sample_ids(global_batch_size)
        if self._stream is None:
            micro_batches = _micro_batches(
                self.dataset,
                first=ids.start + self.dp_rank * self.micro_batch_size,
                stride=self.micro_batch_size * self.dp_size,
                size=self.micro_batch_size,
            )
            device = torch.cuda.current_device() if torch.cuda.is_available() else None
            micro_batches = self.transport(micro_batches, device)
            self._stream = (
                _Prefetcher(micro_batches, self.prefetch) if self.prefetch else micro_batches
            )
        try:
            count = global_batch_size // (self.micro_batch_size * self.dp_size)
            batches = [next(self._stream) for _ in range(count)]
        except BaseException:
            self.close()  # the stream is past what was consumed
            raise
        self._consumed_samples = ids.stop
        return batches

    def close(self) -> None:
        """Ends the background thread; a later `step` starts another."""
        stream, self._stream = self._stream, None
        if isinstance(stream, _Prefetcher):
            stream.close()


def _micro_batches(
    dataset: MapDataset, *, first: int, stride: int, size: int
) -> Iterator[MicroBatch]:
    """One rank's micro-batches up to the last whole one. They do not depend on the global batch."""
    for start in range(first, len(dataset) - size + 1, stride):
        yield _stack([dataset[number] for number in range(start, start + size)])


def pinned(batches: Iterator[MicroBatch], device: int | None) -> Iterator[MicroBatch]:
    """The same micro-batches, in memory that a GPU copies from while it computes."""
    if device is not None:
        # A new thread starts on device 0: every rank would open a context there to pin memory.
        torch.cuda.set_device(device)
    for batch in batches:
        if device is not None:
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        yield batch


def _stack(samples: list[Mapping[str, torch.Tensor]]) -> MicroBatch:
    return {
        name: torch.stack([sample[name] for sample in samples]).to(dtype)
        for name, dtype in _DTYPES.items()
        if name in samples[0] or name not in _OPTIONAL
    }


class _Prefetcher:
    """Runs an iterator in one thread, `depth` items ahead, in its order."""

    def __init__(self, items: Iterator[MicroBatch], depth: int):
        self._ready: queue.Queue[MicroBatch | _Ended] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        # The thread holds no reference to self; a daemon, as a hung read must not block exit.
        self._thread = threading.Thread(
            target=_fill, args=(items, self._ready, self._stop), name="prefetch", daemon=True
        )
        self._thread.start()

    def __next__(self) -> MicroBatch:
        item = self._ready.get()
        if isinstance(item, _Ended):
            raise item.error
        return item

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=_JOIN_SECONDS)

    def __del__(self) -> None:
        self._stop.set()


class _Ended:
    """Put in the queue's place of the item that could not be made."""

    def __init__(self, error: BaseException):
        self.error = error


def _fill(
    items: Iterator[MicroBatch],
    ready: queue.Queue[MicroBatch | _Ended],
    stop: threading.Event,
) -> None:
    while not stop.is_set():
        item: MicroBatch | _Ended
        try:
            item = next(items)
        except BaseException as error:
            item = _Ended(error)
        while not stop.is_set():
            try:
                ready.put(item, timeout=_POLL_SECONDS)
                break
            except queue.Full:
                continue
        if isinstance(item, _Ended):
            return

"""Every layout consumes the same samples per step, and a resumed run those of an unbroken one."""

import threading
import time
from collections.abc import Callable

import pytest
import torch

from taid_megatron.data.loader import DistributedBatches, MicroBatch

S = 4


class Numbers:
    """Sample i is full of i, so that a batch tells which samples it holds."""

    def __init__(self, size: int, *, documents: bool = False, broken: int | None = None):
        self.size = size
        self.documents = documents
        self.broken = broken
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, idx: int, /) -> dict[str, torch.Tensor]:
        if idx == self.broken:
            raise OSError(f"sample {idx} cannot be read")
        self.loaded.append(idx)
        whole = torch.full((S,), idx, dtype=torch.int64)
        sample = {"tokens": whole, "labels": whole + 1, "position_ids": torch.arange(S)}
        # Of another type than the loader promises, and a key that it does not know.
        sample |= {"loss_mask": torch.ones(S, dtype=torch.int64), "dataset_id": whole[0]}
        return sample | ({"document_ids": whole.to(torch.int32)} if self.documents else {})


def batches(dataset: Numbers, **options) -> DistributedBatches:
    return DistributedBatches(
        dataset, **{"micro_batch_size": 2, "dp_rank": 0, "dp_size": 1, **options}
    )


def ids_of(micro_batches: list[MicroBatch]) -> list[int]:
    return [int(sample[0]) for batch in micro_batches for sample in batch["tokens"]]


@pytest.mark.parametrize("prefetch", [0, 1, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 6])
@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_a_global_batch_is_the_same_in_every_layout(
    dp_size: int, micro_batch_size: int, prefetch: int
) -> None:
    """Also where the global batch grows during the run."""
    options = {"micro_batch_size": micro_batch_size, "dp_size": dp_size, "prefetch": prefetch}
    ranks = [batches(Numbers(200), dp_rank=rank, **options) for rank in range(dp_size)]
    start = 0
    for size in (24, 24, 48, 24):
        expected = list(range(start, start + size))
        assert all(list(rank.sample_ids(size)) == expected for rank in ranks)
        taken = [rank.step(size) for rank in ranks]
        assert sorted(sum(map(ids_of, taken), [])) == expected
        assert {len(mine) for mine in taken} == {size // dp_size // micro_batch_size}
        # Within one micro-batch, too, the ranks together hold a run of neighbours.
        together = sum((ids_of([mine[0]]) for mine in taken), [])
        assert together == expected[: micro_batch_size * dp_size]
        start += size
        assert {rank.consumed_samples for rank in ranks} == {start}
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("prefetch", [0, 4])
def test_resuming_equals_not_stopping(prefetch: int) -> None:
    """And reads nothing of what was consumed before."""
    with batches(Numbers(96), dp_rank=1, dp_size=2, prefetch=prefetch) as unbroken:
        steps = [ids_of(unbroken.step(16)) for _ in range(6)]
        unbroken.seek(32)
        assert [ids_of(unbroken.step(16)) for _ in range(4)] == steps[2:]
    dataset = Numbers(96)
    resumed = batches(dataset, dp_rank=1, dp_size=2, prefetch=prefetch, consumed_samples=32)
    with resumed:
        assert [ids_of(resumed.step(16)) for _ in range(4)] == steps[2:]
    assert min(dataset.loaded) >= 32


def test_shapes_and_types() -> None:
    with batches(Numbers(8, documents=True)) as stream:
        (batch, _) = stream.step(4)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
        "tokens": (torch.int64, (2, S)),
        "labels": (torch.int64, (2, S)),
        "loss_mask": (torch.float32, (2, S)),
        "position_ids": (torch.int64, (2, S)),
        "document_ids": (torch.int32, (2, S)),
    }
    with batches(Numbers(8)) as stream:
        assert "document_ids" not in stream.step(4)[0]


@pytest.mark.parametrize(
    ("act", "fault"),
    [
        (lambda s: batches(Numbers(8), micro_batch_size=0), "micro_batch_size 0"),
        (lambda s: batches(Numbers(8), dp_rank=1), "dp_rank 1 of 1"),
        (lambda s: batches(Numbers(8), consumed_samples=9), "consumed_samples 9 lies outside"),
        (lambda s: s.seek(-1), "consumed_samples -1 lies outside the 8"),
        (lambda s: s.step(3), "global_batch_size 3 is no multiple of micro_batch_size 2 x 1"),
        (lambda s: s.step(0), "global_batch_size 0"),
        (lambda s: s.step(10), "needs samples up to 10, the dataset has 8"),
    ],
)
def test_what_cannot_be_is_refused(act: Callable[[DistributedBatches], object], fault: str) -> None:
    with batches(Numbers(8)) as stream:
        with pytest.raises(ValueError, match=fault):
            act(stream)
        assert ids_of(stream.step(8)) == list(range(8))
        with pytest.raises(ValueError, match="needs samples up to 10"):
            stream.step(2)


@pytest.mark.parametrize("prefetch", [0, 8])
def test_a_read_error_reaches_the_caller_in_its_turn(prefetch: int) -> None:
    assert_a_read_error_comes_in_its_turn(prefetch=prefetch)


def assert_a_read_error_comes_in_its_turn(**options) -> None:
    """Not before the bad sample's step, and without consuming it: a retry is possible."""
    dataset = Numbers(24, broken=10)
    with batches(dataset, **options) as stream:
        assert ids_of(stream.step(8)) == list(range(8))
        for _ in range(2):
            with pytest.raises(OSError, match="sample 10 cannot be read"):
                stream.step(8)
            assert stream.consumed_samples == 8
        dataset.broken = None
        assert ids_of(stream.step(8)) == list(range(8, 16))


def prefetching() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_the_thread_stays_within_its_depth_and_ends() -> None:
    dataset = Numbers(10_000)
    with batches(dataset, prefetch=3) as stream:
        stream.step(2)
        most = 2 * (1 + 3 + 1)  # one consumed, three ready, one waiting for a place
        assert wait_until(lambda: len(dataset.loaded) == most)
        time.sleep(0.1)
        assert len(dataset.loaded) == most
        assert prefetching() == 1
    assert prefetching() == 0
    dropped = batches(dataset, prefetch=3)
    dropped.step(2)
    del dropped
    assert wait_until(lambda: prefetching() == 0)

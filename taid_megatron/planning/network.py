"""The network between ranks, measured: an all-reduce over all, and each link of the ring."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

_BYTES = 16 << 20
_ROUNDS = 4
SLOW = 2.0
"""A link is named where it takes this many times the median of all."""


@dataclass(frozen=True)
class Network:
    """Seconds, the same on every rank."""

    all_reduce: float
    """Of 16 MiB over all ranks."""
    links: list[float]
    """There and back of 16 MiB between rank r and rank r + 1 (the last: rank 0)."""

    def slow_links(self) -> list[tuple[int, int, float]]:
        """(rank, next rank, times the median) of links that stand out, the slowest first."""
        if len(self.links) < 2:
            return []
        middle = statistics.median(self.links)
        found = [
            (rank, (rank + 1) % len(self.links), seconds / middle)
            for rank, seconds in enumerate(self.links)
            if seconds > SLOW * middle
        ]
        return sorted(found, key=lambda link: -link[2])

    def suspect(self) -> int | None:
        """The rank that two neighbouring slow links share: then it is the rank, not a cable."""
        slow = [rank for rank, _, _ in self.slow_links()]
        shared = [rank for rank in slow if (rank - 1) % len(self.links) in slow]
        return shared[0] if shared else None


def measure(device: torch.device) -> Network:
    """To be called on every rank of an initialised default group."""
    data = torch.ones(_BYTES // 4, device=device)
    _timed(lambda: dist.all_reduce(data), device)  # connections are made at the first call
    whole = min(_timed(lambda: dist.all_reduce(data), device) for _ in range(_ROUNDS))
    size = dist.get_world_size()
    own = torch.zeros(size, device=device)
    # one link at a time, so that none waits for another
    for rank in range(size if size > 2 else size - 1):
        own[rank] = _link(rank, (rank + 1) % size, data, device)
        dist.barrier()
    times = torch.cat([own, own.new_tensor([whole])])
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    *links, whole = times.tolist()
    return Network(whole, links if size > 2 else links[: size - 1])


def _link(rank: int, after: int, data: torch.Tensor, device: torch.device) -> float:
    """Seconds there and back; 0 on the ranks that have no part in it."""
    me = dist.get_rank()
    if me not in (rank, after):
        return 0.0
    times = []
    for _ in range(_ROUNDS):
        times.append(_timed(lambda: _there_and_back(me == rank, rank, after, data), device))
    return min(times[1:])


def _there_and_back(first: bool, rank: int, after: int, data: torch.Tensor) -> None:
    if first:
        dist.send(data, after)
        dist.recv(data, after)
    else:
        dist.recv(data, rank)
        dist.send(data, rank)


def _timed(call: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def examine() -> Network | None:
    """Join torchrun's ranks, measure, leave; None where there is but one rank."""
    from taid_megatron.config.schema import Parallel
    from taid_megatron.runtime import distributed, log

    if distributed.world_size_from_environment() < 2:
        return None
    log.quiet_megatron()
    world = distributed.start(Parallel(), seed=0)
    try:
        return measure(world.device)
    finally:
        distributed.stop(world)

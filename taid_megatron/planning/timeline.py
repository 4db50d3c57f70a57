"""Megatron's pipeline schedules, simulated: who computes what and when, and how long ranks wait.

Stage k of pipeline * chunks stages lies on rank k % pipeline. An operation is the forward or the
backward of one micro-batch on one stage; its duration is given. The order in which a rank works is
Megatron's, fixed beforehand; when it starts follows from what it waits for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Operation(NamedTuple):
    """One forward or backward."""

    backward: bool
    stage: int
    micro_batch: int


class Event(NamedTuple):
    """An operation in time, seconds."""

    rank: int
    operation: Operation
    start: float
    end: float


@dataclass(frozen=True)
class Durations:
    """Seconds, per stage in model order."""

    forward: Sequence[float]
    """Student and teacher."""
    backward: Sequence[float]
    """The student's, recomputation included."""
    send_forward: float = 0.0
    """One message to the next stage: the student's activation and the teacher's."""
    send_backward: float = 0.0
    """One message to the previous stage: the student's gradient."""
    overlapped: bool = False
    """Whether the sender computes on while its message travels."""


@dataclass(frozen=True)
class Timeline:
    """All of one optimizer step's operations."""

    events: list[Event]
    ranks: int

    @property
    def seconds(self) -> float:
        """From the first start to the last end."""
        return max(event.end for event in self.events)

    def busy(self, rank: int) -> float:
        """Seconds that a rank computes."""
        return sum(event.end - event.start for event in self.events if event.rank == rank)

    @property
    def bubble(self) -> float:
        """Share of the ranks' time in which they do not compute, 0 to 1."""
        busy = sum(event.end - event.start for event in self.events)
        return 1.0 - busy / (self.ranks * self.seconds) if self.seconds else 0.0


def order(rank: int, pipeline: int, chunks: int, num_microbatches: int) -> list[Operation]:
    """What a rank does, in Megatron's order: 1F1B, or interleaved where chunks > 1.

    Source: Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters Using
    Megatron-LM, 2021, section 2.2; warm-up counts as in megatron-core's schedules.
    """
    total = num_microbatches * chunks
    if pipeline == 1:
        warmup = 0
    elif chunks == 1:
        warmup = pipeline - rank - 1
    else:
        warmup = 2 * (pipeline - rank - 1) + (chunks - 1) * pipeline
    warmup = min(warmup, total)
    forwards = [_visit(k, False, rank, pipeline, chunks) for k in range(total)]
    backwards = [_visit(k, True, rank, pipeline, chunks) for k in range(total)]
    steady = zip(forwards[warmup:], backwards, strict=False)
    return [
        *forwards[:warmup],
        *(operation for pair in steady for operation in pair),
        *backwards[total - warmup :],
    ]


def _visit(k: int, backward: bool, rank: int, pipeline: int, chunks: int) -> Operation:
    """A rank's k-th forward or backward: groups of `pipeline` micro-batches, chunk by chunk."""
    if chunks == 1:
        return Operation(backward, rank, k)
    group, inside = divmod(k, pipeline * chunks)
    chunk, micro_batch = divmod(inside, pipeline)
    if backward:
        chunk = chunks - 1 - chunk
    return Operation(backward, chunk * pipeline + rank, group * pipeline + micro_batch)


def simulate(durations: Durations, pipeline: int, chunks: int, num_microbatches: int) -> Timeline:
    """When every operation of one optimizer step runs. chunks 1: 1F1B."""
    queues = [order(rank, pipeline, chunks, num_microbatches) for rank in range(pipeline)]
    position, clock = [0] * pipeline, [0.0] * pipeline
    done: dict[Operation, float] = {}
    events: list[Event] = []
    last = pipeline * chunks - 1
    waiting = True
    while waiting:
        waiting = False
        for rank, queue in enumerate(queues):
            while position[rank] < len(queue):
                operation = queue[position[rank]]
                ready = _ready(operation, done, durations, last, pipeline)
                if ready is None:
                    break
                length = (durations.backward if operation.backward else durations.forward)[
                    operation.stage
                ]
                start = max(clock[rank], ready)
                done[operation] = start + length
                clock[rank] = start + length + _sending(operation, durations, last, pipeline)
                events.append(Event(rank, operation, start, start + length))
                position[rank] += 1
                waiting = True
    assert all(at == len(queue) for at, queue in zip(position, queues, strict=True)), "stuck"
    return Timeline(events, pipeline)


def _ready(
    operation: Operation, done: dict[Operation, float], durations: Durations, last: int, ranks: int
) -> float | None:
    """When what the operation needs is there; None: not computed yet."""
    backward, stage, micro_batch = operation
    if not backward:
        if stage == 0:
            return 0.0
        before = done.get(Operation(False, stage - 1, micro_batch))
        wire = durations.send_forward if ranks > 1 else 0.0
        return None if before is None else before + wire
    if stage == last:
        return done.get(Operation(False, stage, micro_batch))
    before = done.get(Operation(True, stage + 1, micro_batch))
    wire = durations.send_backward if ranks > 1 else 0.0
    return None if before is None else before + wire


def _sending(operation: Operation, durations: Durations, last: int, ranks: int) -> float:
    """Seconds that the sender cannot compute, because it waits for its message to leave."""
    if durations.overlapped or ranks == 1:
        return 0.0
    if operation.backward:
        return durations.send_backward if operation.stage > 0 else 0.0
    return durations.send_forward if operation.stage < last else 0.0


def peak(
    rank: int,
    pipeline: int,
    chunks: int,
    num_microbatches: int,
    held: Sequence[float],
    extra: Sequence[float],
) -> float:
    """Most that a rank holds at once.

    held: bytes that a stage keeps from a micro-batch's forward to its backward; extra: what its
    backward needs beside them. Both per stage in model order.
    """
    now = most = 0.0
    for backward, stage, _ in order(rank, pipeline, chunks, num_microbatches):
        if backward:
            most = max(most, now + extra[stage])
            now -= held[stage]
        else:
            now += held[stage]
            most = max(most, now)
    return most

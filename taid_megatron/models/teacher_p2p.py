"""The teacher's activation beside the student's, from stage to stage, forward only.

Megatron's schedules move one tensor per micro-batch and move its gradient back. Concatenating the
teacher's activation to the student's would send zeros backward for the teacher's share. Here the
schedules keep seeing the student's tensors alone; the communicator that they accept adds one
message of its own beside each forward one:

    Pair.forward           attach(student_output, teacher_output)
    TeacherCarrying...     detaches it, sends it, and receives the next one into a PendingTeacher
    Pair.set_input_tensor  detaches the PendingTeacher and waits only when the teacher needs it

Messages between two neighbours always run in one direction within one process group: those that
leave an even stage use the first group, those that leave an odd stage the second. With two stages
and model chunks (0 -> 1 and 1 -> 0) the two directions therefore never share a communicator, and no
order of calls on the two sides can deadlock NCCL or mix up messages. With an odd number of stages
one rank has both its neighbours in the same group, still one direction per pair of ranks.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

_ATTRIBUTE = "teacher_hidden"


@dataclass
class PendingTeacher:
    """A teacher activation that may still be on its way."""

    buffer: Tensor
    request: Any

    def wait(self) -> Tensor:
        """The activation, [s, b, h_teacher], once it has arrived (on CUDA: for the stream)."""
        self.request.wait()
        return self.buffer


def attach(student_hidden: Tensor, teacher: Tensor | PendingTeacher) -> None:
    """Let the teacher's activation ride on the student's tensor as far as the communicator."""
    setattr(student_hidden, _ATTRIBUTE, teacher)


def detach(student_hidden: Tensor) -> Tensor | PendingTeacher:
    """Take the teacher's activation off, so that the student's tensor does not keep it alive."""
    return student_hidden.__dict__.pop(_ATTRIBUTE)


class TeacherCarryingCommunicator(P2PCommunicator):
    """Megatron's pipeline messages plus the teacher's, which only ever go forward."""

    def __init__(
        self,
        pp_group: dist.ProcessGroup,
        config: Any,
        *,
        teacher_groups: tuple[dist.ProcessGroup, dist.ProcessGroup],
        teacher_shape: tuple[int, int, int],
        teacher_dtype: torch.dtype,
    ) -> None:
        """teacher_shape: [seq_length / (cp * tp if sequence parallel), micro_batch, h_teacher]."""
        super().__init__(pp_group, config)
        stage, stages = pp_group.rank(), pp_group.size()
        self._send_group = teacher_groups[stage % 2]
        self._recv_group = teacher_groups[(stage - 1) % stages % 2]
        self._shape = teacher_shape
        self._dtype = teacher_dtype
        self._sending: deque[tuple[Any, Tensor]] = deque()
        self.teacher_bytes_sent = 0

    def _communicate(
        self, *, tensor_send_next: Tensor | None, recv_prev: bool, **kwargs: Any
    ) -> tuple:
        # first, so that Megatron's own wait, where it waits, covers the teacher's message as well
        if tensor_send_next is not None:
            self._send(detach(tensor_send_next))
        pending = self._receive() if recv_prev else None
        from_prev, from_next, requests = super()._communicate(
            tensor_send_next=tensor_send_next, recv_prev=recv_prev, **kwargs
        )
        if pending is not None:
            attach(from_prev, pending)
        return from_prev, from_next, requests

    def finish(self) -> None:
        """Wait for every message still being sent; to be called after each schedule."""
        while self._sending:
            self._sending.popleft()[0].wait()

    def _send(self, hidden: Tensor | PendingTeacher) -> None:
        assert isinstance(hidden, Tensor)
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()[0].wait()
        request = dist.isend(hidden, self.next_rank, group=self._send_group)
        # the buffer must live until it is sent, and no longer
        self._sending.append((request, hidden))
        self.teacher_bytes_sent += hidden.nbytes

    def _receive(self) -> PendingTeacher:
        buffer = torch.empty(self._shape, dtype=self._dtype, device=torch.cuda.current_device())
        return PendingTeacher(buffer, dist.irecv(buffer, self.prev_rank, group=self._recv_group))

"""Student and frozen teacher as one module of Megatron's pipeline.

Shapes: b micro-batch, s sequence, V/tp vocabulary shard.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from taid_megatron.models.build import GPTStage, Head
from taid_megatron.models.teacher_p2p import PendingTeacher, attach, detach


class Outputs(NamedTuple):
    """What the last stage hands to the loss: logits [s, b, V/tp], or the heads that make them."""

    student: Tensor | Head
    """With gradient."""
    teacher: Tensor | Head | None
    """Without; None where the student learns without a teacher."""


class Pair(MegatronModule):
    """One stage of the student and, outside the module tree, the same stage of the teacher.

    To Megatron (schedules, DDP, optimizer, checkpoints) the pair is the student: the teacher is in
    none of parameters(), modules(), state_dict(). It runs before the student, so that nothing of
    the student's backward is alive yet when the teacher's activations peak.
    """

    def __init__(self, student: GPTStage, teacher: GPTStage | None) -> None:
        super().__init__(student.config)
        self.student = student
        # Megatron's schedules and gradient finaliser ask the module itself for these
        self.model_type = student.model_type
        self.pre_process = student.pre_process
        self.post_process = student.post_process
        self.share_embeddings_and_output_weights = student.share_embeddings_and_output_weights
        self.vp_stage = student.vp_stage
        if teacher is not None:
            teacher.requires_grad_(False)
            teacher.eval()
        object.__setattr__(self, "teacher", teacher)
        self._teacher_input: PendingTeacher | None = None

    teacher: GPTStage | None

    @property
    def decoder(self) -> torch.nn.Module:
        """The student's layers."""
        return self.student.decoder

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The student's tied weight."""
        return self.student.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Take the previous stage's output; its rider goes to the teacher."""
        (hidden,) = input_tensor if isinstance(input_tensor, list) else (input_tensor,)
        self.student.set_input_tensor(hidden)
        if hidden is not None and self.teacher is not None:
            pending = detach(hidden)
            assert isinstance(pending, PendingTeacher)
            self._teacher_input = pending

    def forward(
        self, tokens: Tensor, position_ids: Tensor, document_ids: Tensor | None
    ) -> Tensor | Outputs:
        """Hidden states [s, b, h] of both models, or the last stage's outputs.

        tokens, position_ids, document_ids: [b, s]; document_ids None: attend to all before.
        """
        teacher_output = self._run_teacher(tokens, position_ids, document_ids)
        student_output = self.student(tokens, position_ids, document_ids)
        if self.post_process:
            return Outputs(student_output, teacher_output)
        if teacher_output is not None:
            assert isinstance(teacher_output, Tensor)
            attach(student_output, teacher_output)
        return student_output

    @torch.no_grad()
    def _run_teacher(
        self, tokens: Tensor, position_ids: Tensor, document_ids: Tensor | None
    ) -> Tensor | Head | None:
        if self.teacher is None:
            return None
        if self._teacher_input is not None:
            self.teacher.set_input_tensor(self._teacher_input.wait())
            self._teacher_input = None
        output: Tensor | Head = self.teacher(tokens, position_ids, document_ids)
        # the decoder would keep its input until the next micro-batch
        self.teacher.set_input_tensor(None)
        return output


def teachers(pairs: Iterable[Pair]) -> list[GPTStage]:
    """The teacher's stages on this rank; empty without a teacher."""
    return [pair.teacher for pair in pairs if pair.teacher is not None]

"""What is computed from whole rows of logits: one chunk of tokens at a time, gathered over TP.

An evaluation may take the time for it: ranks in the teacher's order (head, tail, the largest) have
no form on shards that is as short. Every figure is over the real vocabulary that both models share.

Shapes: T tokens of a chunk, V shared vocabulary, [s, b] sequence and micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from taid_megatron.models.pair import Outputs
from taid_megatron.models.vocabulary import Vocabulary

HEAD_TOKENS = 10
"""The head: so many tokens that the teacher ranks highest."""
TAIL_SHARE = 0.2
"""The tail: this share of the vocabulary, which the teacher ranks lowest."""
_CHUNK_BYTES = 2**27
"""Of one fp32 copy of the rows of a chunk; some four are alive at once."""


@dataclass(frozen=True)
class _WholeRows:
    """Per-token figures from gathered rows, a chunk of tokens at a time."""

    vocabulary: Vocabulary
    tp_group: dist.ProcessGroup | None

    def _over_chunks(
        self,
        compute: Callable[..., dict[str, Tensor]],
        outputs: Outputs,
        labels: Tensor,
    ) -> dict[str, Tensor]:
        """compute(student [T, V], teacher [T, V] or None, labels [T]) for all tokens, [s, b]."""
        rows = max(_CHUNK_BYTES // (4 * self.vocabulary.shared), 1)
        parts: list[dict[str, Tensor]] = []
        student, teacher = outputs
        assert isinstance(student, Tensor)
        assert teacher is None or isinstance(teacher, Tensor)
        own = student.flatten(0, 1)
        other = None if teacher is None else teacher.flatten(0, 1)
        flat = labels.flatten()
        for start in range(0, len(flat), rows):
            chunk = slice(start, start + rows)
            whole = None if other is None else self._whole(other[chunk])
            parts.append(compute(self._whole(own[chunk]), whole, flat[chunk]))
        return {
            name: torch.cat([part[name] for part in parts]).view(labels.shape) for name in parts[0]
        }

    def _whole(self, shard: Tensor) -> Tensor:
        """Rows over the shared vocabulary. [T, V/tp] -> [T, V], fp32."""
        if self.tp_group is None or self.tp_group.size() == 1:
            return shard[:, : self.vocabulary.shared].float()
        shards = [torch.empty_like(shard) for _ in range(self.tp_group.size())]
        dist.all_gather(shards, shard.contiguous(), group=self.tp_group)
        return torch.cat(shards, -1)[:, : self.vocabulary.shared].float()


@dataclass(frozen=True)
class HeldOut(_WholeRows):
    """Cross-entropy; beside a teacher also its own, KL, agreement, mass on its head and tail."""

    with_teacher: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Figures, each a mean over tokens."""
        if not self.with_teacher:
            return ("loss",)
        return (
            *("loss", "teacher_cross_entropy", "kl", "top1_agreement"),
            *("head_mass", "teacher_head_mass", "tail_mass", "teacher_tail_mass"),
        )

    @torch.no_grad()
    def __call__(
        self, outputs: Outputs, labels: Tensor, loss_mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """[s, b, V/tp] logits -> the loss's sum, per-token figures [s, b]; nats and shares."""
        figures = self._over_chunks(compare, outputs, labels)
        return (figures["loss"] * loss_mask).sum(), figures


def compare(student: Tensor, teacher: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
    """The held-out figures of each token. [T, V] logits, [T] labels -> [T] each."""
    log_q = student.log_softmax(-1)
    index = labels.unsqueeze(-1)
    figures = {"loss": -log_q.gather(-1, index).squeeze(-1)}
    if teacher is None:
        return figures
    log_p = teacher.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    head = teacher.topk(min(HEAD_TOKENS, teacher.shape[-1])).indices
    tail = teacher.topk(int(TAIL_SHARE * teacher.shape[-1]), largest=False, sorted=False).indices
    return figures | {
        "teacher_cross_entropy": -log_p.gather(-1, index).squeeze(-1),
        "kl": (p * (log_p - log_q)).sum(-1),
        "top1_agreement": (student.argmax(-1) == teacher.argmax(-1)).float(),
        "head_mass": q.gather(-1, head).sum(-1),
        "teacher_head_mass": p.gather(-1, head).sum(-1),
        "tail_mass": q.gather(-1, tail).sum(-1),
        "teacher_tail_mass": p.gather(-1, tail).sum(-1),
    }


@dataclass(frozen=True)
class LastWord(_WholeRows):
    """Whether every token of a text's last word is the most likely one (LAMBADA).

    Labels are NOT_ASKED but for the word's tokens; the loss mask is 1 at one place of each text, so
    that a mean over tokens is one over texts. With a teacher its figures, too.
    """

    with_teacher: bool
    cp_group: dist.ProcessGroup | None = None
    """The ranks that share a text; None: one has it whole."""

    @property
    def names(self) -> tuple[str, ...]:
        """loss: nats per word, not per token."""
        own = ("loss", "accuracy")
        return (*own, "teacher_loss", "teacher_accuracy") if self.with_teacher else own

    @torch.no_grad()
    def __call__(
        self, outputs: Outputs, labels: Tensor, loss_mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """[s, b, V/tp] logits -> figures of each text, the same at all its places [s, b]."""
        asked = labels != NOT_ASKED
        found = self._over_chunks(_hits, outputs, labels)
        figures: dict[str, Tensor] = {}
        for prefix in ("", "teacher_") if self.with_teacher else ("",):
            losses, hits = found[f"{prefix}loss"], found[f"{prefix}hit"]
            loss, misses = (losses * asked).sum(0), (~hits & asked).sum(0)
            if self.cp_group is not None:
                dist.all_reduce(loss, group=self.cp_group)
                dist.all_reduce(misses, group=self.cp_group)
            per_text = {f"{prefix}loss": loss, f"{prefix}accuracy": (misses == 0).float()}
            figures |= {name: value.expand_as(labels) for name, value in per_text.items()}
        return (figures["loss"] * loss_mask).sum(), figures


NOT_ASKED = -1


def _hits(student: Tensor, teacher: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
    figures: dict[str, Tensor] = {}
    index = labels.clamp(min=0).unsqueeze(-1)
    for prefix, rows in (("", student), ("teacher_", teacher)):
        if rows is not None:
            figures[f"{prefix}loss"] = -rows.log_softmax(-1).gather(-1, index).squeeze(-1)
            figures[f"{prefix}hit"] = rows.argmax(-1) == labels
    return figures

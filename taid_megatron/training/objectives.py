"""What training and evaluation compute from the logits of the last stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taid_megatron.config.schema import Loss, Taid
from taid_megatron.losses import distillation_loss
from taid_megatron.losses.fused_head import fused_distillation_loss
from taid_megatron.losses.registry import LOSSES
from taid_megatron.models.build import Head
from taid_megatron.models.pair import Outputs
from taid_megatron.models.vocabulary import Vocabulary
from taid_megatron.runtime.distributed import World
from taid_megatron.schedules import CTKDTemperature, TAIDSchedule


def build_schedule(loss: Loss, taid: Taid, steps: int) -> TAIDSchedule | None:
    """The interpolation of a TAID run; None for every other loss."""
    if loss.name != "taid":
        return None
    return TAIDSchedule(
        t_start=taid.t_start,
        t_end=taid.t_end,
        alpha=taid.alpha,
        beta=taid.beta,
        total_steps=steps,
        adaptive=taid.adaptive,
        rule=taid.rule,
    )


def build_temperature(loss: Loss, steps: int) -> CTKDTemperature | None:
    """The learned temperature of a CTKD run; None for every other loss."""
    if loss.name != "ctkd":
        return None
    given = {"start": loss.temperature_start, "span": loss.temperature_range}
    return CTKDTemperature(
        total_steps=steps,
        lr=loss.temperature_lr,
        variant=loss.variant or "paper",
        **{name: value for name, value in given.items() if value is not None},
    )


@dataclass(frozen=True)
class _OnShards:
    """Losses on this rank's vocabulary shard, from logits or, fused, from the heads."""

    world: World
    vocabulary: Vocabulary
    loss: Loss
    sequence_parallel: bool

    def compute(
        self,
        name: str,
        student: Tensor | Head,
        teacher: Tensor | Head | None,
        labels: Tensor,
        loss_mask: Tensor,
        stats: tuple[str, ...],
        **options: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Masked sum of a loss; {"loss" and each of stats: [s, b]}. Overwrites student logits."""
        arguments: dict[str, Any] = {
            "labels": labels,
            "kernel": self.loss.kernel,
            "collective": self.loss.collective,
            "group": self.world.groups.tp,
            "padding": self.vocabulary.padding(self.world.tensor_rank),
            "vocab_offset": self.world.tensor_rank * self.vocabulary.shard_size,
            **options,
        }
        if isinstance(student, Head):
            return fused_distillation_loss(
                name,
                *student,
                *(teacher if isinstance(teacher, Head) else (None, None)),
                loss_mask=loss_mask,
                sequence_parallel=self.sequence_parallel,
                head_chunk_tokens=self.loss.head_chunk_tokens,
                return_stats=stats,
                **arguments,
            )
        assert not isinstance(teacher, Head)
        losses, found = distillation_loss(
            name, student, teacher, return_stats=stats, inplace=True, **arguments
        )
        return (losses * loss_mask).sum(), {"loss": losses, **found}


@dataclass(frozen=True)
class TrainingObjective(_OnShards):
    """The configured loss; with `logged`, also the figures of the log, in the same pass."""

    t: float | None
    temperature: float | None
    logged: bool
    with_teacher: bool
    rule: str
    """taid.rule: it decides which value drives t."""

    @property
    def names(self) -> tuple[str, ...]:
        """loss, objective (what drives t), of ctkd temperature_gradient; the rest where logged."""
        return ("loss", "objective", *self._extra)

    @property
    def _extra(self) -> tuple[str, ...]:
        learned = ("temperature_gradient",) if self.temperature is not None else ()
        if not self.logged:
            return learned
        return (*learned, "kl", "cross_entropy") if self.with_teacher else ("cross_entropy",)

    @property
    def _objective(self) -> str:
        # the authors' code drives t by -sum p_t log q: equal gradients, another value
        official = self.loss.name == "taid" and self.rule == "official"
        return "cross_entropy_to_target" if official else "objective"

    @property
    def _options(self) -> dict[str, Any]:
        """The loss's own options, as distillation_loss takes them; its defaults are left to it."""
        moving = {"t": self.t, "temperature": self.temperature}
        values = self.loss.model_dump() | {k: v for k, v in moving.items() if v is not None}
        options = LOSSES[self.loss.name].options
        return {name: values[name] for name in options if values.get(name) is not None}

    def __call__(
        self, outputs: Outputs, labels: Tensor, loss_mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Masked sum, and per-token figures [s, b]."""
        total, values = self.compute(
            self.loss.name if outputs.teacher is not None else "cross_entropy",
            *(outputs.student, outputs.teacher, labels, loss_mask),
            stats=(self._objective, *self._extra),
            ce_weight=self.loss.ce_weight,
            **self._options,
        )
        return total, {
            "loss": values["loss"],
            "objective": values[self._objective],
            **{name: values[name] for name in self._extra},
        }


@dataclass(frozen=True)
class HeldOutFigures(_OnShards):
    """Cross-entropy of student and teacher, and KL(teacher || student), without gradient."""

    with_teacher: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Figures: loss (the student's cross-entropy), and with a teacher its own and the KL."""
        return ("loss", "teacher_cross_entropy", "kl") if self.with_teacher else ("loss",)

    @torch.no_grad()
    def __call__(
        self, outputs: Outputs, labels: Tensor, loss_mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Masked sum of the cross-entropy, and per-token figures [s, b]."""
        student, teacher = outputs
        if teacher is None:
            return self.compute("cross_entropy", student, None, labels, loss_mask, ())
        total, values = self.compute(
            *("forward_kl", student, teacher, labels, loss_mask, ("cross_entropy",))
        )
        _, of_teacher = self.compute("cross_entropy", teacher, None, labels, loss_mask, ())
        return total, {
            "loss": values["cross_entropy"],
            "teacher_cross_entropy": of_teacher["loss"],
            "kl": values["loss"],
        }

"""What training and evaluation compute from the logits of the last stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taid_megatron.config.schema import Loss, Taid
from taid_megatron.losses import distillation_loss
from taid_megatron.losses.registry import LOSSES
from taid_megatron.models.pair import Logits
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
    """Losses on this rank's vocabulary shard."""

    world: World
    vocabulary: Vocabulary

    @property
    def shard(self) -> dict:
        """Where this rank's columns lie, as distillation_loss takes it."""
        return {
            "group": self.world.groups.tp,
            "padding": self.vocabulary.padding(self.world.tensor_rank),
            "vocab_offset": self.world.tensor_rank * self.vocabulary.shard_size,
        }


@dataclass(frozen=True)
class TrainingObjective(_OnShards):
    """The configured loss; with `logged`, also the figures of the log, in the same pass."""

    loss: Loss
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

    def __call__(self, logits: Logits, labels: Tensor) -> dict[str, Tensor]:
        """[s, b, V/tp] logits -> per-token figures [s, b]; overwrites the student's logits."""
        divergence = self.loss.name if logits.teacher is not None else "cross_entropy"
        losses, stats = distillation_loss(
            divergence,
            logits.student,
            logits.teacher,
            labels=labels,
            ce_weight=self.loss.ce_weight,
            kernel=self.loss.kernel,
            inplace=True,
            return_stats=(self._objective, *self._extra),
            collective=self.loss.collective,
            **self.shard,
            **self._options,
        )
        return {
            "loss": losses,
            "objective": stats[self._objective],
            **{name: stats[name] for name in self._extra},
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
    def __call__(self, logits: Logits, labels: Tensor) -> dict[str, Tensor]:
        """[s, b, V/tp] logits -> per-token figures [s, b]."""
        if logits.teacher is None:
            loss = distillation_loss(
                "cross_entropy", logits.student, None, labels=labels, **self.shard
            )
            return {"loss": loss}
        kl, stats = distillation_loss(
            "forward_kl",
            logits.student,
            logits.teacher,
            labels=labels,
            return_stats=("cross_entropy",),
            **self.shard,
        )
        teacher = distillation_loss(
            "cross_entropy", logits.teacher, None, labels=labels, **self.shard
        )
        return {"loss": stats["cross_entropy"], "teacher_cross_entropy": teacher, "kl": kl}

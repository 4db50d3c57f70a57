"""Micro-batches through the pipeline: one optimizer step's gradients, or held-out figures.

Losses stay per token until here. Sums and counts are reduced once and divided once, so neither the
gradient nor the logged figures depend on how the global batch was cut into micro-batches and ranks.
Shapes: b micro-batch, s sequence (with context parallelism this rank's share of it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from taid_megatron.models.pair import Outputs
from taid_megatron.models.teacher_p2p import TeacherCarryingCommunicator
from taid_megatron.runtime.distributed import World

Batch = dict[str, Tensor]


class PerToken(Protocol):
    """What is computed on the last stage, for every token."""

    @property
    def names(self) -> tuple[str, ...]:
        """The figures it gives, on every rank alike."""
        ...

    def __call__(
        self, outputs: Outputs, labels: Tensor, loss_mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Labels and mask [s, b] -> masked sum of the loss, and each figure of `names` [s, b] fp32.

        Only the sum is differentiated.
        """
        ...


@dataclass(frozen=True)
class Pipeline:
    """The stages of this rank and how they talk to the others."""

    world: World
    stages: list[DistributedDataParallel]
    communicator: TeacherCarryingCommunicator | None
    """None where no teacher travels (no pipeline, or no teacher): Megatron uses its own."""
    seq_length: int
    micro_batch_size: int

    def run(
        self, batches: list[Batch], per_token: PerToken, *, forward_only: bool = False
    ) -> dict[str, float]:
        """Forward, and backward unless forward_only, over this replica's micro-batches.

        Returns the mean of each figure over every unmasked token of the global batch, and `tokens`,
        how many those were; the same numbers on every rank. Gradients are left finished: reduced
        over the ranks and divided by `tokens`.
        """
        chunks = len(self.stages)
        iterators = [iter(batches) for _ in range(chunks)]
        groups: dict[str, Any] = {}
        if self.communicator is not None:
            groups["p2p_communicator"] = self.communicator
            groups["pg_collection"] = self.world.groups
        outputs = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, self.world, per_token),
            data_iterator=iterators if chunks > 1 else iterators[0],
            model=self.stages if chunks > 1 else self.stages[0],
            num_microbatches=len(batches),
            seq_length=self.seq_length,
            micro_batch_size=self.micro_batch_size,
            forward_only=forward_only,
            **groups,
        )
        if self.communicator is not None:
            self.communicator.finish()
        return self._means((*per_token.names, "tokens"), outputs)

    def _means(self, names: tuple[str, ...], outputs: list[Tensor]) -> dict[str, float]:
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.world.device)
        for output in outputs:
            sums += output
        if self.world.is_last_stage:
            dist.all_reduce(sums, group=self.world.groups.dp_cp)
        # All of a model replica adopts one rank's numbers: t follows from them on every rank alike.
        dist.broadcast(sums, src=self.world.loss_source, group=self.world.groups.mp)
        *totals, tokens = sums.tolist()
        means = [total / tokens if tokens else 0.0 for total in totals]
        return dict(zip(names, [*means, tokens], strict=True))


def _forward_step(
    world: World,
    per_token: PerToken,
    batches: Iterator[Batch],
    model: DistributedDataParallel,
) -> tuple[Any, Callable]:
    """Megatron's forward_step_func: a stage's output, and what makes the last one's a loss."""
    batch = {name: part.to(world.device, non_blocking=True) for name, part in next(batches).items()}
    # attention needs the documents of all keys, so every context-parallel rank has them whole
    document_ids = batch.pop("document_ids", None)
    batch = get_batch_on_this_cp_rank(batch, world.groups.cp)
    output = model(batch["tokens"], batch["position_ids"], document_ids)
    return output, partial(_sum_over_tokens, per_token, batch["labels"], batch["loss_mask"])


def _sum_over_tokens(
    per_token: PerToken, labels: Tensor, loss_mask: Tensor, outputs: Outputs
) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's loss_func in its triple form: loss sum, token count (int32), figures to add up.

    labels, loss_mask: [b, s]. The triple makes Megatron divide by the global count once; with the
    pair (loss, dict) it averages means, and the gradient doubles at two data-parallel ranks.
    """
    mask = loss_mask.t()
    loss, figures = per_token(outputs, labels.t(), mask)
    tokens = mask.sum()
    report = [(figures[name].detach().double() * mask).sum() for name in per_token.names]
    return loss, tokens.int(), torch.stack([*report, tokens.double()])

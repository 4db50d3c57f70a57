"""Held-out figures of a run: the same samples every time, no gradient, t untouched."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.distributed import DistributedDataParallel
from torch.utils.data import Dataset

from taid_megatron.training.objectives import HeldOutFigures
from taid_megatron.training.setup import Trainer, evaluation_samples, first_samples


@torch.no_grad()
def evaluate(trainer: Trainer, dataset: Dataset) -> dict[str, float]:
    """Means over the held-out tokens, the same on every rank; on every rank at once.

    cross_entropy and perplexity of the student; with a teacher also teacher_cross_entropy,
    teacher_perplexity and kl, KL(teacher || student) in nats per token.
    """
    config, world = trainer.config, trainer.world
    samples = evaluation_samples(config, world.size)
    batches = first_samples(config, world, dataset, samples)  # type: ignore[arg-type]
    figures = HeldOutFigures(
        *(world, trainer.vocabulary, config.loss, config.parallel.sequence_parallel),
        with_teacher=trainer.has_teacher,
    )
    with _evaluation_mode(trainer.stages):
        means = trainer.pipeline.run(batches, figures, forward_only=True)
    result = {"cross_entropy": means["loss"], "perplexity": math.exp(means["loss"])}
    if trainer.has_teacher:
        result["teacher_cross_entropy"] = means["teacher_cross_entropy"]
        result["teacher_perplexity"] = math.exp(means["teacher_cross_entropy"])
        result["kl"] = means["kl"]
    return {**result, "tokens": means["tokens"]}


@contextmanager
def _evaluation_mode(stages: list[DistributedDataParallel]) -> Iterator[None]:
    with gathered_weights(stages):
        for stage in stages:
            stage.eval()
        try:
            yield
        finally:
            for stage in stages:
                stage.train()


@contextmanager
def gathered_weights(stages: list[DistributedDataParallel]) -> Iterator[None]:
    """Every weight up to date on every rank, where the forward pass would gather them lazily."""
    lazy = [
        stage
        for stage in stages
        if stage.use_forward_hook and stage.remove_forward_pre_hook_handles
    ]
    # First all gathers that are on their way: megatron-core would start others beside them. Over
    # gloo a rank died of a segmentation fault there, once; why is not known.
    for stage in lazy:
        for group in (*stage.bucket_groups, *stage.expert_parallel_bucket_groups):
            if group.param_gather_handle is not None:
                group.param_gather_handle.wait()
    for stage in lazy:
        stage.disable_forward_pre_hook()
    try:
        yield
    finally:
        for stage in lazy:
            stage.enable_forward_pre_hook()

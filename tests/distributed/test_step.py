"""One step against its definition: dense, plain autograd, the global batch in one piece."""

from __future__ import annotations

import pytest
import torch

from taid_megatron.losses import reference
from taid_megatron.training.objectives import TrainingObjective
from taid_megatron.training.setup import Trainer, build_batches

from . import toy
from .ranks import run_ranks


def _gradients(trainer: Trainer, batches: list, t: float, ce_weight: float) -> tuple:
    """Loss and gradients of the definition: sum over unmasked tokens / their number."""
    pair = trainer.pairs[0]
    total, tokens = 0.0, 0.0
    for batch in batches:
        logits = pair(batch["tokens"], batch["position_ids"], batch.get("document_ids"))
        student = logits.student[..., : trainer.vocabulary.shared].double()
        teacher = logits.teacher[..., : trainer.vocabulary.shared].double()
        labels = batch["labels"].t()
        losses = (1 - ce_weight) * reference.taid(student, teacher, t)
        losses = losses + ce_weight * reference.cross_entropy(student, labels)
        mask = batch["loss_mask"].t()
        total, tokens = total + (losses * mask).sum(), tokens + mask.sum()
    loss = total / tokens
    # not backward(): that would add to Megatron's gradient buffers
    return loss, torch.autograd.grad(loss, list(pair.parameters())), tokens


def _compare(rank: int, size: int, config: str, overrides: tuple[str, ...], weight: float) -> None:
    with toy.trainer(config, *overrides, f"loss.ce_weight={weight}") as trainer:
        data, _ = build_batches(trainer)
        with data:
            batches = data.step(8)
        loss, gradients, tokens = _gradients(trainer, batches, 0.3, weight)
        objective = TrainingObjective(
            *(trainer.world, trainer.vocabulary, trainer.config.loss, False, 0.3, None),
            logged=True,
            with_teacher=True,
            rule="paper",
        )
        trainer.stages[0].zero_grad_buffer()
        means = trainer.pipeline.run(batches, objective)

        assert means["tokens"] == tokens
        assert 0 < tokens < 8 * 32  # ends of documents are left out
        assert means["loss"] == pytest.approx(loss.item(), rel=1e-6)
        for (name, parameter), gradient in zip(
            trainer.pairs[0].named_parameters(), gradients, strict=True
        ):
            torch.testing.assert_close(
                parameter.main_grad, gradient.float(), rtol=1e-4, atol=1e-7, msg=name
            )
            assert gradient.abs().max() > 1e-6, name


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_loss_and_gradients_equal_the_definition(config, tmp_path, micro_batch, weight) -> None:
    overrides = (f"training.micro_batch_size={micro_batch}", f"run.folder={tmp_path}")
    run_ranks(1, _compare, str(config), overrides, weight)


def test_documents_apart_change_the_run_and_positions_then_do_not(
    config, one_process, tmp_path
) -> None:
    """Rotary attention sees distances alone: within documents, where counting starts is moot."""
    apart = toy.train(config, tmp_path / "a", 1, "data.reset_attention_mask=true")
    both = toy.train(
        *(config, tmp_path / "b", 1, "data.reset_attention_mask=true"),
        "data.reset_position_ids=true",
    )
    positions = toy.train(config, tmp_path / "c", 1, "data.reset_position_ids=true")
    plain = toy.column(one_process(), "kl")
    assert toy.column(both, "kl") == pytest.approx(toy.column(apart, "kl"), rel=1e-5)
    assert toy.column(both, "kl") != toy.column(apart, "kl")
    assert toy.column(apart, "kl") != pytest.approx(plain, rel=1e-5)
    assert toy.column(positions, "kl") != pytest.approx(plain, rel=1e-5)

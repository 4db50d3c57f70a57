"""Initial weights: the statistics Megatron gives them, and nothing in the padding."""

from __future__ import annotations

import math

import pytest
import torch

from tests.distributed import toy
from tests.distributed.ranks import run_ranks


def _statistics(rank: int, size: int, config: str) -> None:
    with toy.trainer(config, "student.architecture.add_bias_linear=true") as trainer:
        student = trainer.students[0]
        weights = dict(student.named_parameters())
        matrices = [weight for weight in weights.values() if weight.dim() > 1]
        assert len({tuple(weight.flatten()[:8].tolist()) for weight in matrices}) == len(matrices)
        for name, weight in weights.items():
            if name.endswith("bias"):
                assert torch.equal(weight, torch.zeros_like(weight)), name
            elif "layernorm" in name:
                assert torch.equal(weight, torch.ones_like(weight)), name
            else:
                std = 0.02 / (math.sqrt(8) if "proj" in name or "fc2" in name else 1)
                real = weight[: toy.VOCABULARY] if weight.shape[0] == 384 else weight
                assert real.std().item() == pytest.approx(std, rel=0.1), name
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert weights[name].shape == (384, 32)
            assert not weights[name][toy.VOCABULARY :].any()


def test_deviation_by_kind(tmp_path) -> None:
    run_ranks(1, _statistics, str(toy.write_config(tmp_path)))


def _first_weights(rank: int, size: int, config: str, seed: int) -> list[float]:
    with toy.trainer(config, f"run.seed={seed}") as trainer:
        return trainer.students[0].output_layer.weight.flatten()[:4].tolist()


def test_the_seed_decides(tmp_path) -> None:
    config = str(toy.write_config(tmp_path))
    one, again, other = (run_ranks(1, _first_weights, config, seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other

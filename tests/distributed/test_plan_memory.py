"""The planner's memory model against what the ranks of a run really allocate, kind by kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from taid_megatron.config.load import load
from taid_megatron.planning.memory import Sizes, rank_memory

from . import allocated
from .ranks import run_ranks

TOLERANCE = 0.10
# Wide enough for the model's terms to outweigh the odd byte, small enough for seconds.
COMMON = (
    "training.seq_length=128",
    "training.micro_batch_size=2",
    "student.architecture.hidden_size=64",
    "student.architecture.ffn_hidden_size=160",
    "logging.tensorboard=false",
)
PP2, TP2 = "parallel.pipeline=2", "parallel.tensor=2"
BF16, SHARDED = "training.precision=bf16", "parallel.distributed_optimizer=true"
FULL = "training.recompute.granularity=full"
SELECTIVE = "training.recompute.granularity=selective"
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "TP=2 SP, bf16": (2, (TP2, "parallel.sequence_parallel=true", BF16)),
    "PP=2, bf16": (2, (PP2, BF16)),
    "PP=2 VPP=2, full recomputation": (2, (PP2, "parallel.virtual_pipeline=2", FULL)),
    "DP=2 sharded, bf16": (2, (SHARDED, BF16)),
    "TP=2, biases, LayerNorm, dropout, attention recomputed": (
        2,
        (
            TP2,
            SELECTIVE,
            "student.architecture.normalization=LayerNorm",
            "student.architecture.activation=gelu",
            "student.architecture.add_bias_linear=true",
            "student.hidden_dropout=0.1",
        ),
    ),
    # Kept aside while the model was made, and run for the first time when it was done.
    "PP=3 VPP=2 uneven, tied": (
        3,
        (
            "parallel.pipeline=3",
            "parallel.virtual_pipeline=2",
            "training.global_batch_size=12",
            "student.layers_per_stage=[1,1,0,1,0,1]",
            "teacher.layers_per_stage=[2,1,1,1,2,1]",
            "student.architecture.tie_embeddings=true",
        ),
    ),
    "TP=2 DP=2 sharded, SP, bf16, feed-forward recomputed, Qwen's biases": (
        4,
        (
            *(TP2, "parallel.sequence_parallel=true", SHARDED, BF16, SELECTIVE),
            "training.recompute.modules=[mlp]",
            "student.architecture.add_qkv_bias=true",
        ),
    ),
}


@pytest.mark.parametrize("run", RUNS)
def test_every_part_is_within_a_tenth_of_what_is_allocated(run, config, tmp_path: Path) -> None:
    ranks, overrides = RUNS[run]
    given = [f"run.folder={tmp_path / 'run'}", *COMMON, *overrides]

    measured = run_ranks(ranks, allocated.measure, str(config), given)

    settings = load(config, given)
    sizes = Sizes(settings, settings.teacher.architecture, ranks, cuda=False)
    per_stage = ranks // settings.parallel.pipeline
    for rank, found in enumerate(measured):
        memory = rank_memory(sizes, rank // per_stage)
        modelled = {
            "weights": memory.weights,
            "teacher": memory.teacher,
            "main_gradients": memory.main_gradients,
            "optimizer": memory.optimizer,
            "activations": memory.activations + memory.logits,
        }
        assert set(found) == set(modelled)
        for kind, allocated_bytes in found.items():
            assert modelled[kind] == pytest.approx(allocated_bytes, rel=TOLERANCE), (rank, kind)

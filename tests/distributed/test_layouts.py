"""A run is the same run on any layout: losses, gradient norms, t, held-out figures of one process.

The teacher is wider and deeper than the student, weights start alike on every layout (they are
drawn by name), and micro-batches have unequal numbers of unmasked tokens.
"""

from __future__ import annotations

import pytest

from . import toy

FUSED = ("loss.fused_head=true", "loss.head_chunk_tokens=11")
TP2 = "parallel.tensor=2"
PP2 = "parallel.pipeline=2"
VPP2 = "parallel.virtual_pipeline=2"
SEQUENCE = "parallel.sequence_parallel=true"
SHARDED = "parallel.distributed_optimizer=true"
OVERLAP = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
TIED = ("student.architecture.tie_embeddings=true", "teacher.architecture.tie_embeddings=true")
MICRO_BATCHES_4 = "training.micro_batch_size=2"
CP2 = "parallel.context=2"
WINDOWS = ("student.architecture.sliding_window=9", "teacher.architecture.sliding_window=20")
MIXTURE = ("teacher.architecture.num_moe_experts=4", "teacher.architecture.num_layers=2")
DOCUMENTS = ("data.reset_attention_mask=true", "data.reset_position_ids=true")

# name: (ranks, what changes the layout, what changes the run itself)
LAYOUTS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "TP=2": (2, (TP2,), ()),
    "PP=2": (2, (PP2,), ()),
    "PP=2 VPP=2": (2, (PP2, VPP2), ()),
    "PP=2 VPP=2, 4 micro-batches": (2, (PP2, VPP2, MICRO_BATCHES_4), ()),
    "DP=2": (2, (), ()),
    # evaluated between steps, when weights are still to be gathered
    "DP=2 sharded overlapped": (2, (SHARDED, *OVERLAP), ("evaluation.every=2",)),
    "PP=2 VPP=2 DP=2 sharded overlapped": (
        4,
        (PP2, VPP2, SHARDED, *OVERLAP),
        ("evaluation.every=2",),
    ),
    "TP=2 SP, recompute full": (2, (TP2, SEQUENCE, "training.recompute.granularity=full"), ()),
    "TP=2 SP, recompute selective": (
        2,
        (
            TP2,
            SEQUENCE,
            "training.recompute.granularity=selective",
            "training.recompute.modules=[core_attn,mlp]",
        ),
        (),
    ),
    "TP=2 PP=2": (4, (TP2, PP2), ()),
    "TP=2 PP=2 VPP=2 SP": (4, (TP2, PP2, VPP2, SEQUENCE), ()),
    "micro-batch 2": (1, (MICRO_BATCHES_4,), ()),
    "micro-batch 4": (1, ("training.micro_batch_size=4",), ()),
    "tied, TP=2": (2, (TP2,), TIED),
    "tied, PP=2": (2, (PP2,), TIED),
    "documents apart, TP=2 PP=2": (4, (TP2, PP2), DOCUMENTS),
    "CP=2": (2, (CP2,), ()),
    "windows, CP=2 DP=2 sharded": (4, (CP2, SHARDED), WINDOWS),
    "documents apart, CP=2 TP=2 SP": (4, (CP2, TP2, SEQUENCE), DOCUMENTS),
    "fused head, CP=2 PP=2": (4, (*FUSED, CP2, PP2), ()),
    "a mixture's experts, EP=2 DP=2": (2, ("parallel.expert=2",), MIXTURE),
    "cross-entropy mixed in, TP=2": (2, (TP2,), ("loss.ce_weight=0.3",)),
    "forward KL, PP=2": (2, (PP2,), ("loss.name=forward_kl",)),
    "cross-entropy alone, TP=2 DP=2": (4, (TP2,), ("loss.name=cross_entropy", "teacher=null")),
    "teacher of a larger vocabulary, TP=2": (2, (TP2,), ("teacher.architecture.vocab_size=500",)),
    "student of a larger vocabulary, PP=2": (2, (PP2,), ("student.architecture.vocab_size=700",)),
    # the same run as with logits, which is what one process does here
    "fused head": (1, FUSED, ()),
    "fused head, TP=2 SP": (2, (*FUSED, TP2, SEQUENCE), ("loss.ce_weight=0.3",)),
    "fused head, tied, TP=2 DP=2 sharded overlapped": (
        4,
        (*FUSED, TP2, SHARDED, *OVERLAP),
        (*TIED, "evaluation.every=2"),
    ),
    "fused head, tied, PP=2": (2, (*FUSED, PP2), TIED),
    # not one of those the code was written against: an odd number of stages of unequal depth, one
    # of them without a student layer, and a ring of messages with chunks
    "PP=3 uneven": (
        3,
        (
            "parallel.pipeline=3",
            "student.layers_per_stage=[1,0,3]",
            "teacher.layers_per_stage=[2,5,1]",
        ),
        (),
    ),
    "PP=3 VPP=2 uneven": (
        3,
        (
            "parallel.pipeline=3",
            VPP2,
            "student.layers_per_stage=[1,1,0,1,0,1]",
            "teacher.layers_per_stage=[2,1,1,1,2,1]",
        ),
        ("training.global_batch_size=9", "evaluation.samples=9"),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_run_of_one_process(layout, config, one_process, tmp_path) -> None:
    ranks, layout_overrides, run_overrides = LAYOUTS[layout]
    expected = one_process(*run_overrides)

    records = toy.train(config, tmp_path / "run", ranks, *layout_overrides, *run_overrides)

    assert len(toy.column(records, "loss")) == toy.STEPS
    figures = {"loss", "objective", "grad_norm", "cross_entropy", "held_out_cross_entropy"}
    if "teacher=null" not in run_overrides:
        figures |= {"kl", "held_out_kl", "held_out_teacher_cross_entropy"}
    if not any(override.startswith("loss.name") for override in run_overrides):
        figures.add("t")
    for figure in figures:
        values = toy.column(records, figure)
        assert values, f"no {figure} in the records"
        assert values == pytest.approx(toy.column(expected, figure), rel=1e-5, abs=1e-6), figure
    for figure in ("tokens", "lr", "consumed_samples"):
        assert toy.column(records, figure) == toy.column(expected, figure), figure

"""Which settings a resume may change: those that decide what is learned are named, no others."""

from __future__ import annotations

from typing import Any

import pytest

from taid_megatron.config.changes import changes
from taid_megatron.config.load import from_tree
from taid_megatron.config.schema import Config

SHAPE = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 64}
BASE: dict[str, Any] = {
    "run": {"folder": "runs/a"},
    "student": {"architecture": SHAPE},
    "teacher": {"architecture": {**SHAPE, "num_layers": 4}},
    "training": {"global_batch_size": 8, "seq_length": 16, "steps": 10},
    "optimizer": {"lr": 3e-4},
    "data": {"blend": "data/train"},
}


def configured(*overrides: str) -> Config:
    return from_tree({name: dict(section) for name, section in BASE.items()}, "test", overrides)


def found(*overrides: str, before: tuple[str, ...] = ()) -> list[str]:
    saved = configured(*before).model_dump(mode="json")
    return changes(saved, configured(*overrides), "step_00000010")


def test_a_change_is_one_line_with_both_values():
    assert found("optimizer.lr=1e-4", "run.seed=7") == [
        "run.seed: 1234 in step_00000010, 7 now",
        "optimizer.lr: 0.0003 in step_00000010, 0.0001 now",
    ]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("training.global_batch_size=16", "training.global_batch_size"),
        ("training.rampup={start: 4, increment: 4, samples: 80}", "training.rampup"),
        ("training.steps=20", "training.steps"),
        ("training.precision=fp32", "training.precision"),
        ("optimizer.weight_decay=0.2", "optimizer.weight_decay"),
        ("loss.ce_weight=0.5", "loss.ce_weight"),
        ("taid.alpha=1e-3", "taid.alpha"),
        ("teacher=null", "teacher"),
        ("teacher.architecture.num_layers=6", "teacher.architecture.num_layers"),
        ("student.hidden_dropout=0.1", "student.hidden_dropout"),
        ("data.eod_mask_loss=true", "data.eod_mask_loss"),
        ("engine.fp8=delayed", "engine.fp8"),
    ],
)
def test_what_changes_the_training_is_named(override, key):
    (line,) = found(override)
    assert line.startswith(f"{key}: ")


def test_where_it_runs_and_what_it_writes_is_free():
    assert not found(
        *("run.folder=runs/b", "parallel.tensor=2", "parallel.distributed_optimizer=true"),
        *("training.micro_batch_size=4", "training.stop_at=5", "training.max_minutes=1"),
        *("training.recompute.granularity=full", "loss.kernel=torch", "loss.fused_head=true"),
        *("checkpoint.every=5", "evaluation.every=5", "logging.every=5", "data.prefetch=0"),
        *("data.validation=data/held_out", "data.reader=dali", "engine.layers=local"),
        "training.step_timeout=60",
    )


def test_the_schedule_of_t_counts_with_taid_alone():
    before = ("loss.name=forward_kl",)
    assert not found("taid.alpha=1e-3", *before, before=before)
    assert len(found(*before)) == 1  # loss.name itself


def test_a_key_added_since_has_its_default_and_an_unknown_one_is_told():
    saved = configured().model_dump(mode="json")
    del saved["optimizer"]["clip_grad"]
    assert not changes(saved, configured(), "step_00000010")
    assert len(changes(saved, configured("optimizer.clip_grad=2.0"), "step_00000010")) == 1
    saved["optimizer"]["of_the_future"] = 1
    (line,) = changes(saved, configured(), "step_00000010")
    assert line.startswith("optimizer.of_the_future: step_00000010 was saved by another version")
    assert changes("not a configuration", configured(), "step_00000010")

"""The trainer: what moves t, what stops a run, what it writes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

from data_tools.manifest import (
    Manifest,
    Options,
    TokenizerRecord,
    check_indexed,
    write_manifest,
)
from taid_megatron.config.errors import ConfigError, UserError
from taid_megatron.schedules import TAIDSchedule
from taid_megatron.training import loop
from taid_megatron.training.setup import build_batches

from . import toy
from .ranks import run_ranks

TRAINED = ("loss", "objective", "kl", "t", "lr", "grad_norm", "consumed_samples")


def _t_on_every_rank(rank: int, size: int, config: str, overrides: tuple[str, ...]) -> list[float]:
    with toy.trainer(config, *overrides) as trainer:
        batches, _ = build_batches(trainer)
        seen = []
        with batches:
            for _ in range(4):
                loop._optimizer_step(trainer, batches)
                seen.append(trainer.schedule.t)
        return seen


def test_t_is_the_same_on_every_rank(config) -> None:
    # fast enough to leave the straight line, so that it depends on the measured objective
    overrides = ("parallel.tensor=2", "parallel.pipeline=2", "taid.alpha=0.2", "taid.t_end=1")
    first, *others = run_ranks(4, _t_on_every_rank, str(config), overrides)
    assert len(set(first)) == 4
    assert all(other == first for other in others)


def test_t_follows_the_schedule_once_per_optimizer_step(config, one_process) -> None:
    """Eight micro-batches a step, and t moves once: as TAIDSchedule fed the logged objectives."""
    records = one_process()
    settings = yaml.safe_load(config.read_text())["taid"]
    schedule = TAIDSchedule(**settings, beta=0.99, total_steps=toy.STEPS)
    for record in records:
        assert record["t"] == pytest.approx(schedule.t, rel=1e-12)
        schedule.update(record["objective"])


@pytest.mark.parametrize("adaptive", [True, False])
def test_official_rule_is_driven_by_the_cross_entropy_to_the_target(
    config, tmp_path, adaptive
) -> None:
    overrides = ("taid.rule=official", f"taid.adaptive={str(adaptive).lower()}")
    records = toy.train(config, tmp_path, 1, *overrides)
    for record in records:
        # J is -sum p_t log q, KL(p_t || q) plus the target's entropy: far above the divergence
        assert record["objective"] > record["loss"] + 1
        assert record["objective"] < math.log(toy.VOCABULARY) + 1


def test_evaluation_changes_nothing_of_the_training(config, one_process, tmp_path) -> None:
    evaluated = toy.train(config, tmp_path, 1, "evaluation.every=1")
    plain = one_process()
    for figure in TRAINED:
        assert toy.column(evaluated, figure) == toy.column(plain, figure), figure
    assert len(toy.column(evaluated, "held_out_kl")) == toy.STEPS
    assert len(toy.column(plain, "held_out_kl")) == 1


def test_global_batch_ramps_up_the_same_on_any_layout(config, tmp_path) -> None:
    ramp = "training.rampup={start: 4, increment: 2, samples: 12}"
    one = toy.train(config, tmp_path / "one", 1, ramp)
    two = toy.train(config, tmp_path / "two", 2, ramp)
    assert toy.column(one, "batch_size") == [4, 4, 6, 8, 8]
    for figure in TRAINED:
        assert toy.column(two, figure) == pytest.approx(
            toy.column(one, figure), rel=1e-5, abs=1e-6
        ), figure


def test_run_length_in_tokens(config, tmp_path) -> None:
    # 8 sequences of 32 tokens a step: 600 tokens are two steps and a part of a third
    records = toy.train(config, tmp_path, 1, "training.steps=null", "training.tokens=600")
    assert toy.column(records, "step") == [1, 2, 3]
    assert toy.column(records, "lr")[-1] == pytest.approx(0.0, abs=1e-12)


def test_stop_at_keeps_the_schedules_of_the_whole_run(config, one_process, tmp_path) -> None:
    records = toy.train(config, tmp_path, 1, "training.stop_at=3")
    for figure in TRAINED:
        assert toy.column(records, figure) == toy.column(one_process(), figure)[:3], figure


def test_time_limit_stops_with_a_checkpoint_that_goes_on(config, one_process, tmp_path) -> None:
    stopped = toy.train(config, tmp_path, 1, "training.max_minutes=1e-9", save=True)
    assert toy.column(stopped, "step") == [1]
    everything = toy.train(config, tmp_path, 1, save=True)
    assert toy.column(everything, "loss") == toy.column(one_process(), "loss")


def test_learning_rate_warms_up_and_ends_at_the_minimum(config, tmp_path) -> None:
    records = toy.train(config, tmp_path, 1, "optimizer.min_lr=1e-3", "training.steps=6")
    rates = toy.column(records, "lr")
    assert rates[:2] == pytest.approx([2.5e-3, 5e-3])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3)


def test_wsd_stays_at_the_peak_and_then_decays(config, tmp_path) -> None:
    records = toy.train(
        *(config, tmp_path, 1, "training.steps=6", "optimizer.decay=wsd"),
        *("optimizer.wsd_decay_steps=2", "optimizer.wsd_decay_style=linear"),
    )
    assert toy.column(records, "lr") == pytest.approx([2.5e-3, 5e-3, 5e-3, 5e-3, 2.5e-3, 0.0])


def test_bf16_follows_fp32(config, one_process, tmp_path) -> None:
    records = toy.train(config, tmp_path, 1, "training.precision=bf16")
    assert toy.column(records, "kl") == pytest.approx(toy.column(one_process(), "kl"), rel=0.02)
    assert toy.column(records, "kl") != toy.column(one_process(), "kl")


def test_teacher_in_its_own_precision_beside_an_fp32_student(config, one_process, tmp_path) -> None:
    records = toy.train(config, tmp_path, 2, "teacher.precision=bf16", "parallel.pipeline=2")
    assert toy.column(records, "kl") == pytest.approx(toy.column(one_process(), "kl"), rel=0.02)


def test_what_a_run_leaves_behind(config, tmp_path) -> None:
    toy.train(
        *(config, tmp_path, 1, "logging.tensorboard=true", "logging.every=2"),
        "logging.profile_steps=[2, 3]",
        save=True,
    )
    resolved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert resolved["logging"]["every"] == 2
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 5]
    required = {"step", "loss", "kl", "t", "lr", "grad_norm", "tokens", "tokens_per_second"}
    assert all(required | {"step_seconds", "objective"} <= record.keys() for record in records)
    assert list((tmp_path / "tensorboard").glob("events.*"))
    trace = json.loads((tmp_path / "profile" / "trace_rank0.json").read_text())
    assert any("mm" in event.get("name", "") for event in trace["traceEvents"])
    state = json.loads((tmp_path / "checkpoints/step_00000005/state.json").read_text())
    assert state["consumed_samples"] == 40


def _made_with_a_tokenizer_of(vocab_size: int, config: Path, folder: Path) -> str:
    """The toy's training data with a manifest that says so."""
    prefix = folder / f"data{vocab_size}"
    for ending in ("bin", "idx"):
        shutil.copy(config.parent / f"train.{ending}", f"{prefix}.{ending}")
    tokenizer = TokenizerRecord(
        kind="sentencepiece", name="t", fingerprint="0" * 32, vocab_size=vocab_size, eod_id=0
    )
    files = check_indexed(prefix)
    manifest = Manifest(
        **{"sources": [], "tokenizer": tokenizer, "dtype": "uint16", "empty_documents": 0},
        **{"documents": 60, "tokens": int(files.sequence_lengths().sum())},
        **{"options": Options(text_column="text", append_eod=True), "versions": {}},
        outputs=[{"name": name, "bytes": 0, "xxh3": "0" * 32} for name in ("bin", "idx")],
    )
    write_manifest(prefix, manifest)
    return str(prefix)


def test_data_of_another_vocabulary_is_refused(config, tmp_path) -> None:
    fits = _made_with_a_tokenizer_of(toy.VOCABULARY, config, tmp_path)
    beyond = _made_with_a_tokenizer_of(toy.VOCABULARY + 1, config, tmp_path)
    toy.train(config, tmp_path / "fits", 1, f"data.blend={fits}", "training.stop_at=1")
    with pytest.raises(ConfigError, match=r"tokenizer of 301 ids, the models share 300"):
        toy.train(config, tmp_path / "beyond", 1, f"data.blend={beyond}")


def test_more_sequence_than_data_is_one_clear_line(config, tmp_path) -> None:
    with pytest.raises(UserError, match="tokens"):
        toy.train(config, tmp_path, 1, "training.seq_length=65536")


def test_teacher_from_a_checkpoint_of_another_layout(config, tmp_path) -> None:
    """A teacher trained here by cross-entropy, under TP=2, teaches a student on a pipeline."""
    wide = ("student.architecture.hidden_size=64", "student.architecture.num_layers=6")
    taught = toy.train(
        *(config, tmp_path / "teacher", 2, "loss.name=cross_entropy", "teacher=null"),
        *("parallel.tensor=2", *wide),
        save=True,
    )
    teacher = (f"teacher={{checkpoint: {tmp_path / 'teacher'}}}",)
    one = toy.train(config, tmp_path / "one", 1, *teacher)
    two = toy.train(config, tmp_path / "two", 2, *teacher, "parallel.pipeline=2")

    expected = toy.column(taught, "held_out_cross_entropy")[-1]
    for records in (one, two):
        assert toy.column(records, "held_out_teacher_cross_entropy")[-1] == pytest.approx(
            expected, rel=1e-5
        )
    assert toy.column(two, "loss") == pytest.approx(toy.column(one, "loss"), rel=1e-5, abs=1e-6)

"""A run that was stopped and resumed is the run that was not: bit for bit on the same layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from taid_megatron.checkpointing import store
from taid_megatron.config.errors import ConfigError

from . import toy

STEPS, HALF = 20, 10
LENGTH = (f"training.steps={STEPS}", f"checkpoint.every={HALF}")
TP2 = ("parallel.tensor=2",)
PP2 = ("parallel.pipeline=2",)
VPP2 = (*PP2, "parallel.virtual_pipeline=2")
SHARDED = ("parallel.distributed_optimizer=true",)
OVERLAP = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
DROPOUT = ("student.hidden_dropout=0.1", "student.attention_dropout=0.1")
EXACT = (
    *("step", "loss", "objective", "kl", "cross_entropy", "t", "lr", "grad_norm", "tokens"),
    *("batch_size", "consumed_samples", "held_out_cross_entropy", "held_out_kl"),
)


def _second_half(
    config: Path, straight: Path, folder: Path, ranks: int, *overrides: str
) -> list[dict[str, Any]]:
    """Resume from the middle checkpoint of `straight` in new processes, in a folder of its own."""
    name = f"step_{HALF:08d}"
    shutil.copytree(straight / "checkpoints" / name, folder / "checkpoints" / name)
    resumed, *records = toy.train(config, folder, ranks, *LENGTH, *overrides)
    assert resumed == {"step": HALF, "resumed_from": name}
    return records


def _after(records: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    return [record for record in records if record["step"] > step or "loss" not in record]


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        pytest.param(1, (f"training.steps={HALF + 50}",), id="one process, 50 steps"),
        pytest.param(1, ("training.precision=bf16", *DROPOUT), id="bf16 with dropout"),
        pytest.param(2, (*TP2, *DROPOUT), id="TP=2 with dropout"),
        pytest.param(2, SHARDED, id="DP=2 sharded"),
        pytest.param(
            2,
            (*SHARDED, *OVERLAP, "training.precision=bf16"),
            id="DP=2 sharded overlapped, bf16",
        ),
        pytest.param(2, VPP2, id="PP=2 VPP=2"),
    ],
)
def test_resume_on_the_same_layout_is_exact(config, tmp_path, ranks, overrides) -> None:
    straight = toy.train(config, tmp_path / "a", ranks, *LENGTH, *overrides, save=True)
    resumed = _second_half(config, tmp_path / "a", tmp_path / "b", ranks, *overrides)

    expected = _after(straight, HALF)
    assert [record["step"] for record in resumed] == [record["step"] for record in expected]
    for record, twin in zip(resumed, expected, strict=True):
        assert {name: record.get(name) for name in EXACT} == {
            name: twin.get(name) for name in EXACT
        }


@pytest.fixture(scope="module")
def sharded_run(config, tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("sharded")
    return folder, toy.train(config, folder, 2, *LENGTH, *SHARDED, save=True)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(1, (), id="one process"),
        pytest.param(2, TP2, id="TP=2"),
        pytest.param(2, PP2, id="PP=2"),
        pytest.param(2, VPP2, id="PP=2 VPP=2"),
        pytest.param(4, (*TP2, *PP2), id="TP=2 PP=2"),
    ],
)
def test_resume_on_another_layout_goes_on_alike(
    config, tmp_path, sharded_run, ranks, layout
) -> None:
    folder, straight = sharded_run
    resumed = _second_half(config, folder, tmp_path, ranks, *layout, *SHARDED)

    expected = _after(straight, HALF)
    for figure in ("loss", "objective", "kl", "t", "grad_norm", "held_out_kl"):
        assert toy.column(resumed, figure) == pytest.approx(
            toy.column(expected, figure), rel=1e-6, abs=1e-6
        ), figure
    assert toy.column(resumed, "consumed_samples") == toy.column(expected, "consumed_samples")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("student.architecture.ffn_hidden_size=96", *SHARDED), "ffn_hidden_size is 96"),
        (("loss.name=forward_kl", *SHARDED), "loss.name is forward_kl"),
        ((), "parallel.distributed_optimizer is False"),
        (("checkpoint.resume=false", *SHARDED), "step_00000020 is there"),
        (
            ("taid.t_start=0.1", "taid.t_end=0.2", "checkpoint.accept_changes=true", *SHARDED),
            "taid does not fit",
        ),
    ],
)
def test_resume_of_something_else_is_refused(config, sharded_run, overrides, named) -> None:
    folder, _ = sharded_run
    with pytest.raises(ConfigError, match=named) as error:
        toy.train(config, folder, 1, *LENGTH, *overrides)
    assert "name another run.folder" in str(error.value)


def test_what_is_done_is_not_done_again(config, sharded_run) -> None:
    folder, straight = sharded_run
    again = toy.train(config, folder, 2, *LENGTH, *SHARDED, save=True)
    assert again == straight


def test_a_checkpoint_holds_the_student_alone_and_is_published_whole(sharded_run) -> None:
    folder, _ = sharded_run
    checkpoint = store.newest(folder / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == STEPS
    assert checkpoint.state()["architecture"]["hidden_size"] == 32
    assert not list((folder / "checkpoints").glob(".*"))
    from megatron.core.dist_checkpointing.serialization import load_tensors_metadata

    shapes = {
        name: tensor.global_shape
        for name, tensor in load_tensors_metadata(str(checkpoint.path)).items()
    }
    assert shapes["decoder.final_layernorm.weight"] == (32,)
    assert not any("teacher" in name for name in shapes)
    layers = {shape[0] for name, shape in shapes.items() if name.startswith("decoder.layers")}
    assert layers == {4}  # the student's layers, none of the teacher's eight

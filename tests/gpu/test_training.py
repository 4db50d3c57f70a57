"""Runs on a CUDA device: against other precisions, layers, layouts, and against the CPU.

Run where there is a device, one is enough; the second line keeps the figures:

    python -m pytest -m gpu tests/gpu/test_training.py -rA
    TAID_GPU_FIGURES=figures.json python -m pytest -m gpu tests/gpu -rA

Transformer Engine has to be there: without it the tests that ask for it fail with the command's own
line. docs/cluster.md says which figures come out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.distributed import toy
from tests.e2e.test_quickstart import CODE

from . import runs
from .measure import PARTS
from .runs import BF16, ENGINE, LOCAL, losses, steps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_config(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def bf16_run(config, tmp_path_factory) -> list[float]:
    """Losses of 50 steps in bf16 with Transformer Engine's layers."""
    folder = tmp_path_factory.mktemp("bf16") / "run"
    return losses(runs.train(config, folder, BF16, ENGINE, steps(50)))


def assert_close(found: list[float], expected: list[float], share: float) -> dict[str, float]:
    """Loss by loss, and on the mean of the last ten more tightly; what to put on record.

    bf16 rounds a weight by up to 0.4%, and from then on two runs see other losses: a single step's
    may be off by some times that, the mean of ten hardly is.
    """
    assert len(found) == len(expected) > 0
    worst = max(abs(one - other) / other for one, other in zip(found, expected, strict=True))
    last = sum(found[-10:]) / sum(expected[-10:]) - 1
    print(f"largest relative difference {worst:.2e}, of the last ten together {last:+.2e}")
    assert found == pytest.approx(expected, rel=5 * share, abs=5e-3)
    assert abs(last) <= share
    return {"largest_difference": worst, "last_ten": last, "steps": len(found)}


def test_the_quick_start(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "quickstart")],
        env=runs.surroundings(),
        cwd=runs.ROOT,
        check=False,
    )
    assert done.returncode == 0
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    assert all(0 < found["kl"]["mean"] < 8 for found in summary["students"].values())


def test_fp32_on_the_device_is_fp32_on_the_cpu(config, tmp_path) -> None:
    on_device = runs.train(config, tmp_path / "cuda", "training.precision=fp32", steps(10))
    on_cpu = runs.train(config, tmp_path / "cpu", "training.precision=fp32", steps(10), on_cpu=True)
    for figure in ("loss", "grad_norm", "kl", "t", "held_out_kl"):
        values, expected = toy.column(on_device, figure), toy.column(on_cpu, figure)
        assert values == pytest.approx(expected, rel=1e-3, abs=1e-5), figure


def test_bf16_follows_fp32(config, tmp_path, bf16_run, figures) -> None:
    fp32 = runs.train(config, tmp_path / "run", "training.precision=fp32", steps(50))
    figures |= assert_close(bf16_run, losses(fp32), 0.01)


@pytest.mark.parametrize("documents", [(), ("data.reset_attention_mask=true",)])
def test_transformer_engine_s_layers_follow_the_local_ones(
    config, tmp_path, documents, figures
) -> None:
    engine = runs.train(config, tmp_path / "te", BF16, ENGINE, steps(50), *documents)
    local = runs.train(config, tmp_path / "local", BF16, LOCAL, steps(50), *documents)
    figures |= assert_close(losses(engine), losses(local), 0.01)


# From which card on, below which, and from which CUDA; its source is in config/engine.py.
CARDS = {
    "delayed": ((8, 9), (99, 0), (0, 0)),
    "tensorwise": ((8, 9), (99, 0), (0, 0)),
    "blockwise": ((9, 0), (99, 0), (12, 9)),
    "mxfp8": ((10, 0), (12, 0), (0, 0)),
}


def card_has(recipe: str) -> bool:
    least, below, cuda = CARDS[recipe]
    built = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    return least <= torch.cuda.get_device_capability() < below and built >= cuda


@pytest.mark.parametrize("recipe", CARDS)
def test_fp8_follows_bf16_or_is_refused_in_a_line(
    config, tmp_path, bf16_run, recipe, figures
) -> None:
    asked = [ENGINE, f"engine.fp8={recipe}"]
    if recipe != "delayed":
        asked.append(f"engine.teacher_fp8={recipe}")
    done = runs.start(config, tmp_path / "run", BF16, steps(50), *asked)
    if not card_has(recipe):
        assert done.returncode == 2, done.stdout + done.stderr
        assert f"engine.fp8={recipe} needs" in done.stderr
        figures["refused"] = done.stderr.strip()
        return
    assert done.returncode == 0, done.stdout + done.stderr
    figures |= assert_close(losses(runs.records(tmp_path / "run")), bf16_run, 0.01)


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.tensor=2", "parallel.sequence_parallel=true"),
        ("parallel.context=2",),
        ("parallel.distributed_optimizer=true",),
    ],
)
def test_two_ranks_on_the_device_do_what_one_does(config, tmp_path, layout) -> None:
    fp32 = ("training.precision=fp32", steps(10))
    found = runs.train_on_one_device(config, tmp_path / "two", *fp32, *layout)
    expected = runs.train(config, tmp_path / "one", *fp32)
    for figure in ("loss", "grad_norm", "kl", "t", "held_out_kl"):
        values = toy.column(found, figure)
        assert values == pytest.approx(toy.column(expected, figure), rel=1e-3, abs=1e-5), figure


@pytest.mark.parametrize("layers", [LOCAL, ENGINE])
@pytest.mark.parametrize("first_on_cpu", [False, True])
def test_a_checkpoint_moves_between_the_device_and_the_cpu(
    config, tmp_path, layers, first_on_cpu, figures
) -> None:
    """Saved on one after 10 of 20 steps, gone on from on the other."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    # its shards of the optimizer's state are the form that either side's Adam reads
    common = (BF16, steps(20), "parallel.distributed_optimizer=true")
    on_device, on_cpu = (*common, layers), (*common, LOCAL)
    expected = runs.train(config, whole, *on_device)
    for cpu, more in ((first_on_cpu, ("training.stop_at=10",)), (not first_on_cpu, ())):
        runs.train(config, moved, *(on_cpu if cpu else on_device), *more, on_cpu=cpu)
    found = losses(runs.records(moved))
    assert len(found) == 20
    figures |= assert_close(found, losses(expected), 0.01)


# Some 200 and 600 million parameters.
LARGE = {
    "student": {"num_layers": 12, "hidden_size": 1024, "num_attention_heads": 16},
    "teacher": {"num_layers": 24, "hidden_size": 1536, "num_attention_heads": 16},
}


@pytest.mark.parametrize("fp8", ["none", "tensorwise"])
def test_time_and_memory_by_part_against_the_plan(config, tmp_path, fp8, figures) -> None:
    """What stays allocated is what the plan counts, and the peak is not above it.

    With FP8 the figures alone: the plan counts neither its time nor the copies of weights it keeps.
    """
    tree = yaml.safe_load(config.read_text())
    for model, shape in LARGE.items():
        tree[model]["architecture"] = {**shape, "vocab_size": 32000}
    tree["training"] |= {"seq_length": 2048, "micro_batch_size": 2, "precision": "bf16"}
    large = tmp_path / "large.yaml"
    large.write_text(yaml.safe_dump(tree))
    settings = (f"run.folder={tmp_path / 'run'}", ENGINE, f"engine.fp8={fp8}", steps(15))
    run = subprocess.run(
        [sys.executable, "-m", "tests.gpu.measure", "this", str(large), *settings],
        env=runs.surroundings(),
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    figures |= json.loads(run.stdout.splitlines()[-1])
    assert figures["mfu"]["measured"] > 0
    if fp8 != "none":
        return
    for part in PARTS:
        sizes = figures["bytes"][part]
        # the allocator's and Megatron's buffers are rounded up
        assert sizes["measured"] == pytest.approx(sizes["planned"], rel=0.02), part
    assert figures["bytes"]["peak"]["measured"] <= 1.1 * figures["bytes"]["peak"]["planned"]

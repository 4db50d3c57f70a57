"""Runs on a CUDA device: against other precisions, layers, layouts, and against the CPU.

Run where there is a device: `python -m pytest -m gpu tests/gpu/test_training.py -rA`. Transformer
Engine has to be there: without it the tests that ask for it fail with the command's own line.
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


def assert_close(found: list[float], expected: list[float], share: float) -> None:
    """Loss by loss, and on the mean of the last ten more tightly."""
    assert len(found) == len(expected) > 0
    assert found == pytest.approx(expected, rel=5 * share, abs=5e-3)
    assert sum(found[-10:]) == pytest.approx(sum(expected[-10:]), rel=share)


def test_the_quick_start(tmp_path) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path / "quickstart")], check=False)
    assert done.returncode == 0
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    assert all(0 < found["kl"]["mean"] < 8 for found in summary["students"].values())


def test_fp32_on_the_device_is_fp32_on_the_cpu(config, tmp_path) -> None:
    on_device = runs.train(config, tmp_path / "cuda", "training.precision=fp32", steps(10))
    on_cpu = runs.train(config, tmp_path / "cpu", "training.precision=fp32", steps(10), on_cpu=True)
    for figure in ("loss", "grad_norm", "kl", "t", "held_out_kl"):
        values, expected = toy.column(on_device, figure), toy.column(on_cpu, figure)
        assert values == pytest.approx(expected, rel=1e-3, abs=1e-5), figure


def test_bf16_follows_fp32(config, tmp_path, bf16_run) -> None:
    fp32 = runs.train(config, tmp_path / "run", "training.precision=fp32", steps(50))
    assert_close(bf16_run, losses(fp32), 0.01)


@pytest.mark.parametrize("documents", [(), ("data.reset_attention_mask=true",)])
def test_transformer_engine_s_layers_follow_the_local_ones(config, tmp_path, documents) -> None:
    engine = runs.train(config, tmp_path / "te", BF16, ENGINE, steps(50), *documents)
    local = runs.train(config, tmp_path / "local", BF16, LOCAL, steps(50), *documents)
    assert_close(losses(engine), losses(local), 0.01)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_fp8_follows_bf16_or_is_refused_in_a_line(config, tmp_path, bf16_run, recipe) -> None:
    asked = [ENGINE, f"engine.fp8={recipe}"]
    if recipe != "delayed":
        asked.append(f"engine.teacher_fp8={recipe}")
    done = runs.start(config, tmp_path / "run", BF16, steps(50), *asked)
    if done.returncode == 2:  # another card, or an older CUDA
        assert f"engine.fp8={recipe} needs" in done.stderr
        return
    assert done.returncode == 0, done.stdout + done.stderr
    assert_close(losses(runs.records(tmp_path / "run")), bf16_run, 0.01)


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
    config, tmp_path, layers, first_on_cpu
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
    assert_close(found, losses(expected), 0.01)


MEASURED = """
import json, sys, torch
from taid_megatron.config.load import load
from taid_megatron.training import loop
code = loop.run(load(sys.argv[1], sys.argv[2:]))
print(json.dumps({"peak": torch.cuda.max_memory_allocated(), "card": torch.cuda.get_device_name()}))
sys.exit(code)
"""
# Some 200 and 600 million parameters.
LARGE = {
    "student": {"num_layers": 12, "hidden_size": 1024, "num_attention_heads": 16},
    "teacher": {"num_layers": 24, "hidden_size": 1536, "num_attention_heads": 16},
}


def test_memory_and_time_against_the_plan(config, tmp_path, record_property) -> None:
    """The peak is not above what the plan says; the figures are printed (pytest -rA)."""
    tree = yaml.safe_load(config.read_text())
    for model, shape in LARGE.items():
        tree[model]["architecture"] = {**shape, "vocab_size": 32000}
    tree["training"] |= {"seq_length": 2048, "micro_batch_size": 2, "precision": "bf16"}
    large = tmp_path / "large.yaml"
    large.write_text(yaml.safe_dump(tree))
    overrides = (f"run.folder={tmp_path / 'run'}", steps(12))
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, str(large), *overrides],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    measured = json.loads(run.stdout.splitlines()[-1])
    plan = subprocess.run(
        [
            *(sys.executable, "-m", "taid_megatron", "plan", str(large), "--gpus", "1"),
            *("--gpu", "h100", "--json", *overrides),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    planned = json.loads(plan.stdout)
    seconds = toy.column(runs.records(tmp_path / "run"), "step_seconds")
    step = sorted(seconds[2:])[len(seconds[2:]) // 2]
    print(f"{measured['card']}: {step:.3f} s a step; peak {measured['peak'] / 2**30:.2f} GiB")
    print(f"plan for an H100: {planned['time']}; {planned['memory'][0]}")
    assert measured["peak"] <= 1.1 * planned["memory"][0]["total"]

"""The benchmark scripts at tiny sizes: they run, compare what they say, and write their JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(name: str, path: Path, *arguments: str) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parents[1])}
    line = [sys.executable, "-W", "ignore", str(BENCHMARKS / name), "--json", str(path)]
    done = subprocess.run(
        [*line, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


def test_loss(tmp_path):
    sizes = ("--tokens", "8", "--vocabulary", "64", "--repeats", "1", "--threads", "1")
    only = ("--only", "naive,native inplace,head")
    found = run("loss.py", tmp_path / "loss.json", *sizes, *only)
    rows = {row["version"]: row for row in found["rows"]}
    assert {"naive", "native inplace", "heads apart", "fused head"} <= set(rows)
    for name, row in rows.items():
        assert row["cpu_seconds"] > 0
        assert row["time_ratio"] > 0
        assert (row["time_ratio"] == 1.0) == (row["against"] == name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it measures where there is a CUDA device")
def test_loss_gpu_refuses_to_measure_anything_else():
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parents[1])}
    line = [sys.executable, "-W", "ignore", str(BENCHMARKS / "loss_gpu.py")]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("loss_gpu: no CUDA device here")
    assert done.stderr.count("\n") == 1


def test_attention(tmp_path):
    sizes = ("--repeats", "1", "--seq-length", "32", "--batch", "1")
    assert run("attention.py", tmp_path / "attention.json", *sizes)["rows"]


@pytest.mark.skipif(not find_spec("transformers"), reason="the benchmark compares with it")
def test_pair(tmp_path):
    """It refuses by itself where a version's losses differ from transformers'."""
    sizes = ("--student", "1x16", "--teacher", "1x32", "--vocabulary", "64", "--batch", "2")
    sizes += ("--seq-length", "16", "--repeats", "1", "--steps", "1")
    found = run("pair.py", tmp_path / "pair.json", *sizes)
    assert {row["version"] for row in found["rows"]} >= {"transformers", "taid-megatron"}


def test_timeline(tmp_path):
    """Two ranks; what the schedule did is checked by tests/distributed/test_plan_timeline.py."""
    sizes = ("--student", "2x16", "--teacher", "4x32", "--vocabulary", "64", "--batch", "1")
    sizes += ("--seq-length", "16", "--micro-batches", "3", "--calibration", "1", "--rounds", "1")
    found = run("timeline.py", tmp_path / "timeline.json", *sizes)
    even, balanced = found["rows"]
    assert (even["student_layers"], even["teacher_layers"]) == ([1, 1], [2, 2])
    assert sum(balanced["student_layers"]) == 2
    assert sum(balanced["teacher_layers"]) == 4
    for row in found["rows"]:
        assert row["simulated_to_measured"] > 0
        assert min(*row["forward_seconds"], *row["backward_seconds"]) > 0


def test_checkpoint(tmp_path):
    sizes = ("--megabytes", "2", "--repeats", "1", "--folder", str(tmp_path))
    rows = run("checkpoint.py", tmp_path / "checkpoint.json", *sizes)["rows"]
    assert [row["cpu_seconds_ratio"] == 1.0 for row in rows] == [True, False, True, False]
    assert [row["version"] for row in rows if row["stands_still_ratio"] == 1.0] == ["blocking"]
    assert all(row["seconds"] >= row["stands_still"] > 0 for row in rows)


@pytest.mark.skipif(not find_spec("pyarrow"), reason="its text lies in Parquet")
def test_data(tmp_path):
    """It refuses by itself where a version writes other bytes or reads other samples."""
    sizes = ("--megabytes", "0.6", "--vocabulary", "700", "--rounds", "1")
    sizes += ("--index-documents", "20000", "--token-megabytes", "3", "--windows", "200")
    found = run("data.py", tmp_path / "data.json", *sizes)
    assert found["tokenizing"]["preprocess_data"]["peak"] > 50 * 2**20  # numpy alone is more
    assert {row["what"] for row in found["targets"]} >= {"merge / cp", "index / megatron-core"}
    for row in found["targets"]:
        assert row["found"] > 0
        assert row["relation"] in (">=", "<=")


def test_the_runner_names_the_benchmarks_it_knows():
    runner = (BENCHMARKS / "run.sh").read_text()
    for script in BENCHMARKS.glob("*.py"):
        assert script.stem in ("measure", "windows") or script.stem in runner

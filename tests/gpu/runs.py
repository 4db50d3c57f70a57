"""Whole runs in processes of their own, on the device or beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.distributed import toy

ROOT = Path(__file__).parents[2]
# wide enough for FP8's products, short enough for seconds
SHAPE = (
    *("student.architecture.hidden_size=128", "student.architecture.ffn_hidden_size=256"),
    *("teacher.architecture.hidden_size=256", "teacher.architecture.ffn_hidden_size=512"),
    *("training.seq_length=64", "training.micro_batch_size=4"),
    "evaluation.every=10",
)
BF16 = "training.precision=bf16"
LOCAL, ENGINE = "engine.layers=local", "engine.layers=te"


def surroundings() -> dict[str, str]:
    """The environment of one process: not its place among ranks, and without the host's name.

    gloo would look that up, which a machine without a network need not be able to resolve.
    """
    placed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: text for name, text in os.environ.items() if name not in placed}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return {**kept, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}


def steps(count: int) -> str:
    return f"training.steps={count}"


def start(
    config: Path, folder: Path, *overrides: str, on_cpu: bool = False
) -> subprocess.CompletedProcess[str]:
    """`taid-megatron train` to its end."""
    environment = {**surroundings(), **({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})}
    line = [sys.executable, "-m", "taid_megatron", "train", config, f"run.folder={folder}"]
    return subprocess.run(
        [*map(str, line), *SHAPE, *overrides],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def train(
    config: Path, folder: Path, *overrides: str, on_cpu: bool = False
) -> list[dict[str, Any]]:
    """The records of a run that succeeds."""
    done = start(config, folder, *overrides, on_cpu=on_cpu)
    assert done.returncode == 0, done.stdout + done.stderr
    return records(folder)


def train_on_one_device(config: Path, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """As train, by two ranks that share the device: over gloo, as NCCL takes a device a rank."""
    overrides = (str(config), f"run.folder={folder}", *SHAPE, *overrides)
    ranks = [_rank(number, folder.parent / f"{folder.name}.store", overrides) for number in (0, 1)]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(outputs)
    return records(folder)


def _rank(number: int, store: Path, overrides: Sequence[str]) -> subprocess.Popen[str]:
    environment = {**surroundings(), "RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.gpu.rank_over_gloo", str(store), *overrides],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(found: list[dict[str, Any]]) -> list[float]:
    return toy.column(found, "loss")

"""Two nodes, each a torchrun of its own on this machine, under the batch script: real runs.

srun and scontrol are the stand-ins of tests/unit/launch; torchrun, ranks and trainer are real.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..distributed import toy
from ..unit.launch.stand_ins import ROOT, StandIns

JOB = {
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "localhost,localhost",
    "TAID_ROOT": str(ROOT),
    "NPROC_PER_NODE": "1",
    "DOCTOR": "no",
    "PYTHON": sys.executable,
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}
SCRIPT = str(ROOT / "launch/slurm/pretrain_80xh100.sbatch")


@pytest.fixture
def cluster(tmp_path: Path) -> StandIns:
    toy.write_config(tmp_path)
    return StandIns(tmp_path, tmp_path)


def job() -> dict[str, str]:
    return {**JOB, "SLURM_JOB_ID": str(os.getpid())}


def records(folder: Path) -> list[dict]:
    path = folder / "run/metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def logs(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((folder / "logs").iterdir()))


def processes(session: int) -> list[int]:
    """Ids of the processes below one, itself included."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout
    parents = [tuple(map(int, line.split())) for line in table.splitlines()]
    found = [session]
    for parent in found:
        found.extend(pid for pid, above in parents if above == parent)
    return found


def alive(pids: list[int]) -> list[int]:
    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return [pid for pid in pids if runs(pid)]


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() + b"\0\0"
    except OSError:
        return b"\0\0"


def test_a_node_dies_and_the_restarted_job_has_the_losses_of_a_straight_run(
    cluster: StandIns,
) -> None:
    """Slurm restarts a job whose node went down, with the same id and a count (--requeue)."""
    folder = cluster.folder
    config = ("toy.yaml", "training.steps=6", "optimizer.warmup_steps=1")
    settings = job()
    process = cluster.start(SCRIPT, *config, "checkpoint.every=2", **settings)
    below: list[int] = []
    try:
        while not (folder / "run/checkpoints/step_00000002/state.json").exists():
            assert process.poll() is None, logs(folder)
            time.sleep(0.05)
        below = processes(process.pid)
        nodes = [pid for pid in below if b"launch/torchrun.sh" in cmdline(pid).split(b"\0", 2)[1]]
        assert len(nodes) == 2
        for pid in processes(nodes[1]):  # power off: everything of the node at once
            os.kill(pid, signal.SIGKILL)
        _, said = process.communicate(timeout=100)
        assert alive(below) == []
    finally:
        for pid in alive([*processes(process.pid), *below]):
            os.kill(pid, signal.SIGKILL)
    assert (
        process.returncode == 128 + signal.SIGKILL
    )  # the highest code of any node, as srun has it
    assert "not requeued" in said
    assert ["requeue", settings["SLURM_JOB_ID"]] not in cluster.calls("scontrol")
    assert records(folder)[-1]["step"] < 6

    code, said = cluster.run(SCRIPT, *config, **settings, SLURM_RESTART_COUNT="1")
    assert code == 0, said + logs(folder)
    assert "resuming" in logs(folder)
    straight = toy.train(folder / "toy.yaml", folder / "straight", 2, *config[1:])
    for figure in ("step", "loss", "t", "grad_norm"):
        assert toy.column(records(folder), figure) == toy.column(straight, figure), figure

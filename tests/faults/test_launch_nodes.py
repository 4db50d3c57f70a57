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


def job(number: int, **more: str) -> dict[str, str]:
    return {**JOB, "SLURM_JOB_ID": str(os.getpid() * 10 + number), **more}


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


def test_a_node_that_dies_ends_the_job_and_leaves_nothing_behind(cluster: StandIns) -> None:
    process = cluster.start(SCRIPT, "toy.yaml", "training.steps=100000", **job(1))
    try:
        while len(records(cluster.folder)) < 2:
            assert process.poll() is None, logs(cluster.folder)
            time.sleep(0.05)
        below = processes(process.pid)
        nodes = [pid for pid in below if b"launch/torchrun.sh" in cmdline(pid).split(b"\0", 2)[1]]
        assert len(nodes) == 2
        for pid in processes(nodes[1]):  # power off: everything of the node at once
            os.kill(pid, signal.SIGKILL)
        _, said = process.communicate(timeout=100)
    finally:
        for pid in alive(processes(process.pid)):
            os.kill(pid, signal.SIGKILL)
    assert (
        process.returncode == 128 + signal.SIGKILL
    )  # the highest code of any node, as srun has it
    assert "not requeued" in said
    assert not [call for call in cluster.calls("scontrol") if call[0] == "requeue"]
    assert alive(below) == []


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() + b"\0\0"
    except OSError:
        return b"\0\0"


# Stands in for a trainer that stops on a signal: the run ends after step 2 and says 75.
STOPPING = """#!/usr/bin/env bash
if [ "${SLURM_RESTART_COUNT:-0}" = 0 ] && [ "$2" = torch.distributed.run ]; then
    REAL "$@" training.stop_at=2 || exit $?
    echo '{"exit_code": 75}' >FOLDER/run/run_status.$$ && mv FOLDER/run/run_status.$$ STATUS
    exit 1
fi
exec REAL "$@"
"""


def test_a_requeued_job_resumes_with_the_same_losses(cluster: StandIns) -> None:
    folder = cluster.folder
    stopping = folder / "stopping_python"
    text = STOPPING.replace("REAL", sys.executable).replace("FOLDER", str(folder))
    stopping.write_text(text.replace("STATUS", str(folder / "run/run_status.json")))
    stopping.chmod(0o755)
    settings = job(2, PYTHON=str(stopping))
    config = ("toy.yaml", "training.steps=4", "optimizer.warmup_steps=1")

    code, said = cluster.run(SCRIPT, *config, **settings)
    assert code == 75, said + logs(folder)
    assert ["requeue", settings["SLURM_JOB_ID"]] in cluster.calls("scontrol")
    assert [record["step"] for record in records(folder)][-1] == 2

    code, said = cluster.run(SCRIPT, *config, **settings, SLURM_RESTART_COUNT="1")
    assert code == 0, said + logs(folder)
    straight = toy.train(folder / "toy.yaml", folder / "straight", 2, *config[1:])
    assert toy.column(records(folder), "loss") == toy.column(straight, "loss")
    assert toy.column(records(folder), "t") == toy.column(straight, "t")
    assert [record["step"] for record in records(folder) if "loss" in record] == [1, 2, 3, 4]

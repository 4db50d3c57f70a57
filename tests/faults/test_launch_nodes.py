"""Two nodes, each a torchrun of its own on this machine, under the batch script: real runs.

srun and scontrol are the stand-ins of tests/unit/launch; torchrun, ranks and trainer are real.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
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
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if "resumed_from" not in record]


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


def start_until(cluster: StandIns, reached: Callable[[], bool], *config: str, **settings: str):
    """The batch script, when what it writes has come so far; and the processes below it."""
    process = cluster.start(SCRIPT, *config, **settings)
    try:
        while not reached():
            assert process.poll() is None, logs(cluster.folder)
            time.sleep(0.05)
    except BaseException:
        end(processes(process.pid))
        raise
    return process, processes(process.pid)


def end(pids: list[int]) -> None:
    for pid in alive(pids):
        os.kill(pid, signal.SIGKILL)


def checkpoints(folder: Path) -> set[str]:
    return {path.parent.name for path in (folder / "run/checkpoints").glob("step_*/state.json")}


def test_a_warned_job_and_one_that_lost_a_node_end_with_the_losses_of_a_straight_run(
    cluster: StandIns,
) -> None:
    """Three starts of one job, as Slurm makes them: the same id, and a count."""
    folder = cluster.folder
    length = ("training.steps=16", "optimizer.warmup_steps=1")
    config = ("toy.yaml", *length, "checkpoint.every=2")
    settings = job()
    requeue = ["requeue", settings["SLURM_JOB_ID"]]

    # Its time is nearly over: SIGUSR1 to the batch script alone, as --signal=B:USR1 sends it.
    process, below = start_until(cluster, lambda: bool(checkpoints(folder)), *config, **settings)
    try:
        os.kill(process.pid, signal.SIGUSR1)
        _, said = process.communicate(timeout=300)
        assert alive(below) == []
    finally:
        end(below)
    assert process.returncode == 75, said + logs(folder)
    status = json.loads((folder / "run/run_status.json").read_text())
    assert (status["state"], status["exit_code"], status["signal"]) == ("stopped", 75, "SIGUSR1")
    assert "requeueing, restart 1 of at most 20" in said
    assert cluster.calls("scontrol").count(requeue) == 1
    before = checkpoints(folder)
    assert max(before) == f"step_{status['step']:08d}"

    process, below = start_until(
        cluster,
        lambda: checkpoints(folder) > before,
        *config,
        **settings,
        SLURM_RESTART_COUNT="1",
    )
    try:
        nodes = [pid for pid in below if b"launch/torchrun.sh" in cmdline(pid).split(b"\0", 2)[1]]
        assert len(nodes) == 2
        end(processes(nodes[1]))  # power off: everything of the node at once
        _, said = process.communicate(timeout=300)
        assert alive(below) == []
    finally:
        end(below)
    # the highest code of any node, as srun has it
    assert process.returncode == 128 + signal.SIGKILL
    assert "not requeued" in said  # not by the script: Slurm does, whose node it was
    assert cluster.calls("scontrol").count(requeue) == 1

    code, said = cluster.run(SCRIPT, *config, **settings, SLURM_RESTART_COUNT="2")
    assert code == 0, said + logs(folder)
    assert logs(folder).count("resuming") == 2
    straight = toy.train(folder / "toy.yaml", folder / "straight", 2, *length)
    for figure in ("step", "loss", "t", "grad_norm"):
        assert toy.column(records(folder), figure) == toy.column(straight, figure), figure


def test_what_one_node_lacks_ends_both_with_its_line_and_code_2(tmp_path: Path) -> None:
    """Two nodes started by hand; the second has no DALI. A status of an older run lies there."""
    config = toy.write_config(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run_status.json").write_text('{"exit_code": 75}')
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"localhost:{free.getsockname()[1]}"
    nodes = []
    for number, text in enumerate(("", "raise ImportError('no DALI here')")):
        plugin = tmp_path / f"node{number}/nvidia/dali/plugin"
        plugin.mkdir(parents=True)
        (plugin / "pytorch.py").write_text(text)
        call = (
            *("bash", str(ROOT / "launch/torchrun.sh"), "--nnodes", "2", "--nproc-per-node", "1"),
            *("--rdzv-endpoint", endpoint, "--node-rank", str(number)),
            *("train", str(config), "data.reader=dali"),
        )
        settings = {name: JOB[name] for name in ("PYTHON", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")}
        path = f"{tmp_path / f'node{number}'}:{ROOT}"
        nodes.append(
            subprocess.Popen(
                call,
                env={**os.environ, **settings, "PYTHONPATH": path},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    try:
        said = [node.communicate(timeout=300)[0].splitlines() for node in nodes]
    finally:
        for node in nodes:
            end(processes(node.pid))
    line = "data.reader=dali needs NVIDIA DALI, which cannot be imported (no DALI here)"
    assert [node.returncode for node in nodes] == [2, 2], said
    # which node has which ranks is torchrun's to say
    assert re.match(
        rf"torchrun.sh: rank \d on {socket.gethostname()}: {re.escape(line)}", said[0][-1]
    )
    assert said[1][-1].startswith(f"torchrun.sh: {line}")
    assert not (tmp_path / "run/config.yaml").exists()

"""The batch script under a real Slurm: slurmctld and two slurmd on this machine. Marker `slurm`.

    apt-get install --no-install-recommends slurm-wlm munge     # Debian; its services need not run
    python -m pytest -m slurm tests/faults/test_slurm.py

The daemons run in the foreground below a folder of their own, with ports and a key of their own,
and end with the test. By hand only: a minute, and CI has no Slurm. PROCTRACK=cgroup takes control
groups to track processes (root, cgroup v1) in place of process groups.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from ..distributed import toy
from ..unit.launch.conftest import CONFIG as RUN
from ..unit.launch.stand_ins import ROOT, StandIns

pytestmark = pytest.mark.slurm

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue")
HOST = socket.gethostname().split(".")[0]
# The ranks meet at the first, so it resolves. (Slurm takes "localhost" for the host's own name.)
NODES = (HOST, f"{HOST}-2")
CONFIG = """
ClusterName=test
SlurmctldHost={nodes[0]}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={ports[0]}
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2
MpiDefault=none
ReturnToService=2
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={nodes[0]} NodeAddr=127.0.0.1 Port={ports[1]} {resources}
NodeName={nodes[1]} NodeHostname={nodes[0]} NodeAddr=127.0.0.1 Port={ports[2]} {resources}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Slurm:
    """A cluster of two nodes, as long as it is entered."""

    def __init__(self, folder: Path, proctrack: str) -> None:
        self.folder = folder
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        folder.mkdir(mode=0o755)
        (folder / "state").mkdir()
        for node in NODES:
            (folder / f"spool-{node}").mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        (folder / "gpu").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu\n")
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\nCgroupPlugin=cgroup/v1\n")
        described = {"user": getpass.getuser(), "nodes": NODES, "proctrack": proctrack}
        described |= {"ports": free_ports(3), "resources": f"CPUs={os.cpu_count()} Gres=gpu:1"}
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, **described))

    def __enter__(self) -> Slurm:
        files = {"socket": "munge", "pid-file": "munged.pid", "log-file": "munged.log"}
        files |= {"seed-file": "munge.seed", "key-file": "munge.key"}
        own = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self._daemon("munged", "--foreground", "--force", *own)
        wait_until(lambda: (self.folder / "munge").exists(), self.said, 20)
        self._daemon("slurmctld", "-D", "-i")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        wait_until(lambda: self.run("sinfo", "-h", "-o", "%D %t") == "2 idle", self.said, 60)
        return self

    def __exit__(self, *error: object) -> None:
        for job in self.run("squeue", "-h", "-o", "%A").split():
            self.run("scancel", job)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            daemon.wait(timeout=30)

    def _daemon(self, *command: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            self.daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
            )

    def run(self, *command: str, **more: str) -> str:
        """What a command of Slurm's says; more: environment variables."""
        done = subprocess.run(
            command, env=self.environment | more, capture_output=True, text=True, timeout=30
        )
        return (done.stdout + done.stderr).strip()

    def state(self, job: str) -> str:
        """Such as PENDING, RUNNING, COMPLETED."""
        return self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")

    def restarts(self, job: str) -> int:
        """How often Slurm has started it again."""
        shown = re.search(r"Restarts=(\d+) ", self.run("scontrol", "show", "job", job))
        return int(shown[1]) if shown else 0

    def submit(self, folder: Path, *config: str, **settings: str) -> str:
        """generic.sbatch on both nodes, from that folder; the job's id."""
        line = ("sbatch", f"--chdir={folder}", "--nodes=2", "--gpus-per-node=1", "--time=60")
        script = str(ROOT / "launch/slurm/generic.sbatch")
        job = self.run(*line, script, *config, **settings).rpartition(" ")[2]
        assert job.isdigit(), job
        return job

    def said(self) -> str:
        """The end of the daemons' logs."""
        logs = [path.read_text()[-2000:] for path in sorted(self.folder.glob("*.log"))]
        return "\n".join(logs)


def job_logs(folder: Path) -> str:
    """What the batch script and the nodes of its jobs said."""
    paths = [*folder.glob("taid-*.log"), *folder.glob("logs/*.log")]
    return "\n".join(path.read_text() for path in paths)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_until(met: Callable[[], bool], said: Callable[[], str], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, said()
        time.sleep(0.2)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.fail(f"not installed: {', '.join(missing)}; see the head of this file")
    with Slurm(tmp_path / "slurm", os.environ.get("PROCTRACK", "pgid")) as cluster:
        yield cluster


def test_signals_requeues_and_a_lost_node(slurm: Slurm, tmp_path: Path) -> None:
    """With torchrun's stand-in, which notes its signals and ends as a stopped run does."""
    stand_ins = StandIns(tmp_path, tmp_path)
    for name in ("srun", "scontrol", "apptainer"):
        (stand_ins.bin / name).unlink()  # the real ones
    (tmp_path / "run").mkdir()
    (tmp_path / "run.yaml").write_text(RUN)
    stopped = {"wait": True, "status": {"exit_code": 75}, "code": 1}
    settings = stand_ins.environment(
        PLAN=json.dumps({"train": stopped}),
        STATUS_FILE=str(tmp_path / "run/run_status.json"),
        TAID_ROOT=str(ROOT),
        DOCTOR="no",
        NPROC_PER_NODE="1",
    )

    def said() -> str:
        return job_logs(tmp_path) + slurm.said()

    def until(met: Callable[[], bool]) -> None:
        wait_until(met, said, 180)

    def ranks_wait(starts: int) -> None:
        until(lambda: len(stand_ins.calls("torchrun")) == 2 * starts)
        time.sleep(0.5)  # from their note to their pause

    def restarted(times: int) -> bool:
        return slurm.restarts(job) == times

    job = slurm.submit(tmp_path, "run.yaml", **settings)
    ranks_wait(1)
    slurm.run("scancel", "--signal=USR1", "--batch", job)  # what --signal=B:USR1 does in time
    until(lambda: restarted(1))
    assert stand_ins.calls("signals") == 2 * [[["SIGUSR1"]]]
    ranks_wait(2)
    slurm.run("scontrol", "update", f"nodename={NODES[1]}", "state=down", "reason=test")
    until(lambda: restarted(2))
    slurm.run("scontrol", "update", f"nodename={NODES[1]}", "state=resume")
    ranks_wait(3)
    before = len(stand_ins.calls("signals"))
    slurm.run("scancel", "--signal=TERM", "--batch", job)
    until(lambda: slurm.state(job) == "FAILED")  # with 75, and not requeued
    assert stand_ins.calls("signals")[before:] == 2 * [[["SIGUSR1"]]]
    log = (tmp_path / f"taid-{job}.log").read_text()
    for restart in range(3):
        assert f"job {job}, restart {restart}, 2 nodes" in log
    assert log.count("requeueing, restart 1 of at most 20") == 1
    assert log.count("by SIGTERM: not requeued") == 1
    # %N is the host's name, which both nodes share
    assert [path.name for path in (tmp_path / "logs").iterdir()] == [f"{job}-{HOST}.log"]

    job = slurm.submit(tmp_path, "run.yaml", **settings)
    ranks_wait(4)
    before += 2
    slurm.run("scancel", job)
    until(lambda: slurm.state(job) == "CANCELLED")
    until(lambda: "Slurm is ending the job" in (tmp_path / f"taid-{job}.log").read_text())
    assert stand_ins.calls("signals")[before:] == 2 * [[["SIGTERM"]]]


def test_a_run_is_warned_requeued_and_ends_with_the_losses_of_a_straight_run(
    slurm: Slurm, tmp_path: Path
) -> None:
    """Everything is real: doctor, two ranks on two nodes over gloo, export, evaluation."""
    config = toy.write_config(tmp_path)
    length = ("training.steps=30", "optimizer.warmup_steps=1")
    ids = {f"w{number}": number for number in range(toy.VOCABULARY)}
    Tokenizer(WordLevel(ids, unk_token="w0")).save(str(tmp_path / "tokenizer.json"))
    clean = {name: "" for name in os.environ if name.startswith(("OMP_", "CUDA_"))}
    settings = clean | {
        **{"TAID_ROOT": str(ROOT), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        **{"NPROC_PER_NODE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        **{"EXPORT_TO": "exported", "EVALUATE": "yes", "TOKENIZER": "tokenizer.json"},
    }

    def said() -> str:
        return job_logs(tmp_path) + slurm.said()

    job = slurm.submit(tmp_path, "toy.yaml", *length, "checkpoint.every=2", **settings)
    saved = tmp_path / "run/checkpoints"
    wait_until(lambda: any(saved.glob("step_*/state.json")), said, 300)
    slurm.run("scancel", "--signal=USR1", "--batch", job)  # what --signal=B:USR1 does in time
    wait_until(lambda: slurm.restarts(job) == 1, said, 120)
    stopped = json.loads((tmp_path / "run/run_status.json").read_text())
    assert (stopped["exit_code"], stopped["signal"]) == (75, "SIGUSR1")
    assert stopped["step"] < 30
    wait_until(lambda: slurm.state(job) in ("COMPLETED", "FAILED"), said, 900)
    assert slurm.state(job) == "COMPLETED", said()

    log = (tmp_path / f"taid-{job}.log").read_text()
    said_by_job = [line[8:] for line in log.splitlines() if line.startswith("job.sh: ")]
    assert [line for line in said_by_job if not line.startswith(f"job {job},")] == [
        *("doctor --network", "train"),
        "stopped with a checkpoint: requeueing, restart 1 of at most 20",
        *("doctor --network", "train", "export to exported", "evaluate", "done"),
    ]
    nodes = job_logs(tmp_path)
    assert "all-reduce of 16 MiB" in nodes  # the doctor's, between the nodes
    assert nodes.count("resuming") == 1
    assert (tmp_path / "exported/model.safetensors").is_file()
    figures = json.loads((tmp_path / "run/evaluation/evaluation.json").read_text())
    assert figures["held_out"]["perplexity"] > 1

    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "resumed_from" not in record]
    straight = toy.train(config, tmp_path / "straight", 2, *length)
    for figure in ("step", "loss", "t", "grad_norm"):
        assert toy.column(records, figure) == toy.column(straight, figure), figure

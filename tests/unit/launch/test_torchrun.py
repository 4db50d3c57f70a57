"""launch/torchrun.sh: how it calls torchrun, what it sets, and which exit code comes out."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser, parse_args

from .stand_ins import ROOT, StandIns

SCRIPT = str(ROOT / "launch/torchrun.sh")
NEW = ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout", "600"]


def fake_torch(folder: Path, run: str, launcher: str) -> str:
    (folder / "torch/distributed/launcher").mkdir(parents=True)
    (folder / "torch/distributed/elastic").mkdir()
    (folder / "torch/distributed/run.py").write_text(run)
    (folder / "torch/distributed/launcher/api.py").write_text(launcher)
    return str(folder / "torch")


@pytest.fixture
def torchs(tmp_path: Path) -> dict[str, str]:
    """Folders as torch installs them, by what their torchrun knows."""
    variable = 'os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")'
    return {
        "flags": fake_torch(tmp_path / "new", '"--signals-to-handle" "--shutdown-timeout"', ""),
        "variable": fake_torch(tmp_path / "mid", '"--signals-to-handle"', variable),
        "nothing": fake_torch(tmp_path / "old", "", ""),
    }


def test_one_node(stand_ins: StandIns, torchs) -> None:
    code, said = stand_ins.run(
        *(SCRIPT, "--nproc-per-node", "2", "train", "run.yaml", "training.steps=2"),
        FAKE_TORCH=torchs["flags"],
    )
    assert (code, said) == (0, "")
    [[call]] = stand_ins.calls("torchrun")
    assert call["words"] == [
        *("--nnodes", "1", "--nproc-per-node", "2", "--max-restarts", "0", "--standalone", *NEW),
        *("-m", "taid_megatron", "train", "run.yaml", "training.steps=2"),
    ]
    assert call["environment"] == {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2)),
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
    }


def test_the_installed_torch_is_probed_without_importing_it(stand_ins: StandIns) -> None:
    assert stand_ins.run(SCRIPT, "train", "run.yaml") == (0, "")
    words = stand_ins.calls("torchrun")[0][0]["words"]
    assert words[words.index("--nproc-per-node") + 1] == "1"
    # and understands what it is given, of which an older one knows less
    understood = parse_args(words)
    known = set(get_args_parser()._option_string_actions)
    assert ("--shutdown-timeout" in known) == ("--shutdown-timeout" in words)
    assert ("--signals-to-handle" in known) == (NEW[0] in words)
    assert getattr(understood, "shutdown_timeout", 600) == 600
    assert "SIGUSR1" in getattr(understood, "signals_to_handle", "SIGUSR1")
    assert understood.training_script_args == ["train", "run.yaml"]


def test_environment_follows_the_layout_and_the_user(stand_ins: StandIns, torchs) -> None:
    def environment(*overrides: str, **given: str) -> dict[str, str]:
        call = (SCRIPT, "train", "run.yaml", *overrides)
        assert stand_ins.run(*call, FAKE_TORCH=torchs["flags"], **given)[0] == 0
        return stand_ins.calls("torchrun")[-1][0]["environment"]

    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in environment()
    assert environment("parallel.tensor=2")["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    given = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
        "OMP_NUM_THREADS": "7",
        "GLOO_SOCKET_IFNAME": "eth7",
    }
    assert environment("parallel.tensor=2", **given).items() >= given.items()


def test_ranks_are_the_visible_gpus(stand_ins: StandIns, torchs) -> None:
    for visible, ranks in (("0,3,5", "3"), ("GPU-a", "1"), ("", "1"), ("2,-1,3", "1")):
        call = (SCRIPT, "train", "run.yaml")
        stand_ins.run(*call, FAKE_TORCH=torchs["flags"], CUDA_VISIBLE_DEVICES=visible)
        words = stand_ins.calls("torchrun")[-1][0]["words"]
        assert words[words.index("--nproc-per-node") + 1] == ranks, visible


def test_many_nodes_by_arguments_and_by_environment(stand_ins: StandIns, torchs) -> None:
    stand_ins.run(
        *(SCRIPT, "--nnodes", "10", "--nproc-per-node", "8", "--rdzv-endpoint", "node0:29500"),
        *("--rdzv-id", "job7", "--node-rank", "0", "--shutdown-timeout", "540", "train"),
        "run.yaml",
        FAKE_TORCH=torchs["flags"],
    )
    settings = {"NNODES": "10", "NPROC_PER_NODE": "8", "RDZV_ENDPOINT": "node0:29500"}
    settings |= {"RDZV_ID": "job7", "SLURM_NODEID": "3", "SHUTDOWN_TIMEOUT": "540"}
    stand_ins.run(SCRIPT, "train", "run.yaml", FAKE_TORCH=torchs["flags"], **settings)
    first, second = (call["words"] for [call] in stand_ins.calls("torchrun"))
    assert first == [
        *("--nnodes", "10", "--nproc-per-node", "8", "--max-restarts", "0"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "node0:29500", "--rdzv-id", "job7"),
        *("--rdzv-conf", "is_host=1", NEW[0], "--shutdown-timeout", "540"),
        *("-m", "taid_megatron", "train", "run.yaml"),
    ]
    assert second == ["is_host=0" if word == "is_host=1" else word for word in first]
    # on several nodes the loopback would not reach the others
    assert "GLOO_SOCKET_IFNAME" not in stand_ins.calls("torchrun")[0][0]["environment"]


@pytest.mark.parametrize(
    ("torch", "arguments", "received", "warned"),
    [
        ("flags", NEW, "SIGUSR1", False),
        ("variable", NEW[:1], "SIGUSR1", False),
        ("nothing", [], "SIGTERM", True),
    ],
)
def test_signals_and_shut_down_time_as_the_torch_has_them(
    stand_ins: StandIns, torchs, torch: str, arguments: list[str], received: str, warned: bool
) -> None:
    process = start_waiting(stand_ins, FAKE_TORCH=torchs[torch])
    os.killpg(process.pid, signal.SIGUSR1)
    _, said = process.communicate(timeout=30)
    assert ("30 s after a signal" in said) == warned, said
    words = stand_ins.calls("torchrun")[0][0]["words"]
    assert words[words.index("--standalone") + 1 : words.index("-m")] == arguments
    assert stand_ins.calls("signals") == [[[received]]]


def start_waiting(stand_ins: StandIns, **environment: str):
    """The script with a torchrun that waits for a signal, writes status 75 and ends with 1."""
    plan = {"train": {"wait": True, "status": {"exit_code": 75}, "code": 1}}
    process = stand_ins.start(
        SCRIPT,
        *("train", "run.yaml"),
        PLAN=json.dumps(plan),
        STATUS_FILE=str(stand_ins.folder / "run/run_status.json"),
        **environment,
    )
    while not stand_ins.calls("torchrun"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(0.1)  # from its note to its pause
    return process


@pytest.mark.parametrize(
    ("name", "send"),
    [
        ("SIGTERM", os.kill),
        ("SIGTERM", os.killpg),
        ("SIGINT", os.killpg),
        ("SIGHUP", os.killpg),
        ("SIGUSR1", os.killpg),
    ],
)
def test_a_signal_arrives_once_and_is_waited_for(
    stand_ins: StandIns, torchs, name: str, send
) -> None:
    process = start_waiting(stand_ins, FAKE_TORCH=torchs["flags"])
    send(process.pid, signal.Signals[name])
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert stand_ins.calls("signals") == [[[name]]]


def test_a_signal_before_the_ranks_are_started(stand_ins: StandIns, torchs) -> None:
    """Slurm sends it to the whole group: it ends what the script runs then, too."""
    call = (SCRIPT, "train", "run.yaml")
    code, said = stand_ins.run(*call, FAKE_TORCH=torchs["flags"], EARLY_SIGNAL="group")
    assert (code, stand_ins.calls("torchrun")) == (75, [])
    assert "SIGUSR1 before the ranks were started" in said


@pytest.mark.parametrize(
    ("torchrun", "before", "written", "expected"),
    [
        (0, None, None, 0),
        (1, None, None, 1),
        (1, None, {"exit_code": 75, "step": 3}, 75),
        (1, None, {"exit_code": 2}, 2),
        (0, None, {"exit_code": 0}, 0),
        # a rank died after the status was written
        (1, None, {"exit_code": 0}, 1),
        # still running when it died
        (1, None, {"exit_code": None}, 1),
        # left by the run before
        (0, {"exit_code": 75}, None, 0),
        (1, {"exit_code": 75}, None, 1),
        (1, {"exit_code": 2}, {"exit_code": 75}, 75),
        # written again with the same content
        (1, {"exit_code": 75}, {"exit_code": 75}, 75),
    ],
)
def test_exit_code(stand_ins: StandIns, torchs, torchrun, before, written, expected) -> None:
    status = stand_ins.folder / "run/run_status.json"
    if before is not None:
        status.write_text(json.dumps(before))
    plan = {"code": torchrun} | ({} if written is None else {"status": written})
    code, _ = stand_ins.run(
        *(SCRIPT, "train", "run.yaml"),
        PLAN=json.dumps({"train": plan}),
        STATUS_FILE=str(status),
        FAKE_TORCH=torchs["flags"],
    )
    assert code == expected


REFUSED = ["teacher.hf: no such folder", "rank 0 on alpha: teacher.hf: no such folder"]


@pytest.mark.parametrize(
    ("command", "plan", "expected"),
    [
        # before the run folder is taken, where a status of the run before lies
        ("train", {"code": 1, "refusals": REFUSED}, 2),
        # after that, by a rank that another one took for a failure
        ("train", {"code": 1, "refusals": REFUSED, "status": {"exit_code": 1}}, 2),
        ("train", {"code": 0, "refusals": REFUSED, "status": {"exit_code": 0}}, 0),
        ("doctor", {"code": 1, "refusals": REFUSED}, 2),
    ],
)
def test_what_a_rank_refuses_is_the_last_line_and_code_2(
    stand_ins: StandIns, torchs, command: str, plan: dict, expected: int
) -> None:
    status = stand_ins.folder / "run/run_status.json"
    status.write_text(json.dumps({"exit_code": 75}))
    code, said = stand_ins.run(
        *(SCRIPT, command, "run.yaml"),
        PLAN=json.dumps({command: plan}),
        STATUS_FILE=str(status),
        FAKE_TORCH=torchs["flags"],
        TMPDIR=str(stand_ins.folder),
    )
    assert (code, said) == (expected, f"torchrun.sh: {REFUSED[0]}\n" if expected else "")
    assert not [*stand_ins.folder.glob("tmp.*")]


def test_a_port_in_use(stand_ins: StandIns, torchs) -> None:
    """On the node of the endpoint alone: the others look for it there."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"localhost:{taken.getsockname()[1]}"
        call = (SCRIPT, "--nnodes", "2", "--rdzv-endpoint", endpoint)
        refused, said = stand_ins.run(
            *call, "--node-rank", "0", "train", "run.yaml", FAKE_TORCH=torchs["flags"]
        )
        other = stand_ins.run(
            *call, "--node-rank", "1", "train", "run.yaml", FAKE_TORCH=torchs["flags"]
        )
    assert refused == 2
    assert f"'{endpoint}': this node, number 0, cannot listen on that port" in said
    assert said.count("\n") == 1
    assert other == (0, "")
    assert len(stand_ins.calls("torchrun")) == 1


def test_other_commands_run_on_ranks_too(stand_ins: StandIns, torchs) -> None:
    plan = json.dumps({"doctor": {"code": 1}})
    call = (SCRIPT, "--nproc-per-node", "4", "doctor", "run.yaml", "--network")
    assert stand_ins.run(*call, PLAN=plan, FAKE_TORCH=torchs["flags"])[0] == 1
    words = stand_ins.calls("torchrun")[0][0]["words"]
    assert words[-4:] == ["taid_megatron", "doctor", "run.yaml", "--network"]


SHAPE = "{num_layers: 1, hidden_size: 8, num_attention_heads: 1, vocab_size: 10}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no command given"),
        (["train"], "no CONFIG.yaml"),
        (["--nodes", "2", "train", "run.yaml"], "unknown option '--nodes'"),
        (["--nnodes"], "--nnodes: a value is missing"),
        (["--nnodes", "2", "train", "run.yaml"], "2 nodes need HOST:PORT"),
        (["--nproc-per-node", "gpu", "train", "run.yaml"], "expected a whole number from 1 up"),
        (["train", "none.yaml"], "none.yaml: no such file"),
        (["train", "run.yaml", "training.stepz=2"], "training.stepz"),
        (
            ["train", "run.yaml", f"teacher={{architecture: {SHAPE}}}"],
            "architecture without weights",
        ),
    ],
)
def test_refusals(stand_ins: StandIns, torchs, arguments: list[str], said: str) -> None:
    code, text = stand_ins.run(SCRIPT, *arguments, FAKE_TORCH=torchs["flags"])
    assert code == 2
    assert said in text
    assert text.count("\n") == 1
    assert stand_ins.calls("torchrun") == []

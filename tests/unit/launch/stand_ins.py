"""Programs that stand in for srun, scontrol, apptainer and torchrun, and note how they were called.

srun knows the options that the scripts use and refuses others, as the real one would; its nodes are
processes of this machine. BLIND_NODE: the number of one that does not see the submitter's folder.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]

SRUN = r"""
import argparse, json, os, signal, subprocess, sys
parser = argparse.ArgumentParser(prog="srun", allow_abbrev=False)
for option in ("nodes", "ntasks", "ntasks-per-node", "kill-on-bad-exit", "wait"):
    parser.add_argument(f"--{option}", type=int)
for option in ("nodelist", "output", "open-mode", "container-image", "container-mounts",
               "container-workdir"):
    parser.add_argument(f"--{option}")
parser.add_argument("command", nargs=argparse.REMAINDER)
asked = parser.parse_args()
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(["srun", vars(asked), os.environ.get("SRUN_CPUS_PER_TASK")]) + "\n")
assert asked.nodes == asked.ntasks, "one task per node"
if os.environ.get("EARLY_SIGNAL") == "job" and "taid_megatron.config.value" in asked.command:
    os.kill(os.getsid(0), signal.SIGUSR1)
tasks = []
def forward(number, frame):
    for task in tasks:
        # as the real one: "forcing job termination"
        task.send_signal(signal.SIGKILL if number == signal.SIGTERM else number)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, forward)
for node in range(asked.ntasks):
    out = None
    if asked.output:
        out = open(asked.output.replace("%N", f"node{node}"), "a")
    tasks.append(subprocess.Popen(
        asked.command, stdout=out, stderr=out, start_new_session=True,
        cwd="/" if os.environ.get("BLIND_NODE") == str(node) else None,
        env={**os.environ, "SLURM_NODEID": str(node)},
    ))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

SCONTROL = r"""
import json, os, sys
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(["scontrol", *sys.argv[1:]]) + "\n")
match sys.argv[1:]:
    case ["show", "hostnames", nodes]:
        print("\n".join(nodes.split(",")))
    case ["show", "job", "--oneliner", job]:
        print(f"JobId={job} JobState={os.environ.get('JOB_STATE', 'RUNNING')} Reason=None")
    case ["show", "config"]:
        print("ProctrackType           =", os.environ.get("PROCTRACK", "proctrack/cgroup"))
    case ["requeue", job]:
        pass
    case _:
        sys.exit(f"scontrol: unknown call {sys.argv[1:]}")
"""

APPTAINER = r"""
import json, os, subprocess, sys
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(["apptainer", *sys.argv[1:]]) + "\n")
assert sys.argv[1:3] == ["exec", "--nv"] and sys.argv[3] == "--bind" and sys.argv[5] == "--pwd"
sys.exit(subprocess.run(sys.argv[8:]).returncode)
"""

# Real for the configuration; `-m torch.distributed.run` and the other commands are noted, and end
# as PLAN says, a JSON object per command: {"code", "status" (written to STATUS_FILE), "refusals"
# (of its ranks), "wait" (for a signal)}.
PYTHON = r"""
import json, os, signal, subprocess, sys, zlib
words = sys.argv[1:]
if words[0] == "-c" or words[1] == "taid_megatron.config.value":
    if os.environ.get("EARLY_SIGNAL") == "group" and words[0] == "-m":
        os.killpg(os.getsid(0), signal.SIGUSR1)  # this process and the script
        signal.pause()
    if "find_spec" in words[1] and os.environ.get("FAKE_TORCH"):
        print(os.environ["FAKE_TORCH"])
        sys.exit()
    if words[0] == "-c":
        os.execv(sys.executable, [sys.executable, *words])
    # a third of a second each: once per configuration is enough
    asked = repr([os.path.exists(words[2]), *words])
    known = os.path.join(os.environ["ANSWERS"], str(zlib.crc32(asked.encode())))
    if not os.path.exists(known):
        done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE)
        if done.returncode:
            sys.exit(done.returncode)
        with open(known + str(os.getpid()), "wb") as answer:
            answer.write(done.stdout)
        os.rename(answer.name, known)
    sys.exit(print(open(known).read(), end=""))
assert words[0] == "-m"
by_torchrun = words[1] == "torch.distributed.run"
command = words[len(words) - words[::-1].index("taid_megatron") if by_torchrun else 2]
kept = ("CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
note = {"words": words[2:], "environment": {k: os.environ[k] for k in kept if k in os.environ}}
plan = json.loads(os.environ.get("PLAN", "{}")).get(command, {})
if not by_torchrun:
    plan = {"code": plan.get("missing", 0)} if "--help" in words else plan
seen = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    # a stand-in for an old torchrun would leave SIGUSR1 ignored
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, lambda number, frame: seen.append(signal.Signals(number).name))
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(["torchrun" if by_torchrun else "command", note]) + "\n")
if by_torchrun and plan.get("wait"):
    signal.pause()
    signal.sigtimedwait([], 0.3)  # a signal that comes twice comes now
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(json.dumps(["signals", seen]) + "\n")
if by_torchrun and "status" in plan:
    with open(os.environ["STATUS_FILE"], "w") as status:
        json.dump(plan["status"], status)
if by_torchrun and "refusals" in plan:
    with open(os.environ["TAID_REFUSALS"], "a") as refusals:
        refusals.write("".join(line + "\n" for line in plan["refusals"]))
sys.exit(plan.get("code", 0))
"""


class StandIns:
    """The programs in a folder of their own, and what they noted."""

    def __init__(self, folder: Path, answers: Path) -> None:
        """answers: where values of configurations are kept for the tests that follow."""
        self.folder = folder
        self.answers = answers
        self.calls_file = folder / "calls.jsonl"
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name, text in (
            ("srun", SRUN),
            ("scontrol", SCONTROL),
            ("apptainer", APPTAINER),
            ("python", PYTHON),
        ):
            script, path = folder / f"{name}.py", self.bin / name
            script.write_text(text)
            # not as its first line: that takes no path with a space
            line = shlex.join([sys.executable, "-SE", str(script)])
            path.write_text(f'#!/bin/sh\nexec {line} "$@"\n')
            path.chmod(0o755)

    def environment(self, **more: str) -> dict[str, str]:
        clean = {
            name: text
            for name, text in os.environ.items()
            if not name.startswith(("SLURM_", "OMP_", "GLOO_", "CUDA_"))
        }
        return {
            **clean,
            "PATH": f"{self.bin}:{clean['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHON": str(self.bin / "python"),
            "CALLS": str(self.calls_file),
            "ANSWERS": str(self.answers),
            **more,
        }

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", *command],
            cwd=self.folder,
            env=self.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, **environment: str) -> tuple[int, str]:
        """Exit code and everything it said."""
        process = self.start(*command, **environment)
        out, err = process.communicate(timeout=300)
        return process.returncode, out + err

    def calls(self, program: str) -> list[Any]:
        if not self.calls_file.exists():
            return []
        lines = [json.loads(line) for line in self.calls_file.read_text().splitlines()]
        return [line[1:] for line in lines if line[0] == program]

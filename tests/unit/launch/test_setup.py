"""launch/setup.sh on machines that lack something: one line that says how to mend it, exit code 2.

The interpreters are shell scripts that answer as a Python in that state would.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .stand_ins import ROOT

PYTHON = """#!/bin/bash
case "$*" in
--version) echo "Python 3.11.9" ;;
*sys.version_info*) exit ${UNFIT:-0} ;;
*"import ensurepip, venv"*) exit ${NO_VENV:-0} ;;
"-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
"-m pip --version") ;;
"-m pip install"*) echo "$*" >>"$CALLS"; echo "$PIP_SAYS"; exit ${PIP:-0} ;;
"- "*) exit ${OLD_PIP:-0} ;;
*) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""
TOOLS = "bash cat chmod cksum cp cut dirname grep head mkdir rm sed".split()


class Project:
    """A folder that has the script and a pyproject.toml, and a PATH with few programs on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "a project"
        self.programs = folder / "programs"
        self.calls = folder / "calls"
        (self.folder / "launch").mkdir(parents=True)
        self.programs.mkdir()
        shutil.copy(ROOT / "launch/setup.sh", self.folder / "launch")
        shutil.copy(ROOT / "pyproject.toml", self.folder)
        for name in TOOLS:
            found = shutil.which(name)
            assert found, name
            (self.programs / name).symlink_to(found)

    def add_python(self, name: str = "python3") -> Path:
        path = self.programs / name
        path.write_text(PYTHON)
        path.chmod(0o755)
        return path

    def set_up(
        self, *arguments: str, before: Callable[[], None] | None = None, **settings: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.folder / "launch/setup.sh"), *arguments],
            env={"PATH": str(self.programs), "CALLS": str(self.calls), **settings},
            preexec_fn=before,
            capture_output=True,
            text=True,
            check=False,
        )

    def installs(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_installs_once(project: Project) -> None:
    project.add_python()
    assert project.set_up().returncode == 0
    assert [line.rsplit("/", 1)[-1] for line in project.installs()] == ["a project"]
    assert project.set_up().returncode == 0
    assert len(project.installs()) == 1
    assert project.set_up("--test").returncode == 0
    assert project.installs()[1].endswith("a project[test]")
    # what the tests need has all that a run needs
    assert project.set_up().returncode == 0
    assert len(project.installs()) == 2


def test_goes_on_after_a_kill_while_pip_works(project: Project) -> None:
    project.add_python()
    assert project.set_up(PIP="137").returncode == 2
    # a pip that was killed with the script leaves its mark; half a package must not stay
    (project.folder / ".venv/.unfinished").touch()
    half = project.folder / ".venv/half"
    half.touch()
    python = project.add_python()
    python.write_text(PYTHON.replace("mkdir -p", 'rm -rf "${@: -1}"; mkdir -p'))
    assert project.set_up().returncode == 0
    assert not half.exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"NO_VENV": "1"}, "python3 has no venv module; install it"),
        ({"UNFIT": "1"}, "found Python 3.11.9, but Python 3.10 to 3.13 is needed"),
        (
            {"OLD_PIP": "1", "PIP": "1", "PIP_SAYS": "ERROR: No matching distribution"},
            "pip is older than 21.3 and could not be upgraded: No matching distribution",
        ),
        (
            {"PIP": "1", "PIP_SAYS": "ERROR: [Errno 28] No space left on device"},
            "pip failed: [Errno 28] No space left on device",
        ),
    ],
    ids=["no venv", "other python", "old pip", "full disk while pip writes"],
)
def test_one_line_and_exit_code_2(project: Project, settings: dict[str, str], said: str) -> None:
    project.add_python()
    done = project.set_up(**settings)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert last.startswith(f"setup: {said}")
    assert done.stdout == ""
    # the next call, on a mended machine, goes through
    assert project.set_up().returncode == 0


def test_an_old_pip_is_upgraded(project: Project) -> None:
    project.add_python()
    assert project.set_up(OLD_PIP="1").returncode == 0
    assert [line.split()[-1].split("/")[-1] for line in project.installs()] == ["pip", "project"]


def test_no_python_at_all(project: Project) -> None:
    done = project.set_up()
    assert done.returncode == 2
    assert done.stderr == (
        "setup: no Python on the PATH; install Python 3.10 to 3.13, or set PYTHON=/path/to/python\n"
    )


def test_the_python_that_was_asked_for(project: Project) -> None:
    done = project.set_up(PYTHON=str(project.add_python("other")), UNFIT="1")
    assert done.returncode == 2
    assert "other is not a Python 3.10 to 3.13; set another, or unset it" in done.stderr


def test_a_full_disk_while_the_environment_is_made(project: Project) -> None:
    """With the real venv module, and files that may not grow beyond 4 KiB."""

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    done = project.set_up(PYTHON=sys.executable, before=small_files)
    assert done.returncode == 2
    assert "could not make" in done.stderr.splitlines()[-1]
    assert "is the disk full" in done.stderr.splitlines()[-1]


@pytest.fixture
def read_only() -> Iterator[Project]:
    """Outside of pytest's folders, which another user cannot enter; root could write to it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        project = Project(folder)
        project.add_python()
        project.folder.chmod(0o555)
        yield project
        project.folder.chmod(0o755)


def test_a_folder_that_cannot_be_written_to(read_only: Project) -> None:
    def as_somebody_else() -> None:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)

    done = read_only.set_up(before=as_somebody_else)
    assert done.returncode == 2
    assert done.stderr.startswith("setup: cannot write to ")
    assert "make the folder writable, or copy the project elsewhere" in done.stderr
    assert len(done.stderr.splitlines()) == 1

"""docker/Dockerfile.cpu carried out without a Docker engine: marker `slow`, by hand, as root.

    TORCH_INDEX=ADDRESS_OF_AN_INDEX \\
        python -m pytest -m slow tests/unit/launch/test_image_steps.py

Every stage is a copy-on-write view of this machine (a Debian with /usr/bin/python3) in place of the
base image, in a mount namespace of its own: nothing on the machine changes, and all of it is gone
at the end. RUN steps run in a chroot as they are written, the rest as Docker would do it. It needs
2.5 GB of memory, a package index and Debian's mirrors. TORCH_INDEX: in place of the file's.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .stand_ins import ROOT
from .test_images import sent, stages

pytestmark = pytest.mark.slow

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
FROM_HERE = ("PIP_", "SSL_", "http_proxy", "https_proxy", "no_proxy")
MOUNT = """
mkdir -p {stage}/top {stage}/work {stage}/root
mount -t overlay overlay -o lowerdir=/,upperdir={stage}/top,workdir={stage}/work {stage}/root
mount --rbind /dev {stage}/root/dev
mount --rbind /proc {stage}/root/proc
"""


def context(folder: Path) -> Path:
    """What Docker would get to see of the project."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in filter(sent, listed.stdout.splitlines()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


class Build:
    """Shell lines that carry out the stages one after the other."""

    def __init__(self, folder: Path, sources: Path) -> None:
        self.folder, self.sources = folder, sources
        self.values = {"PATH": SYSTEM_PATH, "HOME": "/root"}
        self.values |= {k: v for k, v in os.environ.items() if k.startswith(FROM_HERE)}
        self.where, self.user = "/", ""

    def stage(self, name: str, instructions: list[tuple[str, str]]) -> Iterator[str]:
        stage = self.folder / name
        root = stage / "root"
        yield MOUNT.format(stage=stage)
        for word, text in instructions:
            if word in ("ARG", "ENV"):
                key, _, value = text.partition("=")
                given = os.environ.get(key) if word == "ARG" else None
                value = self._filled(value.strip('"')) if given is None else given
                self.values[key] = value
            elif word == "WORKDIR":
                self.where = text
                yield f"mkdir -p {root}{text}"
            elif word == "COPY":
                yield from self._copy(root, *text.split())
            elif word == "RUN":
                yield self._inside(root, ["sh", "-c", text])
            elif word == "USER":
                self.user = self._filled(text)
            elif word in ("HEALTHCHECK", "CMD"):
                command = json.loads(text[text.index("[") :])
                yield f"echo '--- {word}'; " + self._inside(root, command)

    def _filled(self, text: str) -> str:
        return re.sub(r"\$\{(\w+)\}", lambda found: self.values[found[1]], text)

    def _copy(self, root: Path, *words: str) -> Iterator[str]:
        *options, source, target = words
        start = self.folder / options[0].partition("=")[2] / "root" if options else self.sources
        yield f"mkdir -p $(dirname {root}{target})"
        yield f"cp -a {start}/{source.lstrip('/')} {root}{target}"

    def _inside(self, root: Path, command: list[str]) -> str:
        given = [f"{key}={value}" for key, value in self.values.items()]
        if self.user:
            command = [
                *("setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups"),
                *command,
            ]
        line = ["chroot", str(root), "env", "-i", *given, "env", "-C", self.where, *command]
        return shlex.join(line)


def test_the_cpu_image_builds_and_answers(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.fail("mounts need root; see the head of this file")
    _, first, last = stages("Dockerfile.cpu")
    layers = tmp_path / "layers"
    layers.mkdir()
    build = Build(layers, context(tmp_path / "context"))
    lines = ["set -e", f"mount -t tmpfs none {layers}"]
    lines += build.stage("build", first)
    build.values.pop("TORCH_INDEX")
    lines += build.stage("final", last)
    # a run's folder is the user's, the programs are not
    root = layers / "final/root"
    lines.append(
        build._inside(root, ["sh", "-c", "touch /work/mine && ! touch /opt/venv/not_mine"])
    )
    lines.append("echo '--- all of it'")
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", "\n".join(lines)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    steps, health, rest = re.split(r"^--- (?:HEALTHCHECK|CMD)$", done.stdout, flags=re.MULTILINE)
    assert "Successfully installed" in steps
    assert re.search(r"native kernel|C\+\+ compiler", health)
    assert re.search(r"torch +│ ok", health)
    assert "Usage: taid-megatron" in rest
    assert rest.rstrip().endswith("--- all of it")

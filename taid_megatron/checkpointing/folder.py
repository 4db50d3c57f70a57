"""The folder of checkpoints: names, the newest, the pointer, what is kept, what is left over.

    checkpoints/
        step_00000100/     published: complete, never written again
        step_00000200_2/   step 200 a second time, after a resume from before it
        latest             which was published last: its name and its manifest's hash
        .unfinished_*, .deleting_*   what a killed process left; the next save removes them

Nothing here needs torch.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.manifest import sync_path, write_atomically
from taid_megatron.checkpointing.manifest import own_hash, problem, problems
from taid_megatron.config.errors import UserError
from taid_megatron.runtime.log import get_logger

STATE_FILE = "state.json"
POINTER = "latest"
_NAME = re.compile(r"step_(\d{8,})(?:_([2-9]|[1-9]\d+))?")
_UNFINISHED, _DELETING = ".unfinished_", ".deleting_"


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint."""

    path: Path
    step: int
    attempt: int = 1
    """Above 1 where the step had been saved before."""

    def state(self) -> dict[str, Any]:
        """The content of state.json. Raises UserError where it cannot be read."""
        path = self.path / STATE_FILE
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error}; use another checkpoint") from error


def named(path: Path) -> Checkpoint | None:
    """The checkpoint of that folder; None where it is none."""
    match = _NAME.fullmatch(path.name)
    if match is None or not path.is_dir():
        return None
    return Checkpoint(path, int(match[1]), int(match[2] or 1))


def published(folder: Path) -> list[Checkpoint]:
    """All checkpoints of a `checkpoints` folder, the newest first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [checkpoint for path in paths if (checkpoint := named(path))]
    return sorted(found, key=lambda found: (found.step, found.attempt), reverse=True)


def find(path: Path) -> Checkpoint:
    """The checkpoint that a user names: its folder, or a run's (then the newest that is sound).

    Raises UserError where there is none. No shard is read.
    """
    if checkpoint := named(path):
        return checkpoint
    for folder in (path / "checkpoints", path):
        if found := published(folder):
            faults = []
            for checkpoint in found:
                fault = problem(checkpoint.path, full=False)
                if fault is None:
                    return checkpoint
                get_logger().warning(f"checkpoint passed over: {fault}")
                faults.append(fault)
            raise UserError(f"no sound checkpoint in {folder}; the newest: {faults[0]}")
    raise _none_there(path)


def examine(path: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every checkpoint that a user names (one, or all of a run), and all that is wrong with it.

    Every byte is read. The pointer comes last, where it is damaged. Raises UserError where there
    is no checkpoint.
    """
    folders = [folder for folder in (path / "checkpoints", path) if published(folder)]
    alone = named(path)
    if not folders and alone is None:
        raise _none_there(path)
    found = [alone] if alone else published(folders[0])
    for checkpoint in found:
        yield checkpoint.path, list(problems(checkpoint.path, full=True))
    if alone is None and (fault := pointer_problem(folders[0])):
        yield folders[0] / POINTER, [fault]


def _none_there(path: Path) -> UserError:
    return UserError(
        f"{path}: no checkpoint there; name a step_* folder, or a run folder that has one"
    )


def newest(folder: Path) -> Checkpoint | None:
    """The checkpoint with the highest step in a `checkpoints` folder, not looked into."""
    return next(iter(published(folder)), None)


def free_name(folder: Path, step: int) -> str:
    """A name that no published checkpoint has: step_<step>, or with _2, _3, ..."""
    attempts = [found.attempt for found in published(folder) if found.step == step]
    return f"step_{step:08d}" + (f"_{max(attempts) + 1}" if attempts else "")


def begin(folder: Path, name: str) -> Path:
    """An empty folder to write in, its name temporary; what a killed process left is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in (_UNFINISHED, _DELETING):
        for leftover in folder.glob(f"{kind}*"):
            shutil.rmtree(leftover)
    unfinished = folder / f"{_UNFINISHED}{name}"
    unfinished.mkdir()
    return unfinished


def publish(unfinished: Path, name: str, manifest_hash: str) -> Path:
    """Give a complete, synced folder its name, then move the pointer to it."""
    folder, final = unfinished.parent, unfinished.parent / name
    if final.exists():
        raise UserError(
            f"{final}: appeared while it was being saved; does another run use the folder?"
        )
    unfinished.rename(final)
    sync_path(folder)
    content = {"checkpoint": name, "manifest": manifest_hash}
    write_atomically(folder / POINTER, json.dumps(content).encode())
    return final


def pointer_problem(folder: Path) -> str | None:
    """What is wrong with the pointer, in words; None where it fits a checkpoint that is there.

    The checkpoints themselves say which is the newest. So a pointer that lags behind, or is not
    there, is none: a process killed before it was written, or a copied checkpoint.
    """
    path = folder / POINTER
    try:
        content = json.loads(path.read_bytes())
        name, expected = content["checkpoint"], content["manifest"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path}: damaged, it names no checkpoint"
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not (folder / name).is_dir():
        return f"{path}: names {name!r}, which is not there"
    if own_hash(folder / name) != expected:
        return f"{path}: does not fit the manifest of {name}"
    return None


def remove_old(
    folder: Path, saved: Path, *, keep: int | None, keep_every: int | None, in_use: Path | None
) -> list[Path]:
    """Delete all but the last `keep` up to the one just saved; returns what went.

    Kept whatever their age: multiples of keep_every steps, in_use (the one resumed from), and
    those beyond the saved step, which a fall-back left behind. keep: None keeps all.
    """
    current = named(saved)
    if keep is None or current is None:
        return []
    last = (current.step, current.attempt)
    past = [found for found in published(folder) if (found.step, found.attempt) <= last]
    removed = []
    for old in past[keep:]:
        if old.path == in_use or (keep_every and old.step % keep_every == 0):
            continue
        # renamed first: a folder named step_* is whole, also when this is killed
        doomed = folder / f"{_DELETING}{old.path.name}"
        old.path.rename(doomed)
        shutil.rmtree(doomed)
        removed.append(old.path)
    return removed

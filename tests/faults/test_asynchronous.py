"""Asynchronous saves: the bytes of a blocking one; a writer that dies or hangs is noticed."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest

from taid_megatron.checkpointing import folder as folders
from taid_megatron.checkpointing import manifest, store, writer
from taid_megatron.config.errors import UserError
from taid_megatron.config.load import load
from taid_megatron.runtime.random_state import get_random_state
from taid_megatron.training import loop

from ..distributed import toy
from ..distributed.ranks import RankFailure, run_ranks

ASYNCHRONOUS = ("checkpoint.every=2", "checkpoint.asynchronous=true", "training.steps=6")
START = writer._START


def _files(folder: Path) -> dict[str, Any]:
    """Contents by name. `.metadata` has the folder's name in it, and the manifest its hash."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.name not in (".metadata", manifest.MANIFEST)
    }


def _begin(trainer: Any, folder: Path, step: int, timeout: float | None) -> store.PendingSave:
    return store.begin(
        *(folder, step),
        stages=trainer.students,
        optimizer=trainer.optimizer,
        random_state=get_random_state(),
        state={"some": "state"},
        writer_timeout=timeout,
    )


def _twice(rank: int, size: int, config: str, folder: str) -> list[str]:
    with toy.trainer(config, "parallel.tensor=2") as trainer:
        _begin(trainer, Path(folder) / "blocking", 1, None).complete()
        saving = _begin(trainer, Path(folder) / "beside", 1, 60.0)
        for parameter in trainer.students[0].parameters():  # training goes on at once
            parameter.data.zero_()
        return [path.name for path in saving.complete().iterdir()]


def test_its_bytes_are_a_blocking_saves(config, tmp_path) -> None:
    names, _ = run_ranks(2, _twice, str(config), str(tmp_path))
    one, other = (tmp_path / name / "step_00000001" for name in ("blocking", "beside"))
    assert _files(one) == _files(other)
    assert sum(name.endswith(".distcp") for name in names) == 4  # two of each rank
    listed = [json.loads((path / manifest.MANIFEST).read_text())["files"] for path in (one, other)]
    for files in listed:
        assert files.pop(".metadata")
    assert listed[0] == listed[1]
    assert manifest.problem(other, full=True) is None


# Run in a rank and in its writer: what comes to the disk and what gets its name, in order.
RECORDING = """
import os, pathlib
def record(owner, name, path_of):
    function = getattr(owner, name)
    def recording(*args):
        function(*args)
        with open(LOG, "a") as log:
            log.write(f"{name} {pathlib.Path(path_of(args)).relative_to(ROOT)}\\n")
    setattr(owner, name, recording)
record(os, "fsync", lambda args: os.readlink(f"/proc/self/fd/{args[0]}"))
record(pathlib.Path, "rename", lambda args: args[1])
record(pathlib.Path, "replace", lambda args: args[1])
"""


def _recorded(rank: int, size: int, config: str, folder: str) -> list[list[str]]:
    log = Path(folder) / "log"
    where = f"LOG, ROOT = {str(log)!r}, {folder!r}\n" + RECORDING
    exec(where, {})
    writer._START = where + START
    found = []
    with toy.trainer(config) as trainer:
        for timeout in (None, 60.0):
            saved = _begin(trainer, Path(folder) / "all", 1, timeout).complete()
            found.append([log.read_text().splitlines(), sorted(os.listdir(saved))])
            log.unlink()
    return found


def test_everything_is_on_the_disk_before_it_has_its_name(config, tmp_path) -> None:
    (found,) = run_ranks(1, _recorded, str(config), str(tmp_path))
    for (events, names), final in zip(found, ("step_00000001", "step_00000001_2"), strict=True):
        published = events.index(f"rename all/{final}")
        unfinished = f"all/.unfinished_{final}"
        synced = events[:published]
        assert synced[-1] == f"fsync {unfinished}"
        assert {f"fsync {unfinished}/{name}" for name in names} <= set(synced)
        after = events[published + 1 :]
        assert after[0] == "fsync all"
        assert after[1].startswith("fsync all/latest.tmp-")
        assert after[2:] == ["replace all/latest", "fsync all"]


def test_a_run_saves_while_it_trains(config, straight, tmp_path, capfd) -> None:
    toy.train(config, tmp_path, 1, *ASYNCHRONOUS, save=True)
    for step in (2, 4, 6):
        name = f"checkpoints/step_0000000{step}"
        ours, theirs = _files(tmp_path / name), _files(straight / name)
        states = [json.loads(files.pop("state.json")) for files in (ours, theirs)]
        assert ours == theirs
        for state in states:
            assert state.pop("config")["checkpoint"]["every"] == 2
        assert states[0] == states[1]
        assert {"taid-megatron", "torch", "megatron-core"} <= set(states[0]["versions"])
    assert not list((tmp_path / "checkpoints").glob(".*"))
    said = capfd.readouterr().out.splitlines()
    saved = [line.split("/")[-1] for line in said if line.startswith("checkpoint: ")]
    assert saved == ["step_00000002", "step_00000004", "step_00000006"]


# Programs in the writer's place.
ASLEEP = "import time; time.sleep(120)"
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); " + START
STOPPED = (
    "import os, signal; from taid_megatron.checkpointing import writer; "
    "writer._copy = lambda *file: os.kill(os.getpid(), signal.SIGSTOP); " + START
)
NO_SYNC = "import os; os.fsync = lambda file: os.read(-1, 1); " + START
NO_HASH = "import os, xxhash; xxhash.xxh3_128 = lambda: os.read(-1, 1); " + START
SLOW = "import time; time.sleep(1.0); " + START


def _faults(rank: int, size: int, config: str, folder: str) -> list[Any]:
    told: list[Any] = []
    path = Path(folder)
    with toy.trainer(config, "parallel.tensor=2") as trainer:
        for step, (program, hit) in enumerate(
            [(ASLEEP, signal.SIGKILL), (ASLEEP, signal.SIGSTOP), (FULL, None)], start=1
        ):
            writer._START = program if rank == 1 else START
            saving = _begin(trainer, path, step, 2.0 if hit == signal.SIGSTOP else 60.0)
            process = saving._part._process
            if rank == 1 and hit:
                os.kill(process.pid, hit)
            try:
                saving.wait()
            except Exception as error:
                told.append((type(error), str(error)))
            told.append((process.poll() is not None, [each.name for each in path.iterdir()]))
        writer._START = START
        told += _failing(rank, trainer, path)
        python = sys.executable
        sys.executable = "/nowhere" if rank == 1 else python
        saving = _begin(trainer, path, 4, 60.0)
        sys.executable = python
        with pytest.raises(writer.WriterError, match=r"on rank 1 .*'/nowhere'"):
            saving.wait()
        told.append(_begin(trainer, path, 4, 60.0).complete().name)
    return told


def _failing(rank: int, trainer: Any, path: Path) -> list[str]:
    """What is told where rank 1's files cannot be synced, or not be hashed, which goes on beside:
    by the writer, and in a blocking save."""

    def fail(*args: Any) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    told = []
    for program in (NO_SYNC, NO_HASH):
        writer._START = program if rank == 1 else START
        saving = _begin(trainer, path, 4, 60.0)
        writer._START = START
        with pytest.raises(writer.WriterError) as caught:
            saving.wait()
        told.append(str(caught.value))
    for module, name in ((os, "fsync"), (manifest, "hash_file")):
        saving = _begin(trainer, path, 4, None)
        with pytest.MonkeyPatch.context() as patched:
            if rank == 1:
                patched.setattr(module, name, fail)
            with pytest.raises(writer.WriterError) as caught:
                saving.wait()
        told.append(str(caught.value))
    assert not list(path.iterdir())
    return told


def test_a_dead_a_stuck_and_a_full_writer_end_it_on_all_ranks(config, tmp_path) -> None:
    """Rank 1's alone (then files that cannot be synced or hashed, at last a writer that does not
    start); the other one hears of it. Nothing is left, and the next save works."""
    first, second = run_ranks(2, _faults, str(config), str(tmp_path))
    (killed, after), (stuck, _), (full, _) = (first[at : at + 2] for at in (0, 2, 4))
    assert killed[0] is writer.WriterError
    assert "step 1 was not saved, on rank 1 its writer, process" in killed[1]
    assert "died (SIGKILL)" in killed[1]
    assert stuck[0] is writer.WriterError
    assert "on rank 1 its writer, process" in stuck[1]
    assert "has not finished within 2 s" in stuck[1]
    assert "checkpoint.writer_timeout" in stuck[1]
    assert full[0] is UserError
    assert "the disk is full, step 3 was not saved" in full[1]
    for told in (first, second):
        assert told[:5:2] == [killed, stuck, full]
        assert told[1:6:2] == [(True, [])] * 3  # no process, no debris
        for text in told[6:8]:
            assert re.search(r"step 4 was not saved, on rank 1 .*Bad file.*\.distcp'", text)
        for text in told[8:10]:
            assert re.search(r"step 4 was not saved, on rank 1 .*Input/output.*\.distcp'", text)
        assert told[10] == "step_00000004"


def _killed(rank: int, size: int, config: str, folder: str) -> None:
    with toy.trainer(config) as trainer:
        writer._START = STOPPED
        pid = _begin(trainer, Path(folder), 1, 60.0)._part._process.pid
        while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.02)
        (Path(folder) / "pid").write_text(str(pid))
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_writer_dies_with_its_rank_even_where_it_is_stopped(config, tmp_path) -> None:
    with pytest.raises(RankFailure):
        run_ranks(1, _killed, str(config), str(tmp_path))
    pid, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    else:
        assert not psutil.pid_exists(pid)
    assert store.newest(tmp_path) is None


def _signalled(rank: int, size: int, config: str, overrides: list[str]) -> int:
    writer._START = SLOW
    step, calls = loop._optimizer_step, []

    def disturbed(*args: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:  # the save after step 2 is under way
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    loop._optimizer_step = disturbed
    return loop.run(load(config, overrides))


def test_a_signal_finishes_the_save_under_way_first(config, tmp_path) -> None:
    overrides = [f"run.folder={tmp_path}", *ASYNCHRONOUS]
    assert run_ranks(1, _signalled, str(config), overrides) == [75]
    found = folders.published(tmp_path / "checkpoints")
    assert [checkpoint.step for checkpoint in found] == [3, 2]
    for checkpoint in found:
        assert manifest.problem(checkpoint.path, full=True) is None
    assert not list((tmp_path / "checkpoints").glob(".*"))

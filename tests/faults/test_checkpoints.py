"""A damaged checkpoint is found, named and passed over; a published one is never touched."""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from taid_megatron import cli
from taid_megatron.checkpointing import folder as folders
from taid_megatron.checkpointing import manifest, store
from taid_megatron.config.errors import UserError
from taid_megatron.planning import doctor
from taid_megatron.runtime.random_state import get_random_state

from ..distributed import toy
from ..distributed.ranks import run_ranks


def flip(path: Path, seed: int) -> None:
    content = bytearray(path.read_bytes())
    place = random.Random(seed).randrange(len(content))
    content[place] ^= 1 << (seed % 8)
    path.write_bytes(content)


def cut(path: Path, seed: int) -> None:
    os.truncate(path, random.Random(seed).randrange(1, path.stat().st_size))


def empty(path: Path, seed: int) -> None:
    path.write_bytes(b"")


def remove(path: Path, seed: int) -> None:
    path.unlink()


DAMAGES = [flip, cut, empty, remove]


def hashes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


PLACES = 100


@contextmanager
def damaged(path: Path, damage: Callable[[Path, int], None], seed: int) -> Iterator[None]:
    """The file damaged at a place that the seed decides, and then as it was."""
    content = path.read_bytes()
    damage(path, seed)
    try:
        yield
    finally:
        path.write_bytes(content)


def test_damage_of_any_file_at_any_place_is_found_and_named(straight, tmp_path) -> None:
    """Flips and cuts at 100 seeded places of each kind of file; emptied, removed: every file."""
    copy = shutil.copytree(straight / "checkpoints" / "step_00000006", tmp_path / "step_00000006")
    assert manifest.problem(copy, full=True) is None
    names = sorted(path.name for path in copy.iterdir())
    kinds = {".metadata", "common.pt", "manifest.json", "metadata.json", "state.json"}
    assert kinds == {name for name in names if not name.endswith(".distcp")}
    found = 0
    for number, name in enumerate(names):
        for damage in DAMAGES:
            for place in range(PLACES if damage in (flip, cut) else 1):
                with damaged(copy / name, damage, PLACES * number + place):
                    faults = list(manifest.problems(copy, full=True))
                    assert len(faults) == 1, (name, damage, place)
                    assert str(copy / name) in faults[0]
                    if damage is not flip or not name.endswith(".distcp"):
                        assert manifest.problem(copy, full=False) == faults[0]
                    found += 1
    assert found == len(names) * (2 * PLACES + 2)
    assert manifest.problem(copy, full=True) is None


def test_damage_of_the_pointer_at_any_place_is_found_and_named(straight, tmp_path) -> None:
    folder = shutil.copytree(straight / "checkpoints", tmp_path / "checkpoints")
    pointer = folder / folders.POINTER
    for damage in (flip, cut, empty):
        for place in range(PLACES):
            with damaged(pointer, damage, place):
                fault = folders.pointer_problem(folder)
                assert fault is not None, (damage, place)
                assert str(pointer) in fault
    assert folders.pointer_problem(folder) is None


def test_the_doctor_reads_every_checkpoint_whole(straight, tmp_path, capsys) -> None:
    folder = shutil.copytree(straight / "checkpoints", tmp_path / "checkpoints")
    assert cli.main(["doctor", "--checkpoint", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert all(f"step_0000000{step}" in said for step in (2, 4, 6))
    assert "megatron-core" not in said  # the checkpoints alone
    flip(folder / "step_00000004/__0_0.distcp", 1)
    remove(folder / "step_00000004/state.json", 1)
    empty(folder / "latest", 1)
    rows = [(row.what, row.state, row.found) for row in doctor.checkpoints(tmp_path)]
    assert [row[:2] for row in rows if row[1] == "ok"] == [
        ("step_00000006", "ok"),
        ("step_00000002", "ok"),
    ]
    assert {(*row[:2], row[2].split(": ")[-1]) for row in rows if row[1] != "ok"} == {
        ("step_00000004", "FAIL", "its content is not what was saved (another hash)"),
        ("step_00000004", "FAIL", "missing"),
        ("latest", "FAIL", "damaged, it names no checkpoint"),
    }
    assert cli.main(["doctor", "--checkpoint", str(tmp_path)]) == 2
    assert cli.main(["doctor", "--checkpoint", str(folder / "step_00000006")]) == 0
    capsys.readouterr()
    assert cli.main(["doctor", "--checkpoint", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no checkpoint there" in capsys.readouterr().err


def test_a_file_too_many_is_found(straight, tmp_path) -> None:
    copy = shutil.copytree(straight / "checkpoints" / "step_00000006", tmp_path / "step_00000006")
    (copy / "__9_0.distcp").write_bytes(b"of another save")
    assert "__9_0.distcp: not in the manifest" in str(manifest.problem(copy, full=False))


def _chosen(rank: int, size: int, cases: list[tuple[str, str, bool]]) -> list[Any]:
    found: list[Any] = []
    for folder, verify, strict in cases:
        try:
            checkpoint, faults = store.choose(Path(folder), verify=verify, strict=strict)
            found.append((checkpoint.path.name if checkpoint else None, faults))
        except UserError as error:
            found.append(str(error))
    return found


def test_the_newest_sound_one_is_chosen_alike_on_all_ranks(straight, tmp_path, capfd) -> None:
    def copy(name: str, *damages: tuple[Callable, str]) -> str:
        folder = shutil.copytree(straight / "checkpoints", tmp_path / name)
        for damage, path in damages:
            damage(folder / path, 1)
        return str(folder)

    shard = next((straight / "checkpoints/step_00000006").glob("*.distcp")).name
    flipped = copy("flipped", (flip, f"step_00000006/{shard}"))
    short = copy("short", (cut, f"step_00000006/{shard}"), (empty, "step_00000004/state.json"))
    pointers = [copy(f"p{damage.__name__}", (damage, "latest")) for damage in (flip, cut, empty)]
    no_pointer = copy("no_pointer", (remove, "latest"))
    dead = copy("dead", *[(remove, f"step_0000000{n}/manifest.json") for n in (2, 4, 6)])
    cases = [
        (copy("sound"), "full", True),
        (str(tmp_path / "nowhere"), "full", True),
        (flipped, "full", False),
        (flipped, "full", True),
        (short, "fast", False),
        (dead, "fast", False),
        (no_pointer, "fast", True),
        *[(pointer, "fast", False) for pointer in pointers],
        *[(pointer, "fast", True) for pointer in pointers],
    ]
    first, second = run_ranks(2, _chosen, cases)
    assert first == second
    assert first[0] == ("step_00000006", [])
    assert first[1] == (None, [])
    name, (fault,) = first[2]
    assert name == "step_00000004"
    assert shard in fault
    assert "another hash" in fault
    assert shard in first[3]
    assert "checkpoint.strict=false" in first[3]
    assert first[4][0] == "step_00000002"
    assert "state.json" in first[4][1][1]
    assert "none of the 3 checkpoints" in first[5]
    assert first[6] == ("step_00000006", [])
    assert f"{no_pointer}/latest: missing" in capfd.readouterr().err
    for (name, faults), refusal in zip(first[7:10], first[10:], strict=True):
        assert name == "step_00000006"
        assert "latest" in faults[0]
        assert "latest" in refusal


def _made(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)


def test_retention_keeps_the_last_every_nth_the_resumed_and_what_lies_ahead(tmp_path) -> None:
    steps = [f"step_{step:08d}" for step in (10, 20, 30, 40, 50, 60, 90)]
    _made(tmp_path, *steps, "step_00000060_2")
    gone = folders.remove_old(
        *(tmp_path, tmp_path / "step_00000060_2"),
        **{"keep": 2, "keep_every": 20, "in_use": tmp_path / "step_00000030"},
    )
    assert sorted(path.name for path in gone) == ["step_00000010", "step_00000050"]
    assert not list(tmp_path.glob(".*"))
    assert not gone[0].exists()
    assert folders.newest(tmp_path) == folders.Checkpoint(tmp_path / "step_00000090", 90)


def test_what_is_half_deleted_is_no_checkpoint(tmp_path, monkeypatch) -> None:
    """A kill leaves what an interruption does; the next save clears it away."""
    _made(tmp_path, "step_00000010", "step_00000020")

    def interrupted(path: Path) -> None:
        raise InterruptedError

    monkeypatch.setattr(folders.shutil, "rmtree", interrupted)
    with pytest.raises(InterruptedError):
        folders.remove_old(
            *(tmp_path, tmp_path / "step_00000020"), keep=1, keep_every=None, in_use=None
        )
    monkeypatch.undo()
    assert [found.step for found in folders.published(tmp_path)] == [20]
    assert len(list(tmp_path.iterdir())) == 2
    folders.begin(tmp_path, "step_00000030")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".unfinished_step_00000030", "step_00000020"]


def test_keep_every_alone_is_refused(config, tmp_path) -> None:
    with pytest.raises(UserError, match=r"keep_every=2 without checkpoint\.keep"):
        toy.train(config, tmp_path, 1, "checkpoint.keep_every=2")


def _save(trainer: Any, folder: Path, step: int, writer_timeout: float | None = None) -> Path:
    return store.begin(
        *(folder, step),
        stages=trainer.students,
        optimizer=trainer.optimizer,
        random_state=get_random_state(),
        state={},
        writer_timeout=writer_timeout,
    ).complete()


@pytest.fixture
def disk(tmp_path) -> Iterator[tuple[Path, bool]]:
    """A folder, and whether it is a disk of 64 MiB of its own, which takes the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    yield folder, mounted
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def _full(disk: Path, mounted: bool, *, left: int, told: bool) -> Iterator[None]:
    """Within it so many bytes are left on the disk. told: whether it says so when it is asked."""
    usage, limit = shutil.disk_usage, resource.getrlimit(resource.RLIMIT_FSIZE)
    said = usage(disk)._replace(free=left if told else 10**9)
    if not (told and mounted):
        shutil.disk_usage = lambda path: said
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (left, limit[1]))
    elif dist.get_rank() == 0:
        (disk / "filler").write_bytes(bytes(usage(disk).free - left))
    dist.barrier()
    try:
        yield
    finally:
        dist.barrier()
        shutil.disk_usage = usage
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        if dist.get_rank() == 0:
            (disk / "filler").unlink(missing_ok=True)
        dist.barrier()


def _full_disk(rank: int, size: int, config: str, disk: str, mounted: bool) -> list[str]:
    told = []
    path = Path(disk) / "checkpoints"
    with toy.trainer(config, "parallel.tensor=2") as trainer:
        first = _save(trainer, path, 1)
        before = hashes(first)
        with _full(path.parent, mounted, left=50_000, told=True):
            with pytest.raises(UserError, match=r"[\d,]+ bytes are free and step 2 needs"):
                _save(trainer, path, 2)
        told.append(sorted(file.name for file in path.iterdir()))
        # found to be full when the files are written: the shards, or already common.pt
        for step, left, writer_timeout in ((3, 50_000, None), (4, 50_000, 60.0), (5, 0, None)):
            with _full(path.parent, mounted, left=left, told=False):
                match = rf"the disk is full, step {step} was not saved"
                with pytest.raises(UserError, match=match):
                    _save(trainer, path, step, writer_timeout)
            told.append(sorted(file.name for file in path.iterdir()))
        assert hashes(first) == before
        _save(trainer, path, 6)
        _save(trainer, path, 6)
        told.append(sorted(file.name for file in path.iterdir()))
    return told


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(config, disk) -> None:
    """On a small disk where the test may mount one (as root); else a limit on the size of files
    stands for it, which the writers meet as they meet a full disk."""
    folder, mounted = disk
    told, _ = run_ranks(2, _full_disk, str(config), str(folder), mounted)
    assert told[:4] == [["latest", "step_00000001"]] * 4
    assert told[4] == ["latest", "step_00000001", "step_00000006", "step_00000006_2"]

"""Damaged checkpoints, full disks and retention, as one who types the command sees them."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from taid_megatron import cli
from taid_megatron.checkpointing import manifest
from taid_megatron.training import stopping

from ..distributed import toy
from ..distributed.ranks import run_ranks
from .test_checkpoints import cut, empty, flip, hashes
from .test_pickle import _in_common, _reseal

STEPS = ("training.steps=6", "checkpoint.every=2")
NEWEST, SHARD = "checkpoints/step_00000006", "__0_0.distcp"


def _command(rank: int, size: int, arguments: list[str], before: Callable[[], Any] | None) -> int:
    if before is not None:
        before()
    return cli.main(arguments)


def _train(config: Path, folder: Path, *overrides: str, before: Any = None) -> int:
    arguments = ["train", str(config), f"run.folder={folder}", *STEPS, *overrides]
    (code,) = run_ranks(1, _command, arguments, before)
    return code


def _status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / stopping.STATUS).read_text())


@pytest.fixture
def run(straight, tmp_path) -> Path:
    """The straight run's folder, to be changed."""
    return shutil.copytree(straight, tmp_path / "run")


def test_a_run_falls_back_loudly_and_saves_beside_the_damaged_one(
    config, straight, run, capfd
) -> None:
    flip(run / NEWEST / SHARD, 1)
    empty(run / "checkpoints/latest", 1)
    (run / "checkpoints/.unfinished_step_00000008").mkdir()
    before = hashes(run / NEWEST)
    assert _train(config, run, "checkpoint.verify=full", "checkpoint.keep=2") == 0

    faults = (
        "checkpoints/latest: damaged, it names no checkpoint",
        f"{NEWEST}/{SHARD}: its content is not what was saved (another hash) (seen by rank 0)",
    )
    said = capfd.readouterr().err
    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    (noted,) = [record for record in records if "resumed_from" in record]
    assert noted["resumed_from"] == "step_00000004"
    for fault in faults:
        assert f"warning: passed over: {run}/{fault}" in said
        assert fault in noted["checkpoint_faults"]
    assert hashes(run / NEWEST) == before
    left = {path.name for path in (run / "checkpoints").iterdir()}
    # 2 is gone by checkpoint.keep; 4, just as old, is the one resumed from
    assert left == {"step_00000006_2", "step_00000006", "step_00000004", "latest"}
    again = json.loads((run / "checkpoints/latest").read_text())
    assert again["checkpoint"] == "step_00000006_2"
    # the same steps as in the undisturbed run
    untouched = [json.loads(line) for line in (straight / "metrics.jsonl").open()]
    assert toy.column(records, "loss") == toy.column(untouched, "loss")


def _all_cut(folder: Path) -> None:
    for checkpoint in (folder / "checkpoints").glob("step_*"):
        cut(checkpoint / ".metadata", 1)


def _pickle(folder: Path) -> None:
    _in_common(folder / NEWEST, folder / "canary")
    _reseal(folder / NEWEST)


REFUSED: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "a shard flipped": (
        lambda folder: flip(folder / NEWEST / SHARD, 1),
        ("checkpoint.strict=true", "checkpoint.verify=full"),
        f"{NEWEST}/{SHARD}: its content is not what was saved",
    ),
    "none sound": (_all_cut, (), "none of the 3 checkpoints in "),
    "a pickle that asks for code": (_pickle, (), f"{NEWEST}/common.pt: refused, "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_with_exit_code_2_and_one_line(config, run, capfd, case) -> None:
    damage, overrides, named = REFUSED[case]
    damage(run)
    before = {path: hashes(path) for path in (run / "checkpoints").glob("step_*")}
    assert _train(config, run, *overrides) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("taid-megatron: ")
    assert named in last
    assert {path: hashes(path) for path in (run / "checkpoints").glob("step_*")} == before
    assert not (run / "canary").exists()
    ended = _status(run)
    assert (ended["state"], ended["exit_code"]) == ("failed", 2)
    assert named in ended["error"]


def _little_space() -> None:
    said = shutil.disk_usage("/")._replace(free=50_000)
    shutil.disk_usage = lambda path: said


def _small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


@pytest.mark.parametrize(
    ("before", "said"),
    [
        pytest.param(_little_space, "50,000 bytes are free and step 6 needs", id="before a save"),
        pytest.param(_small_files, "the disk is full, step 6 was not saved", id="during a save"),
    ],
)
def test_a_full_disk_ends_it_with_exit_code_2(config, run, capfd, before, said) -> None:
    shutil.rmtree(run / NEWEST)
    left = {path.name: hashes(path) for path in (run / "checkpoints").glob("step_*")}
    assert _train(config, run, before=before) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("taid-megatron: ")
    assert said in last
    after = {path.name for path in (run / "checkpoints").iterdir()}
    assert after == {*left, "latest"}
    assert {name: hashes(run / "checkpoints" / name) for name in left} == left
    assert _status(run)["exit_code"] == 2


def test_the_last_and_every_nth_are_kept_and_all_of_them_are_sound(config, tmp_path) -> None:
    assert _train(config, tmp_path, "checkpoint.keep=1", "checkpoint.keep_every=4") == 0
    left = sorted(path for path in (tmp_path / "checkpoints").iterdir())
    assert [path.name for path in left] == ["latest", "step_00000004", "step_00000006"]
    assert [manifest.problem(path, full=True) for path in left[1:]] == [None, None]

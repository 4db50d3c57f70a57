"""A checkpoint that would run code is refused at each of the places that unpickle; nothing runs."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from taid_megatron.checkpointing import manifest, store, unpickle
from taid_megatron.config.errors import UserError
from taid_megatron.conversion.checkpoint import open_checkpoint

from ..distributed import toy
from ..distributed.ranks import run_ranks

WEIGHT = "output_layer.weight"


class Bomb:
    """Makes the folder `canary` where it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def _in_metadata(folder: Path, canary: Path) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = Bomb(canary)
    path.write_bytes(pickle.dumps(metadata))


def _instead_of_metadata(folder: Path, canary: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb(canary)))


def _in_common(folder: Path, canary: Path) -> None:
    torch.save({"optimizer": Bomb(canary)}, folder / "common.pt")


def _in_a_shard(folder: Path, canary: Path) -> None:
    """In a weight's place; the metadata is made to point at it."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index = next(i for i in metadata.storage_data if i.fqn == WEIGHT)
    where = metadata.storage_data[index]
    bomb = io.BytesIO()
    torch.save(Bomb(canary), bomb)
    with (folder / where.relative_path).open("ab") as shard:
        where.offset, where.length = shard.tell(), len(bomb.getvalue())
        shard.write(bomb.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _outside(place: str) -> Callable[[Path, Path], None]:
    def spoil(folder: Path, canary: Path) -> None:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        next(iter(metadata.storage_data.values())).relative_path = place
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    return spoil


CASES = {
    "in-metadata": (_in_metadata, r"\.metadata: refused, it asks for posix"),
    "instead-of-metadata": (_instead_of_metadata, r"\.metadata: refused, it asks for posix"),
    "common": (_in_common, r"common\.pt: refused, .*GLOBAL posix"),
    "shard": (_in_a_shard, r"a tensor in it: refused, .*GLOBAL posix"),
    "above": (_outside("../secret"), r"\.metadata: refused, it points to '\.\./secret'"),
    "absolute": (_outside("/etc/passwd"), r"\.metadata: refused, it points to '/etc/passwd'"),
    "parent": (_outside(".."), r"\.metadata: refused, it points to '\.\.'"),
}


def _reseal(folder: Path) -> None:
    """A manifest that fits, as one who makes up a checkpoint would write it."""
    (folder / manifest.MANIFEST).unlink()
    manifest.write(folder, manifest.record(folder.iterdir()))


def _load_all(rank: int, size: int, config: str, folders: list[str]) -> list[str]:
    told = []
    with toy.trainer(config) as trainer:
        for folder in folders:
            try:
                store.load_weights(store.find(Path(folder)), trainer.students, verify="full")
                told.append("loaded")
            except UserError as error:
                told.append(str(error))
    return told


def test_a_checkpoint_that_would_run_code_is_refused(config, straight, tmp_path) -> None:
    canary = tmp_path / "canary"
    sound = straight / "checkpoints" / "step_00000006"
    folders = [str(sound)]
    for name, (spoil, _) in CASES.items():
        folder = shutil.copytree(sound, tmp_path / name / sound.name)
        spoil(folder, canary)
        _reseal(folder)
        folders.append(str(folder))
    (told,) = run_ranks(1, _load_all, str(config), folders)
    assert not canary.exists()
    assert told[0] == "loaded"
    for (name, (_, expected)), text in zip(CASES.items(), told[1:], strict=True):
        with pytest.raises(UserError, match=expected):
            raise UserError(text)
        assert "nothing of it was run" in text, name
    # an export or an evaluation reads tensor by tensor, and its metadata no less carefully
    for folder, (_, expected) in zip(folders[1:], CASES.values(), strict=True):
        if "metadata" in expected:
            with pytest.raises(UserError, match=expected):
                open_checkpoint(Path(folder))
    assert not canary.exists()


@pytest.mark.parametrize("flatten", [True, False])
def test_torchs_planner_unpickles_nothing(tmp_path, flatten) -> None:
    """Its load_bytes has two branches."""
    canary = tmp_path / "canary"
    planner = DefaultLoadPlanner(flatten_state_dict=flatten)
    planner.state_dict, planner.original_state_dict = {"a": None}, {"a": None}
    planner.mappings = {"a": ("a",)}
    index = MetadataIndex("a")
    item = ReadItem(LoadItemType.BYTE_IO, index, torch.Size([0]), index, *[torch.Size([0])] * 2)

    def stream(value: Any) -> io.BytesIO:
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        return file

    with unpickle.no_pickle():
        with pytest.raises(UserError, match=r"entry a: refused, .*posix"):
            planner.load_bytes(item, stream(Bomb(canary)))
        planner.load_bytes(item, stream({"plain": [1, torch.ones(2)]}))
    assert not canary.exists()
    loaded = (planner.original_state_dict if flatten else planner.state_dict)["a"]
    assert loaded["plain"][0] == 1
    # the same without the guard: the test's bomb does go off
    planner.load_bytes(item, stream(Bomb(canary)))
    assert canary.exists()

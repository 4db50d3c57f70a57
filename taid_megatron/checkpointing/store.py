"""Checkpoints of the student: megatron-core's distributed format, published whole or not at all.

    checkpoints/step_00000100/
        state.json      step, consumed samples, t, layout, architecture, versions
        __*.distcp ...  weights, optimizer and random state, resharded on load

A checkpoint is written under a temporary name and renamed when every rank is done, so a folder
named step_* is complete. The store knows models and optimizers only by their sharded_state_dict and
load_state_dict.
"""

from __future__ import annotations

import json
import queue
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling

from taid_megatron.config.errors import UserError

STATE_FILE = "state.json"
_STEP = re.compile(r"step_(\d{8,})")
# Optimizer shards are gathered per parameter: the only kind that loads under any other layout, and
# that saves at all without a fused Adam.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint."""

    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        """The content of state.json."""
        return json.loads((self.path / STATE_FILE).read_text())


def newest(folder: Path) -> Checkpoint | None:
    """The checkpoint with the highest step in a `checkpoints` folder."""
    found = [
        Checkpoint(path, int(match[1]))
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _STEP.fullmatch(path.name)) and (path / STATE_FILE).is_file()
    ]
    return max(found, key=lambda checkpoint: checkpoint.step, default=None)


def find(path: Path) -> Checkpoint:
    """The checkpoint that a user names: its folder, or a run's (then the newest).

    Raises UserError where there is none.
    """
    match = _STEP.fullmatch(path.name)
    if match and (path / STATE_FILE).is_file():
        return Checkpoint(path, int(match[1]))
    for folder in (path / "checkpoints", path):
        if checkpoint := newest(folder):
            return checkpoint
    raise UserError(
        f"{path}: no checkpoint there; name a step_* folder, or a run folder that has one"
    )


def save(
    folder: Path,
    step: int,
    *,
    stages: Sequence[Any],
    optimizer: Any,
    random_state: dict[str, torch.Tensor],
    state: dict[str, Any],
) -> Path:
    """Write and publish step_<step>; to be called on every rank. Returns its path.

    stages: this rank's model chunks; state: what is not a tensor, as JSON.
    """
    final = folder / f"step_{step:08d}"
    unfinished = folder / f".unfinished_{final.name}"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".unfinished_*"):
            shutil.rmtree(leftover)
        unfinished.mkdir()
    dist.barrier()
    _keep_results_in_this_process()
    dist_checkpointing.save(
        _sharded(stages, optimizer, random_state, loading=False), str(unfinished)
    )
    dist.barrier()
    if dist.get_rank() == 0:
        (unfinished / STATE_FILE).write_text(json.dumps({**state, "step": step}, indent=1))
        if final.exists():
            shutil.rmtree(final)
        unfinished.rename(final)
    dist.barrier()
    return final


def _keep_results_in_this_process() -> None:
    """Give megatron-core's writer a plain queue for its results.

    Its own is a multiprocessing.Manager's: a process more, spawned at the first save, that takes
    seconds to import torch and may outlive the run. It serves asynchronous saves; here the writers
    are forked and joined, and the results put, within the call.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def load(
    checkpoint: Checkpoint,
    *,
    stages: Sequence[Any],
    optimizer: Any,
    random_state: dict[str, torch.Tensor] | None,
) -> dict[str, torch.Tensor] | None:
    """Restore weights and optimizer in place, whatever layout saved them; on every rank.

    random_state: this rank's, to be replaced (its shape is what counts); None where the layout
    changed and the saved one belongs to other ranks. Returns the restored one.
    """
    sharded = _sharded(stages, optimizer, random_state or {}, loading=True)
    loaded = dist_checkpointing.load(
        sharded, str(checkpoint.path), strict=StrictHandling.RAISE_UNEXPECTED
    )
    for number, stage in enumerate(stages):
        stage.load_state_dict(loaded[f"model{number}"])
    optimizer.load_state_dict(loaded["optimizer"])
    return loaded.get("random_state")


def load_weights(checkpoint: Checkpoint, stages: Sequence[Any]) -> None:
    """Fill a model's stages from a checkpoint that may have been saved under another layout."""
    sharded = {f"model{n}": stage.sharded_state_dict() for n, stage in enumerate(stages)}
    loaded = dist_checkpointing.load(
        sharded, str(checkpoint.path), strict=StrictHandling.RAISE_UNEXPECTED
    )
    for number, stage in enumerate(stages):
        stage.load_state_dict(loaded[f"model{number}"])


def _sharded(
    stages: Sequence[Any],
    optimizer: Any,
    random_state: dict[str, torch.Tensor],
    *,
    loading: bool,
) -> dict[str, Any]:
    models = {
        f"model{number}": stage.sharded_state_dict(metadata=_METADATA)
        for number, stage in enumerate(stages)
    }
    rank, size = dist.get_rank(), dist.get_world_size()
    return {
        **models,
        "optimizer": optimizer.sharded_state_dict(models, is_loading=loading, metadata=_METADATA),
        "random_state": {
            name: ShardedTensor.from_rank_offsets(
                f"random_state.{name}", tensor, (0, rank, size), prepend_axis_num=1
            )
            for name, tensor in random_state.items()
        },
    }

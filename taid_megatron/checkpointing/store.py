"""Checkpoints of the student: megatron-core's distributed format, published whole or not at all.

    checkpoints/step_00000100/
        state.json      step, consumed samples, t, layout, architecture, versions
        .metadata, common.pt, metadata.json, __*.distcp
                        weights, optimizer and random state, resharded on load
        manifest.json   size and hash of all of these

A checkpoint is written under a temporary name, brought to the disk, hashed and renamed; a folder
named step_* is complete and never written again (folder.py). Loading checks it against its manifest
(manifest.py) and executes nothing in it (unpickle.py). The store knows models and optimizers only
by their sharded_state_dict and load_state_dict.
"""

from __future__ import annotations

import errno
import json
import queue
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from taid_megatron.checkpointing import folder as folders
from taid_megatron.checkpointing import manifest
from taid_megatron.checkpointing.folder import STATE_FILE, Checkpoint, find, newest
from taid_megatron.checkpointing.unpickle import CommonStrategy, no_pickle
from taid_megatron.config.errors import UserError
from taid_megatron.runtime.distributed import on_first_rank
from taid_megatron.runtime.log import get_logger

__all__ = ["Checkpoint", "choose", "find", "load", "load_weights", "newest", "save"]

Verify = Literal["fast", "full"]

# Optimizer shards are gathered per parameter: the only kind that loads under any other layout, and
# that saves at all without a fused Adam.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
# Besides the tensors: what torch writes around each, the plan, the file system's own.
_SPACE_FACTOR, _SPACE_MARGIN = 1.05, 8 << 20
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints a save leaves."""

    keep: int | None = None
    """The last so many; None: all."""
    every: int | None = None
    """And those of every n-th step."""
    in_use: Path | None = None
    """And the one that the run was resumed from."""


def choose(folder: Path, *, verify: Verify, strict: bool) -> tuple[Checkpoint | None, list[str]]:
    """The newest sound checkpoint of a `checkpoints` folder, and what was wrong with newer ones.

    To be called on every rank; the same answer on all. None: the folder has no checkpoint. Raises
    UserError where there are checkpoints and none is sound, or, with strict, where anything is
    wrong.
    """
    found = on_first_rank(lambda: folders.published(folder))
    if not found:
        return None, []
    if not (folder / folders.POINTER).exists():
        get_logger().warning(f"{folder / folders.POINTER}: missing; the newest checkpoint is taken")
    faults = []
    if fault := on_first_rank(lambda: folders.pointer_problem(folder)):
        faults.append(fault)
    for checkpoint in found:
        fault = _problem(checkpoint, verify)
        if fault is None and not (strict and faults):
            return checkpoint, faults
        faults += [fault] if fault else []
        if strict:
            raise UserError(
                f"{faults[0]}; checkpoint.strict=false goes on from the newest sound checkpoint"
            )
    raise UserError(
        f"{faults[-1]}; none of the {len(found)} checkpoints in {folder} is sound: restore one "
        "from a copy, or name another run.folder"
    )


def _problem(checkpoint: Checkpoint, verify: Verify) -> str | None:
    """manifest.problem, the shards' hashes shared out over the ranks; the same on all of them."""
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        mine = manifest.problem(checkpoint.path, full=verify == "full", rank=rank, size=size)
    except OSError as error:
        mine = f"{error.filename or checkpoint.path}: {error.strerror}"
    found: list[str | None] = [None] * size
    dist.all_gather_object(found, mine)
    for rank, fault in enumerate(found):
        if fault is not None:
            return f"{fault} (seen by rank {rank})"
    return None


def save(
    folder: Path,
    step: int,
    *,
    stages: Sequence[Any],
    optimizer: Any,
    random_state: dict[str, torch.Tensor],
    state: dict[str, Any],
    retention: Retention = Retention(),
) -> Path:
    """Write and publish step_<step>; to be called on every rank. Returns its path.

    stages: this rank's model chunks; state: what is not a tensor, as JSON. Raises UserError where
    the disk is full; the checkpoints that were there stay as they were.
    """
    sharded = _sharded(stages, optimizer, random_state, loading=False)
    needed = _bytes_of(sharded)
    name, unfinished = on_first_rank(lambda: _begin(folder, step, needed))
    _keep_results_in_this_process()
    try:
        dist_checkpointing.save(sharded, str(unfinished))
        return _publish(unfinished, name, {**state, "step": step}, retention)
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        full = _is_no_space(error)
        if isinstance(error, CheckpointException):
            # raised on all ranks, with the causes on the first one alone
            full = on_first_rank(lambda: full)
        if full:
            raise UserError(
                f"{folder}: the disk is full, step {step} was not saved and nothing of it was "
                "left; make room and resume from the checkpoint before"
            ) from error
        raise


def _begin(folder: Path, step: int, needed: int) -> tuple[str, Path]:
    name = folders.free_name(folder, step)
    unfinished = folders.begin(folder, name)
    free = shutil.disk_usage(folder).free
    if free < needed:
        unfinished.rmdir()
        raise UserError(
            f"{folder}: {free:,} bytes are free and step {step} needs {needed:,}; make room (or "
            "set checkpoint.keep) and resume from the checkpoint before"
        )
    return name, unfinished


def _bytes_of(sharded: dict[str, Any]) -> int:
    """Space that a checkpoint takes, all ranks together; an estimate from above."""
    mine = sum(
        value.data.numel() * value.data.element_size()
        for value in nested_values(sharded)
        if isinstance(value, (ShardedTensor, ShardedTensorFactory))
        and is_main_replica(value.replica_id)
    )
    sizes: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(sizes, mine)
    return int(sum(sizes) * _SPACE_FACTOR) + _SPACE_MARGIN


def _publish(unfinished: Path, name: str, state: dict[str, Any], retention: Retention) -> Path:
    """Hash on every rank what it wrote; then rank 0 completes the folder and names it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    found: list[manifest.Records] = [{}] * size
    dist.all_gather_object(found, manifest.record(sorted(unfinished.glob(f"__{rank}_*.distcp"))))
    shards = {name: entry for records in found for name, entry in records.items()}

    def complete() -> Path:
        (unfinished / STATE_FILE).write_text(json.dumps(state, indent=1))
        others = [path for path in unfinished.iterdir() if path.name not in shards]
        digest = manifest.write(unfinished, {**shards, **manifest.record(others)})
        folders.sync_folder(unfinished)
        final = folders.publish(unfinished, name, digest)
        folders.remove_old(
            final.parent,
            final,
            keep=retention.keep,
            keep_every=retention.every,
            in_use=retention.in_use,
        )
        return final

    return on_first_rank(complete)


def _is_no_space(error: BaseException | None) -> bool:
    """Whether a full disk (quota, file size limit) is at the bottom of it."""
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return True
    # torch's zip writer and megatron-core's gathered failures keep only the text
    words = (
        *("No space left", "File too large", "Disk quota exceeded"),
        *("unexpected pos", "iostream error"),
    )
    if any(word in str(error) for word in words):
        return True
    return _is_no_space(error.__cause__ or error.__context__)


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

    The checkpoint is one that `choose` has looked at. random_state: this rank's, to be replaced
    (its shape is what counts); None where the layout changed and the saved one belongs to other
    ranks. Returns the restored one. Raises UserError where it holds more than plain data.
    """
    loaded = _load(checkpoint, _sharded(stages, optimizer, random_state or {}, loading=True))
    for number, stage in enumerate(stages):
        stage.load_state_dict(loaded[f"model{number}"])
    optimizer.load_state_dict(loaded["optimizer"])
    return loaded.get("random_state")


def load_weights(checkpoint: Checkpoint, stages: Sequence[Any], *, verify: Verify = "fast") -> None:
    """Fill a model's stages from a checkpoint that may have been saved under another layout.

    Raises UserError where it is not sound, or holds more than plain data.
    """
    if fault := _problem(checkpoint, verify):
        raise UserError(f"{fault}; name another checkpoint")
    loaded = _load(
        checkpoint, {f"model{n}": stage.sharded_state_dict() for n, stage in enumerate(stages)}
    )
    for number, stage in enumerate(stages):
        stage.load_state_dict(loaded[f"model{number}"])


def _load(checkpoint: Checkpoint, sharded: dict[str, Any]) -> dict[str, Any]:
    try:
        with no_pickle():
            return dist_checkpointing.load(
                sharded,
                str(checkpoint.path),
                common_strategy=CommonStrategy(),
                strict=StrictHandling.RAISE_UNEXPECTED,
            )
    except CheckpointException as error:  # of all ranks' reading, raised on all of them
        causes = [cause for cause, _ in error.failures.values()]
        for cause in causes:
            if isinstance(cause, UserError):
                raise cause from None
        raise UserError(
            f"{checkpoint.path}: cannot be read ({causes[0]}); checkpoint.verify=full finds out "
            "whether a file of it is damaged"
        ) from error


def _sharded(
    stages: Sequence[Any],
    optimizer: Any,
    random_state: dict[str, torch.Tensor],
    *,
    loading: bool,
) -> dict[str, Any]:
    metadata = dict(_METADATA)  # megatron-core writes the process groups of the moment into it
    models = {
        f"model{number}": stage.sharded_state_dict(metadata=metadata)
        for number, stage in enumerate(stages)
    }
    rank, size = dist.get_rank(), dist.get_world_size()
    return {
        **models,
        "optimizer": optimizer.sharded_state_dict(models, is_loading=loading, metadata=metadata),
        "random_state": {
            name: ShardedTensor.from_rank_offsets(
                f"random_state.{name}", tensor, (0, rank, size), prepend_axis_num=1
            )
            for name, tensor in random_state.items()
        },
    }

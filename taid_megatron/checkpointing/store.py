"""Checkpoints of the student: megatron-core's distributed format, published whole or not at all.

    checkpoints/step_00000100/
        state.json      step, consumed samples, t, layout, architecture, versions
        .metadata, common.pt, metadata.json, __*.distcp
                        weights, optimizer and random state, resharded on load
        manifest.json   size and hash of all of these

A checkpoint is written under a temporary name, brought to the disk, hashed and renamed
(saving.py); a folder named step_* is complete and never written again (folder.py). Loading checks
it against its manifest (manifest.py) and executes nothing in it (unpickle.py). The store knows
models and optimizers only by their sharded_state_dict and load_state_dict.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from taid_megatron.checkpointing import folder as folders
from taid_megatron.checkpointing import manifest
from taid_megatron.checkpointing.folder import Checkpoint, find, newest
from taid_megatron.checkpointing.saving import PendingSave, Retention, begin, sharded_state
from taid_megatron.checkpointing.unpickle import CommonStrategy, no_pickle, refusal
from taid_megatron.config.errors import UserError
from taid_megatron.runtime.distributed import on_first_rank
from taid_megatron.runtime.log import get_logger

__all__ = [
    "Checkpoint",
    "PendingSave",
    "Retention",
    "begin",
    "choose",
    "find",
    "load",
    "load_weights",
    "newest",
]

Verify = Literal["fast", "full"]


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
    loaded = _load(checkpoint, sharded_state(stages, optimizer, random_state or {}, loading=True))
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
            if isinstance(cause, pickle.UnpicklingError):  # a tensor's, by torch's weights_only
                raise refusal(f"{checkpoint.path}, a tensor in it", cause) from None
        raise UserError(
            f"{checkpoint.path}: cannot be read ({causes[0]}); checkpoint.verify=full finds out "
            "whether a file of it is damaged"
        ) from error

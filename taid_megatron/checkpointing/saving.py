"""Saves: planned and gathered by megatron-core, written here, published whole or not at all.

A save has two halves. `begin` takes a copy of the state, in memory or, where a save may block, on
the disk right away; `PendingSave` brings it to the disk and hashes it, and publishes it once every
rank's part is there. megatron-core's own writers are not used: it forks them, and waits for one
that was killed for ever.
"""

from __future__ import annotations

import contextlib
import errno
import json
import queue
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Protocol

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.base import (
    StrategyAction,
    register_default_strategy,
)
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from torch.distributed.checkpoint.api import CheckpointException

from taid_megatron import __version__
from taid_megatron.checkpointing import folder as folders
from taid_megatron.checkpointing import manifest
from taid_megatron.checkpointing.folder import STATE_FILE
from taid_megatron.checkpointing.writer import Writer, WriterError, memory_file
from taid_megatron.config.errors import UserError
from taid_megatron.runtime.distributed import on_first_rank

# Optimizer shards are gathered per parameter: the only kind that loads under any other layout, and
# that saves at all without a fused Adam.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
# Besides the tensors: what torch writes around each, the plan, the file system's own.
_SPACE_FACTOR, _SPACE_MARGIN = 1.05, 8 << 20
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Retention:
    """Which checkpoints a save leaves."""

    keep: int | None = None
    """The last so many; None: all."""
    every: int | None = None
    """And those of every n-th step."""
    in_use: Path | None = None
    """And the one that the run was resumed from."""


class _Part(Protocol):
    """One rank's files on their way to the disk: a Writer, _Here or _Failed."""

    records: manifest.Records

    def done(self) -> bool:
        """Whether they are there, and `records` says what they are."""

    def close(self) -> None:
        """Leave it."""


class _Here:
    """A rank's files, written already; what is left of them is done when it is asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files, self.records = files, manifest.Records()

    def done(self) -> bool:
        self.records = manifest.record(self._files)
        return True

    def close(self) -> None:
        """Nothing is under way."""


class _Failed:
    """A rank's files that nothing writes: told when it is asked for, so that all ranks hear."""

    def __init__(self, fault: OSError) -> None:
        self._fault, self.records = fault, manifest.Records()

    def done(self) -> bool:
        raise self._fault

    def close(self) -> None:
        """Nothing is under way."""


def begin(
    folder: Path,
    step: int,
    *,
    stages: Sequence[Any],
    optimizer: Any,
    random_state: dict[str, torch.Tensor],
    state: dict[str, Any],
    retention: Retention = Retention(),
    writer_timeout: float | None = None,
) -> PendingSave:
    """Take down the state of step_<step>, up to where it may change again; on every rank.

    What is left is the returned one's: `complete`, or step by step. stages: this rank's model
    chunks; state: what is not a tensor, as JSON (rank 0's is taken). writer_timeout: seconds that
    a process beside this one may take to write what is then a copy in memory; None: written here.
    Raises UserError where the disk is full; the checkpoints that were there stay as they were.
    """
    sharded = sharded_state(stages, optimizer, random_state, loading=False)
    needed = _bytes_of(sharded)
    name, unfinished = on_first_rank(lambda: _begin(folder, step, needed))
    _prepare_megatron()
    try:
        request = dist_checkpointing.save(sharded, str(unfinished), async_sharded_save=True)
        files = _write(request, in_memory=writer_timeout is not None)
        for finalize in request.finalize_fns:  # the metadata; raises on all ranks where one failed
            finalize()
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        full = _is_no_space(error)
        if isinstance(error, CheckpointException):
            # raised on all ranks, with the causes on the first one alone
            full = on_first_rank(lambda: full)
        if full:
            raise _full(folder, step) from error
        raise
    in_memory = {path: memory for path, memory in files.items() if memory is not None}
    part: _Part = _Here([*files])
    if writer_timeout is not None and in_memory:
        try:
            part = Writer(in_memory, timeout=writer_timeout)
        except OSError as error:  # no process, no memory for one
            part = _Failed(error)
    return PendingSave(unfinished, name, _told(state, step), retention, part)


def _told(state: dict[str, Any], step: int) -> dict[str, Any]:
    """What state.json says besides: versions, for whoever has to find out what wrote it."""
    versions = {"taid-megatron": __version__}
    for package in ("torch", "megatron-core", "transformer-engine"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {**state, "step": step, "versions": versions}


class _CommonStrategy(TorchCommonSaveStrategy):
    """megatron-core's writer of common.pt: what goes wrong on the first rank, all of them hear."""

    def save_common(self, common_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """Of the first rank's."""
        write = super().save_common
        on_first_rank(lambda: write(common_state_dict, checkpoint_dir))


def _prepare_megatron() -> None:
    register_default_strategy(StrategyAction.SAVE_COMMON, "torch", 1, _CommonStrategy("torch", 1))
    if filesystem_async._results_queue is None:
        # its own is a multiprocessing.Manager's: a process more, that may outlive the run
        filesystem_async._results_queue = queue.Queue()


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


def _write(request: Any, *, in_memory: bool) -> dict[Path, BinaryIO | None]:
    """Write this rank's files as megatron-core's request says, one tensor after the other.

    Returns their paths on the disk, each with the memory file that has the content; None where it
    is on the disk. A failure is handed to the request, which raises it on all ranks.
    """
    if request.async_fn is None:  # nothing of the state is this rank's to save
        return {}
    transforms = request.async_fn.args[0]
    _, buckets, results = request.async_fn_args
    files: dict[Path, BinaryIO | None] = {}
    written = {}
    for number, (path, key, (entries, tensors)) in enumerate(buckets):
        memory = memory_file(key) if in_memory else None
        files[Path(path)] = memory
        target = f"/proc/self/fd/{memory.fileno()}" if memory else path
        told: queue.Queue = queue.Queue()
        running: queue.Queue = queue.Queue()
        running.put(number)
        on_host = ((item, tensor.to("cpu")) for item, tensor in tensors)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            *(transforms, number, (target, key, (entries, on_host)), told, running),
            use_fsync=False,
        )
        _, outcome = told.get_nowait()
        if isinstance(outcome, Exception):
            results.put(outcome)
            return files
        written[number] = outcome
    results.put(written)
    return files


class PendingSave:
    """A checkpoint under way; every method but `abandon` is to be called on every rank."""

    def __init__(
        self,
        unfinished: Path,
        name: str,
        state: dict[str, Any],
        retention: Retention,
        part: _Part,
    ) -> None:
        self._unfinished, self._name, self._state = unfinished, name, state
        self._retention, self._part = retention, part

    def written(self) -> bool:
        """Whether every rank's files are on the disk; the same answer on all.

        Raises on all ranks where one's could not be written: UserError where the disk is full,
        else WriterError, which names the rank.
        """
        fault: Exception | None = None
        done = False
        try:
            done = self._part.done()
        except (OSError, WriterError) as error:
            fault = error
        # on the host: a GPU's queue of work would have to run dry first
        flags = torch.tensor([float(fault is not None), float(not done)])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        failed, under_way = flags.tolist()
        if failed:
            self._fail(fault)
        return not under_way

    def publish(self) -> Path:
        """Complete the folder and give it its name; every rank's files are on the disk."""
        found: list[manifest.Records] = [{}] * dist.get_world_size()
        dist.all_gather_object(found, self._part.records)
        self._part.close()
        shards = {name: entry for records in found for name, entry in records.items()}
        return on_first_rank(lambda: self._seal(shards))

    def wait(self) -> None:
        """Until every rank's files are on the disk. Bounded, for each rank's writer is."""
        while not self.written():
            time.sleep(_POLL_SECONDS)

    def complete(self) -> Path:
        """All that is left, waited for. Returns the published checkpoint's path."""
        self.wait()
        return self.publish()

    def abandon(self) -> None:
        """End this rank's part of it. What is left on the disk goes at the next save."""
        self._part.close()

    def _seal(self, shards: manifest.Records) -> Path:
        unfinished, retention = self._unfinished, self._retention
        try:
            (unfinished / STATE_FILE).write_text(json.dumps(self._state, indent=1))
            others = [path for path in unfinished.iterdir() if path.name not in shards]
            digest = manifest.write(unfinished, {**shards, **manifest.record(others)})
            folders.sync_path(unfinished)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            if _is_no_space(error):
                raise _full(unfinished.parent, self._state["step"]) from error
            raise
        final = folders.publish(unfinished, self._name, digest)
        folders.remove_old(
            *(final.parent, final),
            keep=retention.keep,
            keep_every=retention.every,
            in_use=retention.in_use,
        )
        return final

    def _fail(self, fault: Exception | None) -> NoReturn:
        self._part.close()
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, fault and (str(fault), _is_no_space(fault)))
        folder, step = self._unfinished.parent, self._state["step"]
        # all writers have ended: nothing comes after
        on_first_rank(lambda: shutil.rmtree(self._unfinished, ignore_errors=True))
        faults = [(rank, *each) for rank, each in enumerate(told) if each is not None]
        if any(is_full for _, _, is_full in faults):
            raise _full(folder, step) from fault
        rank, text, _ = faults[0]
        raise WriterError(
            f"{folder}: step {step} was not saved, on rank {rank} {text}; resume from the "
            "checkpoint before"
        ) from fault


def _full(folder: Path, step: int) -> UserError:
    return UserError(
        f"{folder}: the disk is full, step {step} was not saved and nothing of it was left; make "
        "room and resume from the checkpoint before"
    )


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


def sharded_state(
    stages: Sequence[Any],
    optimizer: Any,
    random_state: dict[str, torch.Tensor],
    *,
    loading: bool,
) -> dict[str, Any]:
    """Weights, optimizer and random state of this rank, as megatron-core saves and loads them."""
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

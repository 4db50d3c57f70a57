"""Weights of one of this system's checkpoints, read tensor by tensor without building a model.

megatron-core writes torch's distributed checkpoint format, with the layers stacked in one tensor
each (`decoder.layers.mlp.linear_fc2.weight`, [layers, ...]), whole tensors cut into chunks, and a
norm named after the linear behind it. Any region of any parameter is read from the chunks that hold
it, so memory is bounded by the region and one chunk.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from taid_megatron.checkpointing.unpickle import read_metadata
from taid_megatron.config.errors import UserError
from taid_megatron.config.schema import Architecture
from taid_megatron.conversion.families import local_name, megatron_table
from taid_megatron.conversion.hf_import import fill
from taid_megatron.models.build import GPTStage
from taid_megatron.models.vocabulary import Vocabulary

_STACKED = "decoder.layers."


def import_checkpoint(
    path: Path,
    stages: Sequence[GPTStage],
    architecture: Architecture,
    vocabulary: Vocabulary,
    *,
    layers: Sequence[int],
) -> None:
    """Fill a model's stages with some layers of a checkpoint, in this order; on every rank.

    architecture: of the model in the checkpoint. Layers may be named twice.
    """
    table = megatron_table(architecture.gated)
    fill(stages, open_checkpoint(path), architecture, table, vocabulary, layers=layers)


@dataclass(frozen=True)
class CheckpointTensors:
    """The model's parameters in a checkpoint, by global name as the local layers have it."""

    reader: FileSystemReader
    metadata: Metadata
    keys: dict[str, tuple[str, int | None]]
    """Name -> key in the checkpoint, and the index into its first axis where layers are stacked."""
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def read(self, tensor: str, axis: int, start: int, stop: int) -> Tensor:
        """tensor[start:stop] along an axis."""
        key, layer = self.keys[tensor]
        shape = list(self.shapes[tensor])
        assert 0 <= start < stop <= shape[axis], f"{tensor} {shape}: {start} to {stop}"
        offsets = [0] * len(shape)
        offsets[axis], shape[axis] = start, stop - start
        target = torch.empty(shape, dtype=self.dtypes[tensor])
        region = target
        if layer is not None:
            offsets, region = [layer, *offsets], target.unsqueeze(0)
        planner = _Region(key, self.metadata.state_dict_metadata[key], offsets, region)
        self.reader.read_data(planner.create_local_plan(), planner).wait()
        return target


def open_checkpoint(path: Path) -> CheckpointTensors:
    """The parameters in a step_* folder. Raises UserError where it is damaged."""
    reader = _Reader(path)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    found = CheckpointTensors(reader, metadata, {}, {}, {})
    for key, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata) and not key.startswith(
            ("optimizer.", "random_state.")
        ):
            _enter(found, key, stored)
    return found


def _enter(found: CheckpointTensors, key: str, stored: TensorStorageMetadata) -> None:
    dtype = stored.properties.dtype
    if not key.startswith(_STACKED):
        found.keys[key], found.shapes[key], found.dtypes[key] = (key, None), (*stored.size,), dtype
        return
    inner = key.removeprefix(_STACKED)
    for layer in range(stored.size[0]):
        name = local_name(f"{_STACKED}{layer}.{inner}")
        found.keys[name], found.dtypes[name] = (key, layer), dtype
        found.shapes[name] = (*stored.size[1:],)


class _Region(LoadPlanner):
    """Loads one region of one tensor into a target of its size."""

    def __init__(self, key: str, stored: Any, offsets: Sequence[int], target: Tensor) -> None:
        chunk = ChunkStorageMetadata(torch.Size(offsets), target.shape)
        self.items = create_read_items_for_chunk_list(key, stored, [chunk])
        self.target = target
        covered = sum(item.lengths.numel() for item in self.items)
        if covered != target.numel():
            raise UserError(
                f"{key}: the checkpoint holds {covered} of {target.numel()} numbers; it is "
                "damaged, take another"
            )

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan(self.items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self.target
        for axis, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            target = target.narrow(axis, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do: the target was a view."""

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Not used: there is no state dict."""

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Not used: every rank reads for itself."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Not used: every rank reads for itself."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Not used: tensors only."""
        raise AssertionError(read_item)


class _Reader(FileSystemReader):
    """torch's reader, whose metadata is a pickle: read as a load reads it, running nothing."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path) / ".metadata")

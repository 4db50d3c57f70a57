"""Weights into a model's stages: every rank reads its own slices, and nothing else.

No collective takes place and no full state dict exists anywhere. Every shape is looked at before a
copy (`copy_` broadcasts), every tensor of the folder must belong to the model, and every parameter
is filled from end to end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from megatron.core import parallel_state
from torch import Tensor

from taid_megatron.config.errors import UserError
from taid_megatron.config.hf import differing, read
from taid_megatron.config.schema import Architecture
from taid_megatron.conversion import segments
from taid_megatron.conversion.families import NEVER_WEIGHTS, NOT_WEIGHTS, TABLES, Table
from taid_megatron.conversion.hf_folder import HFFolder, open_folder
from taid_megatron.models.build import GPTStage
from taid_megatron.models.initialize import global_name, writable
from taid_megatron.models.vocabulary import Vocabulary


class Source(Protocol):
    """Named tensors that can be read in slices."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor."""
        ...

    def read(self, tensor: str, axis: int, start: int, stop: int) -> Tensor:
        """tensor[start:stop] along an axis."""
        ...


def import_hf(
    folder: Path,
    stages: Sequence[GPTStage],
    architecture: Architecture,
    vocabulary: Vocabulary,
    *,
    layers: Sequence[int] | None = None,
) -> list[str]:
    """Fill a model's stages on this rank from a Hugging Face folder; on every rank, whatever PP.

    architecture: of the model in the folder. layers: those of its layers that the stages' model
    consists of, in order; None: all. Returns the names of tensors that were left unused, on
    purpose. Raises UserError where folder and architecture do not fit.
    """
    found = read(folder)
    if field := differing(found, architecture):
        raise UserError(
            f"{folder}: its {field} is {getattr(found, field)}, not "
            f"{getattr(architecture, field)}; leave the architecture to the folder"
        )
    assert found.hf_family is not None
    table = TABLES[found.hf_family]
    source = open_folder(folder)
    unused = check_tensors(source, found.hf_family, architecture)
    fill(stages, source, architecture, table, vocabulary, layers=layers)
    return unused


def check_tensors(source: HFFolder, family: str, architecture: Architecture) -> list[str]:
    """Raise UserError unless the folder's tensors are the model's. Returns those left unused."""
    expected = segments.tensors(architecture, TABLES[family])
    folder = source.folder
    missing = [name for name in expected if name not in source.shapes]
    if missing:
        raise UserError(f"{folder}: {missing[0]} is missing{_more(missing)}; get the whole folder")
    for name, shape in expected.items():
        if source.shapes[name] != shape:
            raise UserError(
                f"{source.files[name]}: {name} has shape {list(source.shapes[name])}, config.json "
                f"says {list(shape)}; they do not belong together, get the folder anew"
            )
        if not source.dtypes[name].is_floating_point:
            raise UserError(
                f"{source.files[name]}: {name} is no floating-point tensor; give plain weights"
            )
    ends = (*NEVER_WEIGHTS, *NOT_WEIGHTS.get(family, ()))
    unused = [name for name in source.shapes if name not in expected]
    tied = {t for t in TABLES[family][segments.OUTPUT].tensors if architecture.tie_embeddings}
    unknown = [name for name in unused if not name.endswith(ends) and name not in tied]
    if unknown:
        raise UserError(
            f"{source.files[unknown[0]]}: {unknown[0]}{_more(unknown)} has no place in a {family} "
            "model as config.json describes it; give a folder whose config.json fits"
        )
    return unused


@torch.no_grad()
def fill(
    stages: Iterable[GPTStage],
    source: Source,
    architecture: Architecture,
    table: Table,
    vocabulary: Vocabulary,
    *,
    layers: Sequence[int] | None = None,
) -> None:
    """Fill every parameter of the stages from a source's slices; rows of padding become 0.

    architecture: of the model in the source. layers: see import_hf.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for stage in stages:
        for name, parameter in stage.named_parameters():
            part = segments.shard(
                _source_layer(global_name(stage, name), layers),
                architecture,
                table,
                rank=rank,
                size=size,
                padded_vocab=vocabulary.padded,
            )
            with writable(parameter) as target:
                _copy(target, part, source, name)


def _copy(parameter: Tensor, part: segments.Shard, source: Source, name: str) -> None:
    assert tuple(parameter.shape) == part.shape, f"{name}: {list(parameter.shape)}, {part.shape}"
    filled = 0
    for tensor, start, stop, at in part.segments:
        assert at == filled, f"{name}: {filled} to {at} is in no tensor"
        target = parameter.narrow(part.axis, at, stop - start)
        values = source.read(tensor, part.axis, start, stop)
        assert values.shape == target.shape, f"{tensor}: {values.shape}, {name}: {target.shape}"
        target.copy_(values)
        filled = at + stop - start
    rest = part.shape[part.axis] - filled
    is_vocabulary = part.axis == 0 and name.startswith(("embedding.", "output_layer."))
    assert rest == 0 or is_vocabulary, f"{name}: the last {rest} of {part.shape} are in no tensor"
    parameter.narrow(part.axis, filled, rest).zero_()


def _source_layer(name: str, layers: Sequence[int] | None) -> str:
    """The global name with the number of the source's layer."""
    if layers is None or not name.startswith("decoder.layers."):
        return name
    before, _, number, rest = name.split(".", 3)
    return f"{before}.layers.{layers[int(number)]}.{rest}"


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""

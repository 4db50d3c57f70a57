"""A Hugging Face folder from a checkpoint, parameter by parameter, whatever layout saved it.

No model is built: each parameter is read whole from the checkpoint, cut into its tensors and
written behind the last one, so memory holds one parameter and a tensor of it. Several ranks share
the files between them. The folder appears under its name when it is complete, and not before.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_tools.manifest import sync_path
from taid_megatron.config.errors import UserError
from taid_megatron.config.hf import Family, family_for, write
from taid_megatron.config.schema import Architecture
from taid_megatron.conversion import safetensors_file, segments
from taid_megatron.conversion.checkpoint import CheckpointTensors
from taid_megatron.conversion.companions import write_companions
from taid_megatron.conversion.families import TABLES
from taid_megatron.conversion.safetensors_file import Spec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Export:
    """What is to be written."""

    source: CheckpointTensors
    architecture: Architecture
    family: Family
    dtype: torch.dtype | None
    """None: each tensor as it is stored."""

    def specs(self) -> dict[str, Spec]:
        """Every tensor, in the order of Megatron's parameters."""
        shapes = segments.tensors(self.architecture, TABLES[self.family.model_type])
        stored = {
            tensor: self.source.dtypes[name]
            for name in segments.parameters(self.architecture)
            for tensor in self.tensors_of(name)
        }
        return {name: Spec(shape, self.dtype or stored[name]) for name, shape in shapes.items()}

    def tensors_of(self, name: str) -> list[str]:
        """The tensors that a parameter is made of."""
        _, parts = segments.pieces(name, self.architecture, TABLES[self.family.model_type])
        return list(dict.fromkeys(part.tensor for part in parts))

    def produce(self, wanted: dict[str, Spec]) -> Iterator[tuple[str, Tensor]]:
        """The wanted tensors, in their order; each parameter is read once."""
        table = TABLES[self.family.model_type]
        for name, shape in segments.parameters(self.architecture).items():
            tensors = {tensor: None for tensor in self.tensors_of(name) if tensor in wanted}
            if not tensors:
                continue
            axis, parts = segments.pieces(name, self.architecture, table)
            whole = self.source.read(name, axis, 0, shape[axis])
            yield from _cut(whole, axis, parts, {tensor: wanted[tensor] for tensor in tensors})


def _cut(
    whole: Tensor, axis: int, parts: list[segments.Piece], wanted: dict[str, Spec]
) -> Iterator[tuple[str, Tensor]]:
    for tensor, spec in wanted.items():
        target = torch.empty(spec.shape, dtype=spec.dtype)
        offset = 0
        for name, start, stop in parts:
            if name == tensor:
                values = whole.narrow(axis, offset, stop - start)
                target.narrow(axis, start, stop - start).copy_(values)
            offset += stop - start
        assert offset == whole.shape[axis], f"{tensor}: {offset} of {whole.shape[axis]} rows"
        yield tensor, target


def export(
    source: CheckpointTensors,
    architecture: Architecture,
    out: Path,
    *,
    companions: Path,
    seq_length: int | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    rank: int = 0,
    size: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> Path:
    """Write `out`: weights, index, configuration, tokenizer. On every rank of `size`.

    companions: a folder or file with the tokenizer (see companions.py). seq_length: what stands for
    max_position_embeddings where the architecture has none. Raises UserError, and leaves no `out`.
    """
    family = family_for(architecture)
    if architecture.num_moe_experts is not None:
        raise UserError(f"{out}: a mixture of experts is a teacher, not a student to export")
    _check_parameters(source, architecture)
    job = Export(source, architecture, family, DTYPES[dtype] if dtype else None)
    specs = job.specs()
    files = plan_files(specs, parse_size(max_shard_size))
    unfinished = out.with_name(f".unfinished_{out.name}")
    try:
        if rank == 0:
            _refuse_existing(out)
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            # first, for a tokenizer that does not fit is the likeliest fault
            special_ids = write_companions(companions, unfinished, architecture.vocab_size)
            config = _config(architecture, family, specs, special_ids, seq_length)
            _write_json(unfinished / "config.json", config)
        barrier()
        for number, (file, names) in enumerate(files.items()):
            if number % size == rank:
                wanted = {name: specs[name] for name in names}
                safetensors_file.write(unfinished / file, wanted, job.produce(wanted))
        barrier()
        if rank == 0:
            _publish(unfinished, out, specs, files)
        barrier()
    except OSError as error:
        raise UserError(
            f"{out}: not written ({error}); give another folder or make room"
        ) from error
    return out


def plan_files(specs: dict[str, Spec], limit: int) -> dict[str, list[str]]:
    """Names of files -> tensors, in order; a file has at most `limit` bytes, or one tensor."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if files[-1] and filled + spec.num_bytes > limit:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += spec.num_bytes
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {
        f"model-{number:05d}-of-{len(files):05d}.safetensors": names
        for number, names in enumerate(files, start=1)
    }


def parse_size(text: str) -> int:
    """Bytes of '5GB', '500MB', '1GiB'. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise UserError(f"--max-shard-size {text}: expected a size such as 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _check_parameters(source: CheckpointTensors, architecture: Architecture) -> None:
    path = source.reader.path
    for name, shape in segments.parameters(architecture).items():
        stored = source.shapes.get(name)
        if stored is None:
            raise UserError(f"{path}: has no {name}; it is damaged or another model, take another")
        padded = name in (segments.EMBEDDING, segments.OUTPUT) and stored[0] >= shape[0]
        if stored != shape and not (padded and stored[1:] == shape[1:]):
            raise UserError(
                f"{path}: {name} has shape {list(stored)}, its state.json says {list(shape)}; it "
                "is damaged, take another"
            )


def _refuse_existing(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists; remove it or give another folder")


def _config(
    architecture: Architecture,
    family: Family,
    specs: dict[str, Spec],
    special_ids: dict[str, Any],
    seq_length: int | None,
) -> dict[str, Any]:
    length = architecture.max_position_embeddings or seq_length
    if length is None:
        raise UserError(
            "max_position_embeddings is neither in the architecture nor in the checkpoint; give "
            "--max-position-embeddings"
        )
    dtype = next(iter(specs.values())).dtype
    return {
        **write(architecture, family),
        "max_position_embeddings": length,
        **special_ids,
        "torch_dtype": _DTYPE_NAMES[dtype],
        "use_cache": True,
    }


def _publish(
    unfinished: Path, out: Path, specs: dict[str, Spec], files: dict[str, list[str]]
) -> None:
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        total = sum(spec.num_bytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(unfinished / _INDEX, index)
    for file in unfinished.iterdir():
        sync_path(file)
    sync_path(unfinished)
    unfinished.rename(out)
    sync_path(out.parent)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

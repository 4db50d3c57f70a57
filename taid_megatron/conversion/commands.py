"""`taid-megatron import` and `export`: folders in, folders out, on one rank or under torchrun."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from taid_megatron.checkpointing import store
from taid_megatron.config.checks import near_even
from taid_megatron.config.errors import UserError
from taid_megatron.config.hf import local_folder, read
from taid_megatron.config.schema import Architecture, Parallel
from taid_megatron.conversion import companions
from taid_megatron.conversion.checkpoint import open_checkpoint
from taid_megatron.conversion.hf_export import export
from taid_megatron.conversion.hf_folder import open_folder
from taid_megatron.conversion.hf_import import import_hf
from taid_megatron.models.build import build_stages, transformer_config
from taid_megatron.models.vocabulary import align
from taid_megatron.runtime import distributed
from taid_megatron.runtime.log import say


class _NoOptimizer:
    """A checkpoint of weights alone."""

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}


def import_folder(hf: Path, out: Path, precision: str | None = None) -> int:
    """Write a checkpoint of a Hugging Face model; several ranks split its layers between them.

    precision: 'fp32' or 'bf16'; none: bf16 where all of the model's tensors are, else fp32.
    Returns the exit code. Raises UserError.
    """
    folder = local_folder(hf)
    architecture = read(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists; remove it or give another folder")
    if precision is None:
        bf16 = set(open_folder(folder).dtypes.values()) == {torch.bfloat16}
        precision = "bf16" if bf16 else "fp32"
    parallel = Parallel(pipeline=distributed.world_size_from_environment())
    world = distributed.start(parallel, seed=0)
    try:
        dist.barrier()  # all ranks have looked at `out`
        vocabulary = align(architecture.vocab_size, None, 1)
        config = transformer_config(
            architecture,
            parallel,
            precision=precision,
            abilities=distributed.abilities(),
            layers_per_stage=tuple(near_even(architecture.num_layers, parallel.pipeline)),
        )
        stages = build_stages(architecture, config, vocabulary, seq_length=1)
        unused = import_hf(folder, stages, architecture, vocabulary)
        if unused:
            say(f"not used, as transformers does not either: {', '.join(unused)}")
        if world.is_main:
            companions.keep(folder, out / companions.FOLDER)
        path = store.begin(
            out,
            0,
            stages=stages,
            optimizer=_NoOptimizer(),
            random_state={},
            state={
                "format": 1,
                "consumed_samples": 0,
                "taid": None,
                "architecture": architecture.model_dump(mode="json"),
                "imported": folder.name,
            },
        ).complete()
        say(f"checkpoint: {path} ({precision})")
        return 0
    finally:
        distributed.stop(world)


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    tokenizer: Path | None = None,
    family: str | None = None,
    max_position_embeddings: int | None = None,
) -> int:
    """Write a Hugging Face folder of a checkpoint; several ranks share its files between them.

    tokenizer: a folder, tokenizer.json or .model; none: the one kept with the checkpoint. Returns
    the exit code. Raises UserError.
    """
    found = store.find(checkpoint)
    state = found.state()
    changes = {"hf_family": family, "max_position_embeddings": max_position_embeddings}
    architecture = Architecture.model_validate(
        {**state["architecture"], **{name: value for name, value in changes.items() if value}}
    )
    source = tokenizer or companions.find(found.path)
    if source is None:
        raise UserError(
            f"{found.path}: no tokenizer was kept with it; give --tokenizer (a Hugging Face "
            "folder, a tokenizer.json or a sentencepiece .model)"
        )
    size = distributed.world_size_from_environment()
    joins = size > 1 and not dist.is_initialized()
    if joins:
        dist.init_process_group("gloo")
    try:
        path = export(
            open_checkpoint(found.path),
            architecture,
            out,
            companions=source,
            seq_length=state.get("seq_length"),
            dtype=dtype,
            max_shard_size=max_shard_size,
            rank=int(os.environ.get("RANK", "0")),
            size=size,
            barrier=dist.barrier if size > 1 else lambda: None,
        )
    finally:
        if joins:
            dist.destroy_process_group()
    say(f"exported: {path}")
    return 0

"""Random weights that do not depend on the layout.

Megatron draws weights in the order in which a rank builds them, so that another pipeline split
starts another model. Here every tensor has a generator of its own, seeded by the run's seed and the
tensor's global name, and each rank takes its part of the whole: one process and 80 GPUs start from
the same weights, whatever the tensor, pipeline and vocabulary split.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core import parallel_state
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor

from taid_megatron.config.schema import Architecture
from taid_megatron.models.build import GPTStage


@torch.no_grad()
def initialize(stage: GPTStage, architecture: Architecture, seed: int) -> None:
    """Fill every parameter of a stage.

    Matrices are normal with deviation init_method_std, divided by sqrt(2 * num_layers) where they
    write into the residual stream (GPT-2, Megatron); biases 0; norms 1; rows of the padded
    vocabulary beyond the real one 0.
    """
    for name, parameter in stage.named_parameters():
        with writable(parameter) as target:
            _fill(target, parameter, global_name(stage, name), architecture, seed)


@contextmanager
def writable(parameter: Tensor) -> Iterator[Tensor]:
    """The parameter's values, to be written part by part.

    A weight kept in FP8 can only be written whole: a part of it would be a copy, and what is
    written there would be lost.
    """
    if not is_float8tensor(parameter):
        yield parameter
        return
    plain = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    yield plain
    parameter.copy_(plain)


def global_name(stage: GPTStage, name: str) -> str:
    """A parameter's name with layer and expert counted over all ranks; tied heads share one."""
    if name == "output_layer.weight" and stage.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    if not name.startswith("decoder.layers."):
        return name
    _, _, local, rest = name.split(".", 3)
    number = stage.decoder.layers[int(local)].layer_number - 1
    return f"decoder.layers.{number}.{_global_expert(stage, rest)}"


def _global_expert(stage: GPTStage, name: str) -> str:
    before, found, after = name.partition("local_experts.")
    if not found:
        return name
    local, rest = after.split(".", 1)
    assert stage.config.num_moe_experts is not None
    here = stage.config.num_moe_experts // stage.config.expert_model_parallel_size
    expert = parallel_state.get_expert_model_parallel_rank() * here + int(local)
    return f"{before}{found}{expert}.{rest}"


def _fill(
    target: Tensor, parameter: Tensor, name: str, architecture: Architecture, seed: int
) -> None:
    """target: the parameter's values; parameter: for Megatron's marks on it."""
    if name.endswith("bias"):
        target.zero_()
        return
    if "layernorm" in name or "layer_norm_" in name:  # Transformer Engine's spelling
        target.fill_(1.0)
        return
    std = architecture.init_method_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2.0 * architecture.num_layers)
    if "word_embeddings" in name or name.startswith("output_layer"):
        _fill_vocabulary(target, architecture.vocab_size, std, _generator(seed, name))
    elif name.endswith("linear_fc1.weight") and architecture.gated:
        # a shard holds its rows of the gate above its rows of the up projection
        gate, up = target.chunk(2, dim=0)
        _fill_shard(gate, 0, std, _generator(seed, name + ".gate"))
        _fill_shard(up, 0, std, _generator(seed, name + ".up"))
    else:
        # Megatron's marks on its parameters; norms and replicated weights have none or False
        sharded = getattr(parameter, "tensor_model_parallel", False)
        dim: int | None = parameter.partition_dim if sharded else None  # type: ignore[attr-defined]
        _fill_shard(target, dim, std, _generator(seed, name))


def _generator(seed: int, name: str) -> torch.Generator:
    # torch's CPU generator reads 32 bits of its seed: all of the run's seed must be in them
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _fill_shard(part: Tensor, dim: int | None, std: float, generator: torch.Generator) -> None:
    shape, rank = list(part.shape), 0
    if dim is not None:
        shape[dim] *= parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
    whole = torch.empty(shape, device="cpu").normal_(std=std, generator=generator)
    if dim is not None:
        whole = whole.narrow(dim, rank * part.shape[dim], part.shape[dim])
    part.copy_(whole)


def _fill_vocabulary(part: Tensor, size: int, std: float, generator: torch.Generator) -> None:
    rows, width = part.shape
    start = min(parallel_state.get_tensor_model_parallel_rank() * rows, size)
    real = min(start + rows, size) - start
    whole = torch.empty((size, width), device="cpu").normal_(std=std, generator=generator)
    part.zero_()
    part[:real].copy_(whole[start : start + real])

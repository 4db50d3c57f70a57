"""Sizes that follow from an architecture and a layout: parameters, operations, split over stages.

Counts are exact and are held against megatron-core's own models by tests.
"""

from __future__ import annotations

from dataclasses import dataclass

from taid_megatron.config.schema import Architecture, Parallel


@dataclass(frozen=True)
class Stage:
    """What one pipeline stage (with chunks: one chunk of one rank) holds of a model."""

    layers: int
    first: bool
    """Has the embedding."""
    last: bool
    """Has the last norm and the output layer."""


def stages(num_layers: int, split: tuple[int, ...] | None, parallel: Parallel) -> list[Stage]:
    """A model's stages in model order: pipeline * virtual_pipeline of them.

    Stage k lies on pipeline rank k % pipeline. split None: even, as the checks asked for.
    """
    count = parallel.pipeline * (parallel.virtual_pipeline or 1)
    layers = split or (num_layers // count,) * count
    return [Stage(size, k == 0, k == count - 1) for k, size in enumerate(layers)]


def layer_parameters(shape: Architecture, tensor: int) -> int:
    """Parameters of one layer on one of `tensor` ranks."""
    hidden, ffn = shape.hidden_size, shape.ffn_width
    query = shape.num_attention_heads * shape.head_channels
    qkv = query + 2 * shape.query_groups * shape.head_channels
    fc1 = (2 if shape.gated else 1) * ffn
    experts = shape.num_moe_experts or 1
    router = experts * hidden if shape.num_moe_experts else 0
    block = (qkv + query + experts * (fc1 + ffn)) * hidden
    count = block // tensor + router + 2 * _norm(shape, hidden)
    if shape.add_bias_linear:
        count += (qkv + experts * fc1) // tensor + (1 + experts) * hidden
    elif shape.add_qkv_bias:
        count += qkv // tensor
    if shape.qk_layernorm:
        count += 2 * _norm(shape, shape.head_channels)
    return count


def stage_parameters(shape: Architecture, stage: Stage, padded_vocab: int, tensor: int) -> int:
    """Parameters of a stage on one tensor-parallel rank.

    A tied weight is counted on the first and, where that is another one, on the last stage: both
    hold it.
    """
    table = padded_vocab // tensor * shape.hidden_size
    count = stage.layers * layer_parameters(shape, tensor)
    if stage.first:
        count += table
    if stage.last:
        count += _norm(shape, shape.hidden_size)
        count += 0 if shape.tie_embeddings and stage.first else table
    return count


def parameters(shape: Architecture) -> int:
    """Parameters of the whole model, padding of the vocabulary left out."""
    table = shape.vocab_size * shape.hidden_size
    layers = shape.num_layers * layer_parameters(shape, 1)
    tables = table if shape.tie_embeddings else 2 * table
    return layers + tables + _norm(shape, shape.hidden_size)


def layer_operations(shape: Architecture, seq_length: int) -> float:
    """Floating-point operations of one layer's forward, per token: products and causal attention.

    A token sees half of the sequence on average, or its sliding window.
    """
    hidden, ffn = shape.hidden_size, shape.ffn_width
    query = shape.num_attention_heads * shape.head_channels
    kv = 2 * shape.query_groups * shape.head_channels
    active = shape.moe_router_topk if shape.num_moe_experts else 1
    weights = (2 * query + kv + active * (3 if shape.gated else 2) * ffn) * hidden
    seen = min(seq_length / 2, shape.sliding_window or seq_length)
    return 2 * weights + 4 * query * seen


def head_operations(shape: Architecture, padded_vocab: int) -> float:
    """Floating-point operations of the output layer's forward, per token."""
    return 2 * shape.hidden_size * padded_vocab


def _norm(shape: Architecture, width: int) -> int:
    return width * (2 if shape.normalization == "LayerNorm" else 1)

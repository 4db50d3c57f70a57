"""From a Megatron parameter to parts of Hugging Face tensors: pure functions of sizes, no weights.

    parameters(architecture)                 every parameter of the whole model, with its shape
    pieces(name, architecture, table)        the tensors a whole parameter is made of, in order
    shard(name, architecture, table, ...)    the segments that one tensor-parallel rank holds

A segment is a copy between a tensor and a parameter along one axis. Import walks through it one
way, export the other; nothing else in this package knows how weights are laid out.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

from taid_megatron.config.schema import Architecture
from taid_megatron.conversion.families import Entry, Table, local_name

Shape = tuple[int, ...]
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(.*local_experts\.)(\d+)(\..+)")


class Piece(NamedTuple):
    """Rows (axis 0) or columns (axis 1) start to stop of a tensor."""

    tensor: str
    start: int
    stop: int


class Segment(NamedTuple):
    """tensor[start:stop] along an axis is parameter[at:at + stop - start] along the same axis."""

    tensor: str
    start: int
    stop: int
    at: int


class Shard(NamedTuple):
    """What one rank holds of a parameter."""

    axis: int
    shape: Shape
    segments: tuple[Segment, ...]
    """In the order of the parameter; they cover it, but for padding of the vocabulary."""


@functools.lru_cache(maxsize=4)
def parameters(a: Architecture) -> dict[str, Shape]:
    """Every parameter of the whole model by its global name, the vocabulary unpadded.

    A tied output layer is the embedding, so it is not among them.
    """
    hidden = a.hidden_size
    found: dict[str, Shape] = {EMBEDDING: (a.vocab_size, hidden)}
    for number in range(a.num_layers):
        layer = f"decoder.layers.{number}."
        found |= {f"{layer}{name}": shape for name, shape in _layer(a).items()}
    found |= _norm("decoder.final_layernorm", hidden, a)
    if not a.tie_embeddings:
        found[OUTPUT] = (a.vocab_size, hidden)
    return found


def _layer(a: Architecture) -> dict[str, Shape]:
    hidden, heads = a.hidden_size, a.num_attention_heads * a.head_channels
    qkv = heads + 2 * a.query_groups * a.head_channels
    found = _norm("input_layernorm", hidden, a)
    attention = "self_attention."
    found |= _linear(f"{attention}linear_qkv", qkv, hidden, a.add_bias_linear or a.add_qkv_bias)
    found |= _linear(f"{attention}linear_proj", hidden, heads, a.add_bias_linear)
    if a.qk_layernorm:
        found |= _norm(f"{attention}q_layernorm", a.head_channels, a)
        found |= _norm(f"{attention}k_layernorm", a.head_channels, a)
    found |= _norm("pre_mlp_layernorm", hidden, a)
    if a.num_moe_experts is None:
        return found | _feed_forward("mlp.", a)
    found["mlp.router.weight"] = (a.num_moe_experts, hidden)
    for expert in range(a.num_moe_experts):
        found |= _feed_forward(f"mlp.experts.local_experts.{expert}.", a)
    return found


def _feed_forward(prefix: str, a: Architecture) -> dict[str, Shape]:
    width = a.ffn_width * (2 if a.gated else 1)
    return {
        **_linear(f"{prefix}linear_fc1", width, a.hidden_size, a.add_bias_linear),
        **_linear(f"{prefix}linear_fc2", a.hidden_size, a.ffn_width, a.add_bias_linear),
    }


def _linear(name: str, rows: int, columns: int, bias: bool) -> dict[str, Shape]:
    return {f"{name}.weight": (rows, columns), **({f"{name}.bias": (rows,)} if bias else {})}


def _norm(name: str, size: int, a: Architecture) -> dict[str, Shape]:
    both = a.normalization == "LayerNorm"
    return {f"{name}.weight": (size,), **({f"{name}.bias": (size,)} if both else {})}


def pieces(name: str, a: Architecture, table: Table) -> tuple[int, list[Piece]]:
    """(axis, tensors and ranges) that make up a whole parameter in order along the axis.

    Raises KeyError for a parameter that the table has no entry for.
    """
    kind, tensors = _entry(name, table)
    shape = parameters(a)[name]
    axis = 1 if kind == "row" else 0
    return axis, _PIECES[kind](tensors, shape[axis], a)


def tensors(a: Architecture, table: Table) -> dict[str, Shape]:
    """Every tensor of a Hugging Face model, and its shape, in the order of Megatron's parameters.

    Raises AssertionError where the table's pieces do not tile the tensors exactly.
    """
    found: dict[str, Shape] = {}
    for name, shape in parameters(a).items():
        axis, parts = pieces(name, a, table)
        for tensor in dict.fromkeys(part.tensor for part in parts):
            ends = 0
            for _, start, stop in sorted(part for part in parts if part.tensor == tensor):
                assert start == ends, f"{tensor}: {ends} to {start} is in no parameter, or in two"
                ends = stop
            assert tensor not in found, f"{tensor} is in two parameters"
            found[tensor] = (*shape[:axis], ends, *shape[axis + 1 :])
    return found


def shard(
    name: str, a: Architecture, table: Table, *, rank: int, size: int, padded_vocab: int
) -> Shard:
    """What tensor-parallel rank `rank` of `size` holds of a parameter.

    name: global, of the local or of Transformer Engine's layers. padded_vocab: rows of the padded
    vocabulary over all ranks.
    """
    name = local_name(name)
    kind, _ = _entry(name, table)
    axis, parts = pieces(name, a, table)
    shape = list(parameters(a)[name])
    if kind == "replicated":
        return Shard(axis, tuple(shape), tuple(_cut(parts, 0, shape[axis])))
    if kind == "vocab":
        shape[0] = padded_vocab
    # a gated projection's halves are sharded one by one, everything else in one go
    blocks = 2 if kind == "glu" else 1
    length, share = shape[axis] // blocks, shape[axis] // blocks // size
    segments: list[Segment] = []
    for block in range(blocks):
        start = block * length + rank * share
        segments += _cut(parts, start, start + share, at=block * share)
    shape[axis] = blocks * share
    return Shard(axis, tuple(shape), tuple(segments))


def _cut(parts: list[Piece], start: int, stop: int, at: int = 0) -> list[Segment]:
    """The part from start to stop of pieces laid end to end; `at`: where it lies in the shard."""
    found, offset = [], 0
    for tensor, first, last in parts:
        low, high = max(start, offset), min(stop, offset + last - first)
        if low < high:
            found.append(
                Segment(tensor, first + low - offset, first + high - offset, at + low - start)
            )
        offset += last - first
    return found


def _entry(name: str, table: Table) -> Entry:
    """A parameter's kind and the names of its tensors."""
    layer = _LAYER.fullmatch(name)
    number, inner = (layer[1], layer[2]) if layer else ("", name)
    expert = _EXPERT.fullmatch(inner)
    if expert:
        inner = f"{expert[1]}{{expert}}{expert[3]}"
    kind, templates = table[inner]
    of = {"layer": number, "expert": expert[2] if expert else ""}
    return Entry(kind, tuple(template.format(**of) for template in templates))


def _one(tensors: tuple[str, ...], length: int, a: Architecture) -> list[Piece]:
    (tensor,) = tensors
    return [Piece(tensor, 0, length)]


def _qkv(tensors: tuple[str, ...], length: int, a: Architecture) -> list[Piece]:
    """Per query group: its queries, its key, its value."""
    groups, channels = a.query_groups, a.head_channels
    queries = a.num_attention_heads // groups * channels
    widths = (queries, channels, channels)
    # where queries, keys and values begin: in tensors of their own, or one behind the other
    starts = (0, 0, 0)
    if len(tensors) == 1:
        tensors = tensors * 3
        starts = (0, groups * queries, groups * (queries + channels))
    return [
        Piece(tensor, start + group * width, start + (group + 1) * width)
        for group in range(groups)
        for tensor, start, width in zip(tensors, starts, widths, strict=True)
    ]


def _glu(tensors: tuple[str, ...], length: int, a: Architecture) -> list[Piece]:
    """The gate's rows, then the up projection's."""
    if len(tensors) == 1:
        return [Piece(tensors[0], 0, length)]
    return [Piece(tensor, 0, length // 2) for tensor in tensors]


_PIECES: dict[str, Callable[[tuple[str, ...], int, Architecture], list[Piece]]] = {
    "vocab": _one,
    "replicated": _one,
    "col": _one,
    "row": _one,
    "qkv": _qkv,
    "glu": _glu,
}

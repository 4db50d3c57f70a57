"""Which Hugging Face tensors a Megatron parameter is made of: one table per family.

A table maps a parameter's name (inside a layer: without `decoder.layers.N.`) to a kind and to names
of tensors, `{layer}` being the layer's number and `{expert}` an expert's. The kinds say how the
tensors lie in the whole parameter (before tensor parallelism) and along which axis it is sharded:

    vocab        rows are token ids; padded at the end; sharded by rows
    replicated   the same on every rank
    col          one tensor, sharded by rows (the output of a column-parallel linear)
    row          one tensor, sharded by columns (the input of a row-parallel linear)
    qkv          per query group: its queries, its key, its value; sharded by rows. Its tensors:
                 queries, keys, values, or one with the three stacked
    glu          gate above up; each half sharded by rows. Its tensors: gate, up, or one with both

Names of Transformer Engine's layers, where a norm's weight lies in the linear behind it, are turned
into the local layers' first (`local_name`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Entry(NamedTuple):
    """How a parameter is made of tensors."""

    kind: str
    tensors: tuple[str, ...]


Table = Mapping[str, Entry]

_L = "model.layers.{layer}."


def _entries(kind: str, parameter: str, *tensors: str, biased: bool = True) -> dict[str, Entry]:
    """A linear's or norm's weight and bias. A row-parallel bias is added after the reduction."""
    bias_kind = "replicated" if kind == "row" else kind
    found = {f"{parameter}.weight": Entry(kind, tuple(f"{name}.weight" for name in tensors))}
    if biased:
        found[f"{parameter}.bias"] = Entry(bias_kind, tuple(f"{name}.bias" for name in tensors))
    return found


_ENDS: Table = {
    **_entries("vocab", "embedding.word_embeddings", "model.embed_tokens", biased=False),
    **_entries("replicated", "decoder.final_layernorm", "model.norm"),
    **_entries("vocab", "output_layer", "lm_head", biased=False),
}
_NORMS: Table = {
    **_entries("replicated", "input_layernorm", _L + "input_layernorm"),
    **_entries("replicated", "pre_mlp_layernorm", _L + "post_attention_layernorm"),
}
_ATTENTION: Table = {
    **_entries(
        "qkv",
        "self_attention.linear_qkv",
        *(f"{_L}self_attn.{part}_proj" for part in ("q", "k", "v")),
    ),
    **_entries("row", "self_attention.linear_proj", _L + "self_attn.o_proj"),
    **_entries("replicated", "self_attention.q_layernorm", _L + "self_attn.q_norm", biased=False),
    **_entries("replicated", "self_attention.k_layernorm", _L + "self_attn.k_norm", biased=False),
}
_MLP: Table = {
    **_entries("glu", "mlp.linear_fc1", _L + "mlp.gate_proj", _L + "mlp.up_proj"),
    **_entries("row", "mlp.linear_fc2", _L + "mlp.down_proj"),
}
_LLAMA: Table = {**_ENDS, **_NORMS, **_ATTENTION, **_MLP}

_EXPERT = _L + "block_sparse_moe.experts.{expert}."
_LOCAL_EXPERT = "mlp.experts.local_experts.{expert}."

TABLES: Mapping[str, Table] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "stablelm": _LLAMA,
    "phi3": {
        **_LLAMA,
        **_entries("qkv", "self_attention.linear_qkv", _L + "self_attn.qkv_proj"),
        **_entries("glu", "mlp.linear_fc1", _L + "mlp.gate_up_proj"),
    },
    "gpt_neox": {
        **_entries("vocab", "embedding.word_embeddings", "gpt_neox.embed_in", biased=False),
        **_entries("replicated", "decoder.final_layernorm", "gpt_neox.final_layer_norm"),
        **_entries("vocab", "output_layer", "embed_out", biased=False),
        **_entries("replicated", "input_layernorm", "gpt_neox.layers.{layer}.input_layernorm"),
        **_entries(
            "replicated", "pre_mlp_layernorm", "gpt_neox.layers.{layer}.post_attention_layernorm"
        ),
        # its rows lie as Megatron's do: per head, query, key and value
        **_entries(
            "col",
            "self_attention.linear_qkv",
            "gpt_neox.layers.{layer}.attention.query_key_value",
        ),
        **_entries("row", "self_attention.linear_proj", "gpt_neox.layers.{layer}.attention.dense"),
        **_entries("col", "mlp.linear_fc1", "gpt_neox.layers.{layer}.mlp.dense_h_to_4h"),
        **_entries("row", "mlp.linear_fc2", "gpt_neox.layers.{layer}.mlp.dense_4h_to_h"),
    },
    "mixtral": {
        **_ENDS,
        **_NORMS,
        **_ATTENTION,
        **_entries("replicated", "mlp.router", _L + "block_sparse_moe.gate", biased=False),
        **_entries(
            "glu", f"{_LOCAL_EXPERT}linear_fc1", f"{_EXPERT}w1", f"{_EXPERT}w3", biased=False
        ),
        **_entries("row", f"{_LOCAL_EXPERT}linear_fc2", f"{_EXPERT}w2", biased=False),
    },
}


def megatron_table(gated: bool) -> Table:
    """The table of whole Megatron parameters: what a checkpoint of this system holds."""
    layer = "decoder.layers.{layer}."
    kinds = {
        "input_layernorm": "replicated",
        "self_attention.linear_qkv": "col",
        "self_attention.linear_proj": "row",
        "self_attention.q_layernorm": "replicated",
        "self_attention.k_layernorm": "replicated",
        "pre_mlp_layernorm": "replicated",
        "mlp.linear_fc1": "glu" if gated else "col",
        "mlp.linear_fc2": "row",
    }
    ends = ("embedding.word_embeddings", "output_layer")
    table = {key: entry for end in ends for key, entry in _entries("vocab", end, end).items()}
    table |= _entries("replicated", "decoder.final_layernorm", "decoder.final_layernorm")
    for name, kind in kinds.items():
        table |= _entries(kind, name, f"{layer}{name}")
    return table


NOT_WEIGHTS: Mapping[str, tuple[str, ...]] = {
    "gpt_neox": (".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq"),
}
"""Endings of tensors that old files carry and no model reads."""
NEVER_WEIGHTS = (".rotary_emb.inv_freq",)
"""The same, in any family."""

# Transformer Engine folds a norm into the linear that follows it.
_FOLDED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias",
}


def local_name(name: str) -> str:
    """A parameter's name with the local layers, for one of either kind of layers."""
    for folded, norm in _FOLDED_NORMS.items():
        if name.endswith(f".{folded}") or name == folded:
            return name.removesuffix(folded) + norm
    return name

"""Segments cover every parameter and every tensor exactly once, whatever the sizes and ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taid_megatron.config.hf import FAMILIES, family_for
from taid_megatron.config.schema import Architecture
from taid_megatron.conversion import segments
from taid_megatron.conversion.families import TABLES, Table, local_name, megatron_table

SHAPES = {
    "llama": {"tie_embeddings": True},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True, "kv_channels": 6},
    "mistral": {"sliding_window": 4},
    "phi3": {"rotary_percent": 0.5},
    "gpt_neox": {
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "activation": "gelu",
        "parallel_residual": True,
        "rotary_percent": 0.5,
        "num_query_groups": 8,
    },
    "stablelm": {"normalization": "LayerNorm", "rotary_percent": 0.5},
    "mixtral": {"num_moe_experts": 3},
}


def architecture(family: str, **sizes: int) -> Architecture:
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 8, "vocab_size": 157}
    return Architecture.model_validate(
        {**shape, "ffn_hidden_size": 24, "num_query_groups": 2, **SHAPES[family], **sizes}
    )


def whole_parameters(a: Architecture, table: Table, hf: dict[str, torch.Tensor]) -> dict:
    return {
        name: shard_of(name, a, table, hf, rank=0, size=1, padded=a.vocab_size)
        for name in segments.parameters(a)
    }


def shard_of(name, a, table, hf, *, rank, size, padded) -> torch.Tensor:
    part = segments.shard(name, a, table, rank=rank, size=size, padded_vocab=padded)
    target = torch.full(part.shape, -1.0)
    for tensor, start, stop, at in part.segments:
        values = hf[tensor].narrow(part.axis, start, stop - start)
        target.narrow(part.axis, at, stop - start).copy_(values)
    return target


def numbered(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors whose every element is another number."""
    found, start = {}, 0
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        found[name] = torch.arange(start, start + count, dtype=torch.float64).view(shape).float()
        start += count
    assert start < 2**24, "fp32 could not hold them apart"
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_of_every_tensor_is_in_one_place(family: str):
    a = architecture(family)
    hf = numbered(segments.tensors(a, TABLES[family]))
    whole = whole_parameters(a, TABLES[family], hf)
    counts = torch.cat([values.flatten() for values in whole.values()]).sort().values
    assert torch.equal(counts, torch.arange(len(counts)).float())


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_are_cut_from_the_whole_as_megatron_cuts(family: str, size: int):
    """megatron-core shards a whole parameter evenly, a gated one in halves; 2 query groups, so
    that 4 and 8 ranks share a group's projection."""
    a = architecture(family)
    table, padded = TABLES[family], 160
    hf = numbered(segments.tensors(a, table))
    for name, whole in whole_parameters(a, table, hf).items():
        parts = [
            shard_of(name, a, table, hf, rank=rank, size=size, padded=padded)
            for rank in range(size)
        ]
        if name in (segments.EMBEDDING, segments.OUTPUT):
            joined = torch.cat(parts)
            assert torch.equal(joined[:157], whole)
            assert (joined[157:] == -1).all()
        elif "linear_fc1" in name and a.gated:
            halves = zip(*(part.chunk(2) for part in parts), strict=True)
            assert torch.equal(torch.cat([torch.cat(half) for half in halves]), whole)
        elif "linear_qkv" in name or "linear_fc1" in name:
            assert torch.equal(torch.cat(parts), whole)
        elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            assert torch.equal(torch.cat(parts, 1), whole)
        else:
            assert all(torch.equal(part, whole) for part in parts)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 4]),
    per_group=st.integers(1, 3),
    channels=st.sampled_from([2, 4]),
    stacked=st.booleans(),
)
def test_query_key_value_lie_by_group(groups: int, per_group: int, channels: int, stacked: bool):
    heads = groups * per_group
    a = architecture(
        "phi3" if stacked else "llama",
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=channels,
    )
    table = TABLES["phi3" if stacked else "llama"]
    hf = numbered(segments.tensors(a, table))
    layer = "model.layers.1.self_attn."
    if stacked:
        rows = [heads * channels, groups * channels, groups * channels]
        query, key, value = hf[f"{layer}qkv_proj.weight"].split(rows)
    else:
        query, key, value = (hf[f"{layer}{part}_proj.weight"] for part in ("q", "k", "v"))
    by_group = zip(query.chunk(groups), key.chunk(groups), value.chunk(groups), strict=True)
    expected = torch.cat([part for group in by_group for part in group])
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    found = shard_of(name, a, table, hf, rank=0, size=1, padded=157)
    assert torch.equal(found, expected)


def test_transformer_engine_s_folded_norms_are_the_norms():
    a, table = architecture("stablelm"), TABLES["stablelm"]
    hf = numbered(segments.tensors(a, table))
    for folded, tensor in {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
        "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
        "mlp.linear_fc1.layer_norm_bias": "post_attention_layernorm.bias",
    }.items():
        name = f"decoder.layers.1.{folded}"
        found = shard_of(name, a, table, hf, rank=1, size=2, padded=160)
        assert torch.equal(found, hf[f"model.layers.1.{tensor}"]), name
    assert local_name("decoder.layers.1.mlp.linear_fc1.weight").endswith("linear_fc1.weight")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mixtral"])
def test_a_checkpoint_s_own_table_cuts_alike(family: str):
    """Whole Megatron parameters as tensors: the same shards as from Hugging Face's."""
    a = architecture(family)
    hf = numbered(segments.tensors(a, TABLES[family]))
    whole = whole_parameters(a, TABLES[family], hf)
    own = megatron_table(a.gated)
    assert segments.tensors(a, own) == {name: tuple(t.shape) for name, t in whole.items()}
    for name in whole:
        for rank in range(2):
            sizes = {"rank": rank, "size": 2, "padded": 160}
            assert torch.equal(
                shard_of(name, a, own, whole, **sizes),
                shard_of(name, a, TABLES[family], hf, **sizes),
            )


def test_a_table_that_loses_rows_is_caught():
    a = architecture("phi3")
    short = {**TABLES["phi3"]}
    kind, names = short["mlp.linear_fc1.weight"]
    short["mlp.linear_fc2.weight"] = type(short["mlp.linear_fc1.weight"])(kind, names)
    with pytest.raises(AssertionError, match="gate_up_proj"):
        segments.tensors(a, short)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_architecture_finds_its_family(family: str):
    assert family_for(architecture(family)).model_type == family

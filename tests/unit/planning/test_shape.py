"""Parameter counts against the published ones; operations by hand."""

from __future__ import annotations

import pytest

from taid_megatron.config.load import load
from taid_megatron.config.schema import Architecture, Parallel
from taid_megatron.planning.shape import (
    head_operations,
    layer_operations,
    parameters,
    stage_parameters,
    stages,
)

from . import RECIPES

# TinyLlama's, Phi-3's and Qwen2's safetensors totals; Pythia's from the table in its README.
PUBLISHED = {
    ("taid_phi3_tinyllama", "student"): 1_100_048_384,
    ("taid_phi3_tinyllama", "teacher"): 3_821_079_552,
    ("taid_qwen2_72b_1_5b", "student"): 1_543_714_304,
    ("taid_qwen2_72b_1_5b", "teacher"): 72_706_203_648,
    ("taid_pythia_410m_70m", "student"): 70_426_624,
    ("taid_pythia_410m_70m", "teacher"): 405_334_016,
    ("taid_pythia_1b_70m", "teacher"): 1_011_781_632,
    ("taid_pythia_1_4b_70m", "teacher"): 1_414_647_808,
    ("taid_pythia_2_8b_70m", "teacher"): 2_775_208_960,
    ("taid_pythia_6_9b_70m", "teacher"): 6_857_302_016,
}


@pytest.mark.parametrize(("recipe", "model"), PUBLISHED)
def test_parameters_are_the_published_number(recipe: str, model: str) -> None:
    config = load(RECIPES / f"{recipe}.yaml")
    shape = getattr(config, model).architecture
    assert parameters(shape) == PUBLISHED[recipe, model]


def test_a_mixture_counts_every_expert_and_computes_with_some() -> None:
    mixtral = Architecture(
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_query_groups=8,
        ffn_hidden_size=14336,
        vocab_size=32000,
        num_moe_experts=8,
    )
    assert parameters(mixtral) == 46_702_792_704
    dense = mixtral.model_copy(update={"num_moe_experts": None})
    expert = 2 * 3 * 4096 * 14336
    assert layer_operations(mixtral, 8) - layer_operations(dense, 8) == expert


@pytest.mark.parametrize("tied", [False, True])
def test_stages_and_tensor_ranks_add_up_to_the_model(tied: bool) -> None:
    shape = Architecture(
        num_layers=6, hidden_size=64, num_attention_heads=4, vocab_size=512, tie_embeddings=tied
    )
    layout = Parallel(pipeline=3, virtual_pipeline=2)
    parts = stages(6, (0, 2, 1, 1, 1, 1), layout)
    whole = sum(stage_parameters(shape, part, 512, 1) for part in parts)
    # both ends hold a tied weight
    assert whole == parameters(shape) + (512 * 64 if tied else 0)
    norms = (2 * 6 + 1) * 64
    half = sum(stage_parameters(shape, part, 512, 2) for part in parts)
    assert 2 * half == whole + norms


def test_operations_by_hand() -> None:
    shape = Architecture(
        num_layers=1, hidden_size=8, num_attention_heads=2, ffn_hidden_size=16, vocab_size=10
    )
    weights = 8 * 8 * 4 + 3 * 8 * 16
    # scores and their product with the values: 2 * 2 * 8 operations per token seen, 10 on average
    assert layer_operations(shape, 20) == 2 * weights + 32 * 10
    assert head_operations(shape, 128) == 2 * 8 * 128

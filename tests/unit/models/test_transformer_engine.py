"""Transformer Engine's layers as far as that can be held without a GPU: through a stand-in.

megatron-core's own layer of Transformer Engine's modules is built, with torch modules that have
their names, parameters and extra state in place of Transformer Engine's. So names, initial
weights, import and checkpoints are the real code's; what the modules compute is not.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch.nn.functional import rms_norm

from taid_megatron.checkpointing import store
from taid_megatron.config.hf import read
from taid_megatron.config.load import load
from taid_megatron.config.schema import Architecture, Parallel
from taid_megatron.conversion.commands import _NoOptimizer
from taid_megatron.conversion.families import local_name
from taid_megatron.conversion.hf_import import import_hf
from taid_megatron.models import build, initialize
from taid_megatron.models.attention import TorchAttention
from taid_megatron.models.build import GPTStage, build_stages, transformer_config
from taid_megatron.models.local_layers import RotaryAttention
from taid_megatron.models.norms import RMSNorm
from taid_megatron.models.vocabulary import align
from taid_megatron.runtime import distributed
from taid_megatron.training.setup import build_trainer
from tests.distributed import hf_models, toy
from tests.distributed.ranks import run_ranks

PARALLEL = Parallel()
SHAPE = Architecture(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=100)


class NormLinear(ColumnParallelLinear):
    """As TELayerNormColumnParallelLinear: a linear with the weight of the norm before it."""

    fuse_wgrad_accumulation = False

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        weight = torch.ones(input_size, dtype=config.params_dtype)
        self.layer_norm_weight = torch.nn.Parameter(weight)
        # megatron-core's linears forgive a missing extra state by themselves
        self._load_state_dict_pre_hooks.clear()

    def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> Any:
        normed = rms_norm(
            x, self.layer_norm_weight.shape, self.layer_norm_weight, self.config.layernorm_epsilon
        )
        return super().forward(normed, *args, **options)

    def get_extra_state(self) -> torch.Tensor:
        return torch.zeros(3, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("FP8 state came out of a checkpoint")


class Backend(LocalSpecProvider):
    """As TESpecProvider."""

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return NormLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RMSNorm


def abilities() -> Any:
    """This machine's, as if it had a GPU and Transformer Engine."""
    return replace(distributed.abilities(), has_cuda=True, has_transformer_engine=True)


def stand_in() -> None:
    """For this process, a rank of its own."""
    gpt_layer_specs.TESpecProvider = Backend
    build.TENorm = RMSNorm


def stage(folder: Path, engine: bool, **options: Any) -> GPTStage:
    architecture = read(folder)
    config = transformer_config(architecture, PARALLEL, precision="fp32", abilities=abilities())
    vocabulary = align(architecture.vocab_size, None, 1)
    (built,) = build_stages(
        *(architecture, config, vocabulary),
        seq_length=hf_models.SEQ_LENGTH,
        transformer_engine=engine,
        **options,
    )
    return built


@torch.no_grad()
def logits(model: GPTStage, ids: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return model.eval()(ids, positions, None).transpose(0, 1)[..., : hf_models.VOCABULARY]


def weights(model: GPTStage) -> dict[str, torch.Tensor]:
    return {local_name(name): weight.detach() for name, weight in model.named_parameters()}


def assert_same(one: GPTStage, other: GPTStage) -> None:
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)


def whole_life(rank: int, size: int, root: Path) -> None:
    """Initial weights, import, and checkpoints from either kind of layer into the other."""
    stand_in()
    world = distributed.start(PARALLEL, seed=1)
    folder = hf_models.write("llama", root / "llama")
    architecture = read(folder)
    kinds = {
        name: [stage(folder, engine=name == "te", documents_apart=True) for _ in range(2)]
        for name in ("te", "local")
    }
    (engine, other_engine), (local, other_local) = kinds["te"], kinds["local"]
    assert isinstance(engine.decoder.layers[0].mlp.linear_fc1, NormLinear)
    assert isinstance(engine.decoder.layers[0].self_attention.core_attention, TorchAttention)

    for model in (engine, local):
        initialize.initialize(model, architecture, seed=3)
    assert_same(engine, local)

    vocabulary = align(architecture.vocab_size, None, 1)
    import_hf(folder, [engine], architecture, vocabulary)
    reference = torch.load(folder / "reference.pt")
    found = logits(engine, reference["ids"])
    assert (found - reference["logits"]).abs().max() <= 2e-5

    for name, source, target in (("te", engine, other_local), ("local", other_local, other_engine)):
        arguments = {"optimizer": _NoOptimizer(), "random_state": {}, "state": {}}
        path = store.begin(root / name, 0, stages=[source], **arguments).complete()
        store.load_weights(store.find(path), [target])
        assert torch.equal(logits(source, reference["ids"]), logits(target, reference["ids"]))
    assert_same(engine, other_local)
    assert_same(other_engine, other_local)
    distributed.stop(world)


def test_a_model_is_the_same_with_either_kind_of_layers(tmp_path) -> None:
    run_ranks(1, whole_life, tmp_path)


def chosen(rank: int, size: int, path: str) -> None:
    """A bf16 student with Transformer Engine's layers beside an fp32 teacher without."""
    stand_in()
    config = load(path, ["training.precision=bf16", "teacher.precision=fp32"])
    world = distributed.start(config.parallel, config.run.seed)
    (pair,) = build_trainer(config, world, abilities()).pairs
    assert pair.teacher is not None
    student, teacher = (model.decoder.layers[0] for model in (pair.student, pair.teacher))
    assert isinstance(student.mlp.linear_fc1, NormLinear)
    assert student.mlp.linear_fc1.fuse_wgrad_accumulation
    assert isinstance(student.self_attention, RotaryAttention)
    # megatron-core's, which the stand-in has for Transformer Engine's
    assert isinstance(student.self_attention.core_attention, DotProductAttention)
    assert isinstance(teacher.self_attention.core_attention, TorchAttention)
    assert not isinstance(teacher.mlp.linear_fc1, NormLinear)
    distributed.stop(world)


def test_the_configuration_chooses_for_each_model(tmp_path) -> None:
    run_ranks(1, chosen, str(toy.write_config(tmp_path)))


@pytest.mark.parametrize(
    ("context", "window", "own"), [(1, 8, False), (2, None, False), (2, 8, True)]
)
def test_a_window_around_a_ring_takes_torch_s_attention(monkeypatch, context, window, own) -> None:
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", Backend, raising=False)
    shape = SHAPE.model_copy(update={"sliding_window": window})
    parallel = Parallel(context=context)
    config = transformer_config(shape, parallel, precision="bf16", abilities=abilities())
    layer, _ = build._transformer_engine_layer(config, shape, documents_apart=False)
    attention = layer.submodules.self_attention.submodules.core_attention
    assert (attention is TorchAttention) == own


@pytest.mark.parametrize(
    ("recipe", "frozen", "expected"),
    [
        ("none", False, (None, False)),
        ("delayed", False, ("hybrid", False)),
        ("tensorwise", True, ("hybrid", True)),
        ("blockwise", False, ("e4m3", False)),
        ("mxfp8", True, ("e4m3", True)),
    ],
)
def test_fp8_in_megatron_s_words(recipe, frozen, expected) -> None:
    config = transformer_config(
        *(SHAPE, PARALLEL),
        precision="bf16",
        abilities=abilities(),
        fp8=recipe,
        frozen=frozen,
    )
    assert (config.fp8, config.fp8_param) == expected
    if recipe != "none":
        assert Fp8Recipe(config.fp8_recipe) == Fp8Recipe[recipe]
        assert config.fp8_amax_history_len == 1024
    # fused into main_grad by Transformer Engine's own product, not by Apex, which is not there
    assert not config.gradient_accumulation_fusion


def test_a_weight_in_fp8_is_written_whole(monkeypatch) -> None:
    """Its slices are copies: nothing may be written before the end."""
    weight = torch.zeros(4, 2)
    monkeypatch.setattr(initialize, "is_float8tensor", lambda tensor: tensor is weight)
    with initialize.writable(weight) as target:
        target[1:] = 7.0
        target[:1] = 5.0
        assert not weight.any()
    assert weight[:, 0].tolist() == [5.0, 7.0, 7.0, 7.0]

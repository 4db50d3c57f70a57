"""Weights of Hugging Face models under every layout: logits as transformers computes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from taid_megatron.config.hf import read
from taid_megatron.config.schema import Parallel
from taid_megatron.conversion.hf_import import import_hf
from taid_megatron.models.build import build_stages, transformer_config
from taid_megatron.models.vocabulary import align
from taid_megatron.runtime import distributed

from . import hf_models
from .ranks import run_ranks

LAYOUTS = {"1x1": (1, 1), "TP=2": (2, 1), "PP=2": (1, 2), "TP=2 PP=2": (2, 2)}
EXPERTS = {
    "EP=2": {"expert": 2},
    "EP=2 TP=2 SP": {"expert": 2, "tensor": 2, "sequence_parallel": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hf")
    options: dict = {"mistral": {"max_shard_size": "20KB"}, "qwen3": {"as_bin": True}}
    for name in hf_models.MODELS:
        hf_models.write(name, root / name, **options.get(name, {}))
    assert len(list((root / "mistral").glob("*.safetensors"))) > 2
    for name in ("llama", "gpt_neox", "stablelm"):
        hf_models.older(root / name)
    return root


def differences(rank: int, size: int, root: Path, tensor: int, pipeline: int) -> dict[str, float]:
    """Per model the largest difference to transformers' logits; all models in one process."""
    parallel = Parallel(tensor=tensor, pipeline=pipeline)
    world = distributed.start(parallel, seed=1)
    try:
        return {name: difference(world, root / name, parallel) for name in hf_models.MODELS}
    finally:
        distributed.stop(world)


def mixture_difference(rank: int, size: int, root: Path, layout: dict) -> float:
    """The mixture's largest difference to transformers' logits."""
    parallel = Parallel(**layout)
    world = distributed.start(parallel, seed=1)
    try:
        return difference(world, root / "mixtral", parallel)
    finally:
        distributed.stop(world)


@torch.no_grad()
def difference(world: distributed.World, folder: Path, parallel: Parallel) -> float:
    tensor, pipeline = parallel.tensor, parallel.pipeline
    architecture = read(folder)
    layers = architecture.num_layers
    config = transformer_config(
        architecture,
        parallel,
        precision="fp32",
        abilities=distributed.abilities(),
        layers_per_stage=(layers,) if pipeline == 1 else (layers - 1, 1),
    )
    vocabulary = align(architecture.vocab_size, None, tensor)
    stages = build_stages(architecture, config, vocabulary, seq_length=hf_models.SEQ_LENGTH)
    assert import_hf(folder, stages, architecture, vocabulary) == []
    (stage,) = stages
    stage.eval()
    reference = torch.load(folder / "reference.pt")
    # replicas have different texts, which a mixture's experts must not mix up
    ids, expected = (reference[name].roll(world.data_rank, 0) for name in ("ids", "logits"))
    worst = distance(world, forward(world, stage, ids), expected)
    if "documents" in reference:
        numbers, positions = hf_models.documents()
        stage.reset_positions = True
        logits = forward(world, stage, reference["ids"], positions, numbers)
        worst = max(worst, distance(world, logits, reference["documents"]))
    return worst


def distance(
    world: distributed.World, logits: torch.Tensor | None, expected: torch.Tensor
) -> float:
    """Largest difference of the last stage's shards; 0 on other stages."""
    if logits is None:
        return 0.0
    shards = [torch.empty_like(logits) for _ in range(world.groups.tp.size())]
    dist.all_gather(shards, logits, group=world.groups.tp)
    whole = torch.cat(shards, -1).transpose(0, 1)
    assert (whole[..., hf_models.VOCABULARY :] == 0).all()
    return (whole[..., : hf_models.VOCABULARY] - expected).abs().max().item()


def forward(
    world: distributed.World,
    stage: torch.nn.Module,
    ids: torch.Tensor,
    positions: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Through the pipeline: the last stage's logits [s, b, V/tp], contiguous; None elsewhere."""
    pipeline = dist.get_process_group_ranks(world.groups.pp)
    batch, length = ids.shape
    if world.pipeline_rank:
        received = torch.empty(length, batch, stage.config.hidden_size)
        dist.recv(received, pipeline[world.pipeline_rank - 1])
        stage.set_input_tensor(received)
    if positions is None:
        positions = torch.arange(length).expand(batch, length)
    output = stage(ids, positions, document_ids).contiguous()
    if not world.is_last_stage:
        dist.send(output, pipeline[world.pipeline_rank + 1])
        return None
    return output


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS.values(), ids=LAYOUTS)
def test_logits_are_those_of_transformers(folders, tensor, pipeline) -> None:
    for found in run_ranks(tensor * pipeline, differences, folders, tensor, pipeline):
        worst = {name: value for name, value in found.items() if not value <= 2e-5}
        assert worst == {}


@pytest.mark.parametrize("layout", EXPERTS.values(), ids=EXPERTS)
def test_experts_on_several_ranks_give_the_logits_of_transformers(folders, layout) -> None:
    ranks = 2 * layout.get("tensor", 1)
    assert max(run_ranks(ranks, mixture_difference, folders, layout)) <= 2e-5

"""Hugging Face folders from checkpoints: the same tensors, tokens and text as at the source."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

from taid_megatron.checkpointing import store
from taid_megatron.cli import main
from taid_megatron.config.hf import read
from taid_megatron.config.schema import Parallel
from taid_megatron.conversion import commands, companions
from taid_megatron.conversion.hf_import import import_hf
from taid_megatron.models.build import build_stages, transformer_config
from taid_megatron.models.vocabulary import align
from taid_megatron.runtime import distributed

from . import hf_models
from .ranks import run_ranks

DENSE = [name for name in hf_models.MODELS if name != "mixtral"]


def save_all(rank: int, size: int, root: Path, out: Path) -> None:
    """Every model as a checkpoint, written by two tensor-parallel ranks on each of two stages."""
    world = distributed.start(Parallel(tensor=2, pipeline=2), seed=1)
    try:
        for name in DENSE:
            save(root / name, out / name)
    finally:
        distributed.stop(world)


def save(folder: Path, out: Path) -> None:
    architecture = read(folder)
    layers = architecture.num_layers
    config = transformer_config(
        architecture,
        Parallel(tensor=2, pipeline=2),
        precision="fp32",
        abilities=distributed.abilities(),
        layers_per_stage=(layers - 1, 1),
    )
    vocabulary = align(architecture.vocab_size, None, 2)
    stages = build_stages(architecture, config, vocabulary, seq_length=8)
    import_hf(folder, stages, architecture, vocabulary)
    companions.keep(folder, out / companions.FOLDER)
    state = {"architecture": architecture.model_dump(mode="json")}
    no_optimizer = commands._NoOptimizer()
    store.save(out, 0, stages=stages, optimizer=no_optimizer, random_state={}, state=state)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hf")
    for name in DENSE:
        hf_models.write(name, root / name)
    return root


@pytest.fixture(scope="module")
def checkpoints(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoints")
    run_ranks(4, save_all, sources, out)
    return out


@pytest.mark.parametrize("name", DENSE)
def test_an_export_is_the_source(sources, checkpoints, tmp_path, name) -> None:
    out = tmp_path / "out"
    assert main(["export", str(checkpoints / name), "--out", str(out)]) == 0

    source, exported = (
        load_file(sources / name / "model.safetensors"),
        load_file(out / "model.safetensors"),
    )
    assert source.keys() == exported.keys()
    for tensor, values in source.items():
        assert torch.equal(values, exported[tensor]), tensor
    same_model(sources / name, out)


def same_model(source: Path, out: Path) -> None:
    """transformers loads it whole, generates the same, and reads the same configuration."""
    automatic = transformers.AutoModelForCausalLM
    model, info = automatic.from_pretrained(out, output_loading_info=True)
    assert [names for names in info.values() if names] == []
    twin = automatic.from_pretrained(source)
    ids = torch.arange(3, 11).unsqueeze(0)
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate(ids, **options).tolist() == twin.generate(ids, **options).tolist()
    ours, theirs = model.config.to_dict(), twin.config.to_dict()
    aside = {"transformers_version", "_name_or_path", "layer_types", "max_window_layers"}
    different = {
        key: (ours.get(key), value)
        for key, value in theirs.items()
        if key not in aside and ours.get(key) != value
    }
    assert different == {}
    text = "w5 w17 w150 nothing w3"
    for folder in (source, out):
        ids = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
        assert ids == [5, 17, 150, hf_models.VOCABULARY - 3, 3]
    first, second = (transformers.AutoTokenizer.from_pretrained(f) for f in (source, out))
    assert first(text).input_ids == second(text).input_ids
    assert first.eos_token == second.eos_token == "</s>"

"""Memory of an import (a rank's own share) and an export (a parameter). Slow: 1 GB is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors import safe_open

from taid_megatron.cli import main
from taid_megatron.config.hf import FAMILIES, read, write
from taid_megatron.config.schema import Architecture, Parallel
from taid_megatron.conversion import safetensors_file, segments
from taid_megatron.conversion.families import TABLES
from taid_megatron.conversion.hf_import import import_hf
from taid_megatron.conversion.safetensors_file import Spec
from taid_megatron.models.build import build_stages, transformer_config
from taid_megatron.models.vocabulary import align
from taid_megatron.runtime import distributed
from tests.benchmarks.measure import MIB, peak_bytes

from .ranks import run_ranks

GIGABYTE = Architecture(
    num_layers=14,
    hidden_size=1024,
    num_attention_heads=16,
    ffn_hidden_size=4096,
    vocab_size=8000,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gigabyte")
    # in another process: what it frees would be there for the import to take
    run_ranks(1, write_gigabyte, folder)
    return folder


def write_gigabyte(rank: int, size: int, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(write(GIGABYTE, FAMILIES["llama"])))
    shapes = segments.tensors(GIGABYTE, TABLES["llama"])
    specs = {name: Spec(shape, torch.float32) for name, shape in shapes.items()}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((name, torch.rand(spec.shape)) for name, spec in specs.items())

    safetensors_file.write(folder / "model.safetensors", specs, tensors())


def import_measured(rank: int, size: int, folder: Path, tensor: int) -> tuple[int, int]:
    """(peak above the size before, share), bytes."""
    parallel = Parallel(tensor=tensor, pipeline=size // tensor)
    world = distributed.start(parallel, seed=1)
    try:
        architecture = read(folder)
        config = transformer_config(
            architecture, parallel, precision="fp32", abilities=distributed.abilities()
        )
        vocabulary = align(architecture.vocab_size, None, tensor)
        peak_bytes(reset=True)
        before = peak_bytes()
        stages = build_stages(architecture, config, vocabulary, seq_length=8)
        import_hf(folder, stages, architecture, vocabulary)
        peak = peak_bytes()
        share = sum(p.nbytes for stage in stages for p in stage.parameters())
        return peak - before, share
    finally:
        distributed.stop(world)


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [2, 1], ids=["TP=2", "PP=2"])
def test_a_rank_holds_its_share_and_a_slice(folder: Path, tensor: int) -> None:
    assert (folder / "model.safetensors").stat().st_size > 10**9
    for extra, share in run_ranks(2, import_measured, folder, tensor):
        print(f"peak {extra / MIB:.0f} MiB, share {share / MIB:.0f} MiB")
        assert share > 450 * MIB
        assert extra <= 1.15 * share + 256 * MIB


def exported(rank: int, size: int, checkpoint: Path, out: Path) -> int:
    """Peak above the size before, bytes."""
    peak_bytes(reset=True)
    before = peak_bytes()
    assert main(["export", str(checkpoint), "--out", str(out), "--max-shard-size", "2GB"]) == 0
    return peak_bytes() - before


@pytest.mark.slow
def test_an_export_holds_a_parameter_and_a_tensor(folder: Path, tmp_path: Path) -> None:
    """The largest, a layer's gate and up projection, has 32 MiB; the file has 1 GB."""
    words = {f"w{number}": number for number in range(GIGABYTE.vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
    tokenizer.save(str(folder / "tokenizer.json"))
    command = ["import", "--hf", str(folder), "--out", str(tmp_path / "checkpoint")]
    run_ranks(2, lambda rank, size: main(command))
    (extra,) = run_ranks(1, exported, tmp_path / "checkpoint", tmp_path / "out")
    print(f"peak {extra / MIB:.0f} MiB")
    assert extra <= 256 * MIB
    name = "model.safetensors"
    with safe_open(tmp_path / "out" / name, "pt") as ours, safe_open(folder / name, "pt") as theirs:
        assert sorted(ours.keys()) == sorted(theirs.keys())
        for tensor in ours.keys():  # noqa: SIM118
            assert torch.equal(ours.get_tensor(tensor), theirs.get_tensor(tensor)), tensor

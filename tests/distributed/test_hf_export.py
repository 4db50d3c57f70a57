"""Hugging Face folders from checkpoints: the same tensors, tokens and text as at the source."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path, PosixPath

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

from taid_megatron.checkpointing import manifest, store
from taid_megatron.cli import main
from taid_megatron.config.hf import read
from taid_megatron.config.schema import Parallel
from taid_megatron.conversion import commands, companions, safetensors_file
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
    saving = store.begin(
        *(out, 0), stages=stages, optimizer=no_optimizer, random_state={}, state=state
    )
    saving.complete()


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
    if theirs.get("head_dim", 0) is None:
        aside.add("head_dim")  # transformers 4 leaves the quotient open
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


def test_files_are_as_large_as_allowed(sources, checkpoints, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    command = ["export", str(checkpoints / "llama"), "--out", str(out)]
    assert main([*command, "--max-shard-size", "20KB"]) == 0
    files = sorted(out.glob("*.safetensors"))
    largest = hf_models.VOCABULARY * 32 * 4  # a tensor that is larger than a file is a file
    assert len(files) > 5
    assert all(file.stat().st_size < largest + 4096 for file in files)
    same_model(sources / "llama", out)

    assert main([*command, "--max-shard-size", "many"]) == 2
    assert "--max-shard-size many: expected" in capsys.readouterr().err
    assert main(command) == 2
    assert f"{out}: exists; remove it" in capsys.readouterr().err


def test_weights_in_another_type(sources, checkpoints, tmp_path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(checkpoints / "qwen2"), "--out", str(out), "--dtype", "bf16"]) == 0
    source = load_file(sources / "qwen2" / "model.safetensors")
    for name, values in load_file(out / "model.safetensors").items():
        assert torch.equal(values, source[name].bfloat16())
    assert transformers.AutoConfig.from_pretrained(out).dtype is torch.bfloat16


def test_another_family_that_holds_the_model(sources, checkpoints, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    command = ["export", str(checkpoints / "phi3"), "--out", str(out)]
    assert main([*command, "--family", "mistral"]) == 0
    automatic = transformers.AutoModelForCausalLM
    model, info = automatic.from_pretrained(out, output_loading_info=True)
    assert (model.config.model_type, model.config.sliding_window) == ("mistral", 8)
    assert [names for names in info.values() if names] == []
    reference = torch.load(sources / "phi3" / "reference.pt")
    with torch.no_grad():
        logits = model(reference["ids"]).logits
    assert (logits - reference["logits"]).abs().max() <= 2e-5

    command[-1] += "2"
    assert main([*command, "--family", "llama"]) == 2
    assert "hf_family=llama does not hold this architecture" in capsys.readouterr().err
    assert not Path(command[-1]).exists()


def test_an_interrupted_export_leaves_nothing_that_looks_done(
    checkpoints, tmp_path, monkeypatch
) -> None:
    out, calls = tmp_path / "out", []

    def interrupted(*args: object) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(*args)

    write = safetensors_file.write
    monkeypatch.setattr(safetensors_file, "write", interrupted)
    command = ["export", str(checkpoints / "llama"), "--out", str(out), "--max-shard-size", "20KB"]
    assert main(command) == 130
    assert len(calls) == 3
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == [".unfinished_out"]
    monkeypatch.setattr(safetensors_file, "write", write)
    assert main(command) == 0  # what was left behind is in nobody's way
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_tokenizer_that_does_not_fit_is_refused(checkpoints, tmp_path, capsys) -> None:
    command = ["export", str(checkpoints / "llama"), "--out", str(tmp_path / "out")]
    assert main([*command, "--tokenizer", str(tmp_path)]) == 2
    assert "no tokenizer there" in capsys.readouterr().err
    words = {f"w{number}": number for number in range(hf_models.VOCABULARY + 1)}
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0")).save(str(path))
    assert main([*command, "--tokenizer", str(path)]) == 2
    assert "has token id 157, the model knows 157 ids" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_names_code_is_not_read(checkpoints, tmp_path, capsys) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoints / "llama", copy)
    step = copy / "step_00000000"
    (step / ".metadata").write_bytes(pickle.dumps(PosixPath("x")))
    (step / manifest.MANIFEST).unlink()
    manifest.write(step, manifest.record(step.iterdir()))  # hashes that fit, as an attacker's would
    assert main(["export", str(copy), "--out", str(tmp_path / "out")]) == 2
    assert ".metadata: refused, it asks for pathlib.PosixPath" in capsys.readouterr().err


def test_ranks_share_the_files(sources, checkpoints, tmp_path) -> None:
    out = tmp_path / "out"
    run_ranks(2, export_on_ranks, checkpoints / "qwen2", out)
    assert len(list(out.glob("*.safetensors"))) > 3
    same_model(sources / "qwen2", out)


def export_on_ranks(rank: int, size: int, checkpoint: Path, out: Path) -> None:
    written = []
    write = safetensors_file.write

    def counting(path: Path, *args: object) -> None:
        written.append(path.name)
        write(path, *args)

    safetensors_file.write = counting
    commands.export_checkpoint(checkpoint, out, max_shard_size="20KB")
    assert 0 < len(written) < len(list(out.glob("*.safetensors")))

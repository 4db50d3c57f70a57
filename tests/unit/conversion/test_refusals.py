"""Weights that are not the model's and damaged files: one line each."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from taid_megatron.config.errors import UserError
from taid_megatron.config.hf import read
from taid_megatron.conversion import segments
from taid_megatron.conversion.families import TABLES
from taid_megatron.conversion.hf_folder import open_folder
from taid_megatron.conversion.hf_import import check_tensors

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "vocab_size": 11,
    "tie_word_embeddings": True,
}
NORM = "model.layers.1.input_layernorm.weight"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = segments.tensors(read(folder), TABLES["llama"])
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def save(weights: dict[str, torch.Tensor], folder: Path, ending: str) -> None:
    if ending == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors")


def checked(folder: Path) -> list[str]:
    return check_tensors(open_folder(folder), "llama", read(folder))


def test_a_whole_model_passes_and_names_what_it_leaves(tmp_path: Path):
    weights = tensors(tmp_path)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    assert sorted(checked(tmp_path)) == [
        "lm_head.weight",  # tied: transformers does not read it either
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    ]


def without(weights: dict[str, torch.Tensor]) -> None:
    del weights[NORM]


def transposed(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name].t().contiguous()


def broadcastable(weights: dict[str, torch.Tensor]) -> None:
    weights[NORM] = torch.ones(1)


def longer(weights: dict[str, torch.Tensor]) -> None:
    weights["model.embed_tokens.weight"] = torch.randn(12, 8)


def biased(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(8)


def deeper(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.2.mlp.down_proj.weight"] = torch.ones(8, 16)


def whole_numbers(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = torch.ones(8, 16, dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without, f"{NORM} is missing"),
        (transposed, r"down_proj.weight has shape \[16, 8\], config.json says \[8, 16\]"),
        (broadcastable, rf"{NORM} has shape \[1\]"),
        (longer, r"embed_tokens.weight has shape \[12, 8\]"),
        (biased, "q_proj.bias has no place in a llama model"),
        (deeper, "layers.2.mlp.down_proj.weight has no place"),
        (whole_numbers, "no floating-point tensor"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_tensors_that_are_not_the_model_s_are_refused(tmp_path: Path, change, words, ending):
    weights = tensors(tmp_path)
    change(weights)
    save(weights, tmp_path, ending)
    with pytest.raises(UserError, match=words) as refused:
        checked(tmp_path)
    assert "\n" not in str(refused.value)


class Harmful:
    """What a pickle could do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harmed"),))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors(tmp_path)
    torch.save({"weight": Harmful()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin: not read"):
        open_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match=r"pytorch_model.bin: not read"):
        open_folder(tmp_path)
    assert not (tmp_path / "harmed").exists()


def test_damaged_and_absent_files_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no weights there"):
        open_folder(tmp_path)
    weights = tensors(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="damaged"):
        open_folder(tmp_path)
    save_file(weights, path)
    index = {"weight_map": {**dict.fromkeys(weights, path.name), "other": "other.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"other.safetensors: missing, the index names it"):
        open_folder(tmp_path)
    index["weight_map"]["other"] = path.name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="has no other, which the index says"):
        open_folder(tmp_path)
    index["weight_map"]["other"] = "../model.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside its folder"):
        open_folder(tmp_path)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_slice_beyond_a_tensor_s_end_is_refused(tmp_path: Path, ending: str, axis: int):
    weights = tensors(tmp_path)
    save(weights, tmp_path, ending)
    source = open_folder(tmp_path)
    name = "model.layers.0.mlp.down_proj.weight"
    end = weights[name].shape[axis]
    assert torch.equal(source.read(name, axis, 1, end), weights[name].narrow(axis, 1, end - 1))
    with pytest.raises(UserError, match=f"wanted 1 to {end + 1} along axis {axis}"):
        source.read(name, axis, 1, end + 1)

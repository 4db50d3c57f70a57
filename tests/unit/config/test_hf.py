"""config.json and Architecture, in both directions; what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from taid_megatron.config.errors import ConfigError
from taid_megatron.config.hf import FAMILIES, differing, family_for, read, write
from taid_megatron.config.load import dump, load
from taid_megatron.config.schema import Architecture, HFFamily
from taid_megatron.config.weights import check_weights

from .configs import values

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def folder(path: Path, **changes: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return path


def test_both_spellings_of_rotary_settings_are_one(tmp_path: Path):
    older = folder(tmp_path / "4", rope_theta=5e5, rope_scaling=LLAMA3)
    newer = folder(tmp_path / "5", rope_theta=None, rope_parameters={"rope_theta": 5e5, **LLAMA3})
    assert read(older) == read(newer)
    assert read(older).rotary_base == 5e5
    assert read(older).rotary_scaling.factor == 8  # type: ignore[union-attr]


def test_what_is_missing_means_what_transformers_takes_it_for(tmp_path: Path):
    sparse = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    found = read(folder(tmp_path, **sparse))
    assert found.sliding_window == 4096
    assert not found.tie_embeddings
    assert read(folder(tmp_path, **sparse, sliding_window=None)).sliding_window is None
    stable = {"model_type": "stablelm", "architectures": ["StableLmForCausalLM"]}
    assert read(folder(tmp_path, **stable)).rotary_percent == 0.25
    neox = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}
    found = read(folder(tmp_path, **neox, hidden_act="gelu", num_key_value_heads=None))
    assert (found.rotary_percent, found.parallel_residual) == (0.25, True)
    assert (found.activation, found.query_groups) == ("gelu", 4)


def test_a_window_counts_where_it_is_switched_on(tmp_path: Path):
    qwen = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "sliding_window": 32,
        "use_sliding_window": False,
    }
    assert read(folder(tmp_path, **qwen)).sliding_window is None
    on = {**qwen, "use_sliding_window": True}
    assert read(folder(tmp_path, **on, max_window_layers=0)).sliding_window == 32
    assert read(folder(tmp_path, **on, max_window_layers=6)).sliding_window is None
    with pytest.raises(ConfigError, match="layer_types is .*'full_attention'.*not supported"):
        read(folder(tmp_path, **on, max_window_layers=3))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gemma3"}, "model_type is 'gemma3', known are llama, "),
        ({"model_type": None}, "model_type is None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized \(gptq\)"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"attention_bias": True}, "mlp_bias is False"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": -2}, "num_layers is -2"),
        ({"model_type": "qwen3", "architectures": None, "attention_bias": True}, "attention_bias"),
        (
            {
                "model_type": "phi3",
                "architectures": None,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
            },
            "rope_type is 'longrope', which is not supported for phi3",
        ),
        (
            {"model_type": "stablelm", "architectures": None, "use_parallel_residual": True},
            "use_parallel_residual is True",
        ),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path: Path, changes: dict, words: str):
    with pytest.raises(ConfigError, match=words) as refused:
        read(folder(tmp_path, **changes))
    assert "\n" not in str(refused.value)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "has no config.json"), ("{", "cannot be read"), ("[1]", "holds a list")],
)
def test_a_folder_without_a_configuration_is_refused(tmp_path: Path, content, words: str):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=words):
        read(tmp_path)


SHAPE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 100}


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"kv_channels": 16, "rotary_scaling": {"kind": "linear", "factor": 2}}, "llama"),
        ({"add_bias_linear": True, "activation": "geglu"}, "llama"),
        ({"add_qkv_bias": True}, "qwen2"),
        ({"add_qkv_bias": True, "sliding_window": 16}, "qwen2"),
        ({"qk_layernorm": True}, "qwen3"),
        ({"sliding_window": 16}, "mistral"),
        ({"rotary_percent": 0.5}, "phi3"),
        ({"normalization": "LayerNorm", "add_qkv_bias": True}, "stablelm"),
        (
            {"normalization": "LayerNorm", "add_bias_linear": True, "activation": "gelu"},
            "gpt_neox",
        ),
        ({"hf_family": "phi3"}, "phi3"),
    ],
)
def test_the_first_family_that_holds_it_all(changes: dict, family: str, tmp_path: Path):
    architecture = Architecture.model_validate({**SHAPE, **changes})
    found = family_for(architecture)
    assert found.model_type == family
    written = {"max_position_embeddings": 64, **write(architecture, found)}
    back = read(folder(tmp_path, **{**dict.fromkeys(LLAMA), **written}))
    assert differing(back, architecture) is None
    assert back.hf_family == family


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation": "gelu"}, "no family"),
        ({"hf_family": "llama", "sliding_window": 8}, "sliding_window is lost"),
        ({"hf_family": "qwen2"}, "add_qkv_bias is lost"),
        ({"hf_family": "phi3", "rotary_scaling": {"kind": "linear", "factor": 2}}, "linear"),
        ({"hf_family": "gpt_neox"}, "hf_family=gpt_neox does not hold"),
    ],
)
def test_what_no_family_holds_is_refused(changes: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        family_for(Architecture.model_validate({**SHAPE, **changes}))


def test_every_family_of_the_schema_has_a_table():
    assert set(get_args(HFFamily)) == set(FAMILIES)


def run(tmp_path: Path, **models: Any):
    """A run's file with these sections for the models, loaded."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**values(), **models}))
    return load(path)


def test_a_folder_brings_its_architecture(tmp_path: Path):
    hf = folder(tmp_path / "model")
    config = run(tmp_path, student={"hf": str(hf)}, teacher={"hf": str(hf)})
    assert config.student.architecture == read(hf)
    assert config.teacher is not None
    assert config.teacher.architecture == read(hf)
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(tmp_path / "again.yaml") == config


def test_random_weights_may_change_a_folder_s_shape(tmp_path: Path):
    hf = folder(tmp_path / "model")
    student = {"hf": str(hf), "architecture": {"num_layers": 2}, "init": {"from": "random"}}
    config = run(tmp_path, student=student)
    assert config.student.architecture.num_layers == 2
    assert config.student.architecture.hidden_size == 64
    check_weights(config, None)


def test_layers_of_the_teacher_make_a_student(tmp_path: Path):
    hf = folder(tmp_path / "model")
    config = run(
        tmp_path,
        teacher={"hf": str(hf)},
        student={"init": {"from": "teacher", "layers": [0, 2, 5]}},
    )
    assert config.student.architecture == read(hf).model_copy(update={"num_layers": 3})
    check_weights(config, None)


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        ({"hf": "HF", "architecture": {"num_layers": 2}}, None, "num_layers=2, the weights in"),
        ({"init": {"from": "hf"}, "architecture": SHAPE}, None, "needs student.hf"),
        (
            {"init": {"from": "teacher", "layers": [0, 6]}},
            {"hf": "HF"},
            "names layer 6, the teacher has 0 to 5",
        ),
        (
            {
                "init": {"from": "teacher", "layers": [0, 1]},
                "architecture": {"ffn_hidden_size": 8},
            },
            {"hf": "HF"},
            "student.architecture.ffn_hidden_size=8, with student.init.from=teacher",
        ),
        (
            {"init": {"from": "teacher", "layers": [0]}, "architecture": SHAPE},
            {"architecture": SHAPE},
            "needs a teacher with weights",
        ),
        ({"init": {"from": "teacher"}, "architecture": SHAPE}, {"hf": "HF"}, "'layers' goes with"),
        (
            {"init": {"from": "random", "layers": [1]}, "architecture": SHAPE},
            None,
            "'layers' goes with",
        ),
        (
            {"architecture": SHAPE},
            {"hf": "HF", "init": {"from": "random"}},
            "'init' is 'from: random', beside an architecture alone",
        ),
        ({"architecture": {**SHAPE, "num_moe_experts": 4}}, None, "a teacher, not a student"),
        ({"hf": "no/such/folder"}, None, "no such folder"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, student, teacher, words):
    hf = str(folder(tmp_path / "model"))
    for section in (student, teacher or {}):
        if section.get("hf") == "HF":
            section["hf"] = hf
    with pytest.raises(ConfigError, match=words) as refused:
        check_weights(run(tmp_path, student=student, teacher=teacher), None)
    assert "\n" not in str(refused.value)


def test_a_hub_name_without_a_network_is_one_line(tmp_path: Path, monkeypatch):
    import huggingface_hub

    def offline(*args: Any, **kwargs: Any) -> str:
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ConfigError, match=r"not to be had from the hub \(no route\)"):
        run(tmp_path, student={"hf": "somebody/some-model"})

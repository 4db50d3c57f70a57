"""Hugging Face's config.json and our Architecture: one table per family, read in both directions.

A family's table says which key of config.json holds which field. `read` turns a folder into an
Architecture, `write` an Architecture into the keys of a config.json; an architecture belongs to a
family when it comes back from the two unchanged. Both of transformers' ways to write rotary
settings are read (`rope_theta` and `rope_scaling` up to 4.57, `rope_parameters` from 5.0); the
former is written, which both versions read. What a family's table does not know, and what this
system does not compute, is refused by name. Nothing here imports torch or transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .errors import ConfigError
from .schema import Architecture, RotaryScaling

CONFIG_FILE = "config.json"
Json = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """Where config.json keeps a field, and what its absence means to transformers."""

    name: str
    default: Any = None
    required: bool = False


@dataclass(frozen=True)
class Family:
    """One model_type of transformers."""

    model_type: str
    model_class: str
    """As in config.json's `architectures`."""
    keys: Mapping[str, Key]
    """Architecture field -> key."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Architecture fields that every model of the family shares."""
    expected: Mapping[str, Any] = field(default_factory=dict)
    """Keys that must have this value, which is also that of their absence: what else they could
    be is not computed here."""
    rotary_percent: Key | None = None
    rotary_base: Key = Key("rope_theta", 10000.0)
    scalings: tuple[str, ...] = ("linear", "llama3")
    """Kinds of rotary scaling that the family's class takes and this system computes."""
    window: str | None = None
    """'always': sliding_window holds where it is given; 'switched': by use_sliding_window."""
    window_default: int | None = None
    """What a missing sliding_window means."""

    @property
    def gated(self) -> bool:
        """Whether hidden_act names the activation of a gate."""
        return self.model_type != "gpt_neox"


_SIZES = {
    "num_layers": Key("num_hidden_layers", required=True),
    "hidden_size": Key("hidden_size", required=True),
    "num_attention_heads": Key("num_attention_heads", required=True),
    "ffn_hidden_size": Key("intermediate_size", required=True),
    "vocab_size": Key("vocab_size", required=True),
    "max_position_embeddings": Key("max_position_embeddings"),
    "tie_embeddings": Key("tie_word_embeddings", False),
    "init_method_std": Key("initializer_range", 0.02),
}
_LLAMA = {
    **_SIZES,
    "num_query_groups": Key("num_key_value_heads"),
    "layernorm_epsilon": Key("rms_norm_eps", 1e-6),
}
_HEAD_DIM = {"kv_channels": Key("head_dim")}
_PARTIAL = Key("partial_rotary_factor", 1.0)

# In this order an architecture is offered to them on export.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            {**_LLAMA, **_HEAD_DIM, "add_bias_linear": Key("attention_bias", False)},
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            _LLAMA,
            constants={"add_qkv_bias": True},
            window="switched",
            window_default=4096,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            {**_LLAMA, "kv_channels": Key("head_dim", 128)},
            constants={"qk_layernorm": True},
            expected={"attention_bias": False},
            window="switched",
            window_default=4096,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            {**_LLAMA, **_HEAD_DIM, "num_query_groups": Key("num_key_value_heads", 8)},
            window="always",
            window_default=4096,
        ),
        Family(
            "phi3",
            "Phi3ForCausalLM",
            {**_LLAMA, "layernorm_epsilon": Key("rms_norm_eps", 1e-5)},
            rotary_percent=_PARTIAL,
            scalings=(),
            window="always",
        ),
        Family(
            "gpt_neox",
            "GPTNeoXForCausalLM",
            {
                **_SIZES,
                "layernorm_epsilon": Key("layer_norm_eps", 1e-5),
                "parallel_residual": Key("use_parallel_residual", True),
            },
            constants={"normalization": "LayerNorm", "add_bias_linear": True},
            expected={"attention_bias": True},
            rotary_percent=Key("rotary_pct", 0.25),
            rotary_base=Key("rotary_emb_base", 10000.0),
        ),
        Family(
            "stablelm",
            "StableLmForCausalLM",
            {
                **_LLAMA,
                "layernorm_epsilon": Key("layer_norm_eps", 1e-5),
                "add_qkv_bias": Key("use_qkv_bias", False),
            },
            constants={"normalization": "LayerNorm"},
            expected={"qk_layernorm": False, "use_parallel_residual": False},
            rotary_percent=Key("partial_rotary_factor", 0.25),
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            {
                **_LLAMA,
                **_HEAD_DIM,
                "num_query_groups": Key("num_key_value_heads", 8),
                "layernorm_epsilon": Key("rms_norm_eps", 1e-5),
                "num_moe_experts": Key("num_local_experts", 8),
                "moe_router_topk": Key("num_experts_per_tok", 2),
            },
            rotary_base=Key("rope_theta", 1_000_000.0),
            window="always",
        ),
    )
}
_ACTIVATIONS = {True: {"silu": "swiglu", "gelu": "geglu"}, False: {"gelu": "gelu", "silu": "silu"}}


def read(folder: Path) -> Architecture:
    """The architecture of the model in a Hugging Face folder. Raises ConfigError, one line."""
    config, where = read_config(folder), folder / CONFIG_FILE
    return _architecture(config, _family_of(config, where), where)


def _architecture(config: Json, family: Family, where: Path) -> Architecture:
    fields: dict[str, Any] = {"hf_family": family.model_type, **family.constants}
    for name, key in family.keys.items():
        value = config.get(key.name)
        if value is None and key.required:
            raise ConfigError(f"{where}: {key.name} is missing; give the model's whole folder")
        value = key.default if value is None else value
        if value is not None:
            fields[name] = value
    for name, wanted in family.expected.items():
        if config.get(name, wanted) != wanted:
            raise _unsupported(where, name, config[name], family)
    mlp_bias = config.get("mlp_bias", False)
    if family.model_type == "llama" and mlp_bias != fields["add_bias_linear"]:
        raise _unsupported(where, "mlp_bias", mlp_bias, family)  # biases in one half of a layer
    fields["activation"] = _activation(config, family, where)
    fields |= _rotary(config, family, where)
    if family.window is not None:
        fields["sliding_window"] = _window(config, family, where)
    try:
        return resolved(Architecture.model_validate(fields))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "the model"
        raise ConfigError(
            f"{where}: {name} is {first['input']!r}: {first['msg']}; give another model"
        ) from None


def write(architecture: Architecture, family: Family) -> Json:
    """The keys of config.json that `read` turns back into the architecture."""
    values = resolved(architecture).model_dump()
    config: Json = {"model_type": family.model_type, "architectures": [family.model_class]}
    config |= {key.name: values[name] for name, key in family.keys.items()}
    config |= dict(family.expected)
    if family.model_type == "llama":
        config["mlp_bias"] = architecture.add_bias_linear
    names = {ours: theirs for theirs, ours in _ACTIVATIONS[family.gated].items()}
    config["hidden_act"] = names.get(architecture.activation, architecture.activation)
    config[family.rotary_base.name] = float(architecture.rotary_base)
    if family.rotary_percent is not None:
        config[family.rotary_percent.name] = architecture.rotary_percent
    config["rope_scaling"] = _scaling_out(architecture.rotary_scaling)
    if family.window is not None:
        config["sliding_window"] = architecture.sliding_window
    if family.window == "switched":
        config["use_sliding_window"] = architecture.sliding_window is not None
        config["max_window_layers"] = 0 if architecture.sliding_window else architecture.num_layers
    return config


def family_for(architecture: Architecture) -> Family:
    """The family to export as: hf_family, or the first that holds all of the architecture.

    Raises ConfigError where there is none.
    """
    named = architecture.hf_family
    candidates = [FAMILIES[named]] if named else [*FAMILIES.values()]
    for family in candidates:
        if _lost(architecture, family) is None:
            return family
    lost = _lost(architecture, candidates[0])
    what = f"hf_family={named}" if named else "no family of Hugging Face's that is known here"
    raise ConfigError(
        f"{what}{' does not hold' if named else ' holds'} this architecture"
        f"{f' ({lost} is lost)' if named else ''}; export as another family or change the "
        f"architecture (families: {', '.join(FAMILIES)})"
    )


def resolved(architecture: Architecture) -> Architecture:
    """The same architecture, the defaults that follow from other fields written out."""
    return architecture.model_copy(
        update={
            "num_query_groups": architecture.query_groups,
            "kv_channels": architecture.head_channels,
            "ffn_hidden_size": architecture.ffn_width,
        }
    )


def differing(one: Architecture, other: Architecture) -> str | None:
    """The first field in which two architectures compute differently; None: the same model."""
    aside = {"hf_family", "init_method_std", "max_position_embeddings"}
    first, second = resolved(one).model_dump(), resolved(other).model_dump()
    if one.num_moe_experts is None:
        aside.add("moe_router_topk")
    return next((k for k in first if k not in aside and first[k] != second[k]), None)


def _lost(architecture: Architecture, family: Family) -> str | None:
    """A field that would not survive being written as this family; None: all do."""
    try:
        back = _architecture(write(architecture, family), family, Path(CONFIG_FILE))
    except ConfigError as error:
        return str(error)
    return differing(architecture, back)


def read_config(folder: Path) -> Json:
    """The content of a folder's config.json. Raises ConfigError where it is none."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{folder}: has no {CONFIG_FILE}; give the folder of a Hugging Face model"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); get the file anew") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: holds a {type(config).__name__}; get the file anew")
    return config


def local_folder(name: Path) -> Path:
    """The folder that a user names: itself, or a copy of a hub repository of that name.

    Raises ConfigError where there is neither.
    """
    if name.expanduser().is_dir():
        return name.expanduser()
    if len(name.parts) != 2 or name.is_absolute() or name.parts[0] in (".", "..", "~"):
        raise ConfigError(f"{name}: no such folder; give the folder of a Hugging Face model")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(name),
                allow_patterns=["*.json", "*.safetensors", "*.bin", "*.model", "*.jinja"],
                ignore_patterns=["*/*"],
            )
        )
    except Exception as error:  # the package raises dozens, requests' among them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{name}: no such folder, and not to be had from the hub ({reason}); give a local "
            "folder"
        ) from None


def _family_of(config: Json, where: Path) -> Family:
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ConfigError(
            f"{where}: model_type is {model_type!r}, known are {', '.join(FAMILIES)}; give a model "
            "of one of these"
        )
    classes = config.get("architectures") or [family.model_class]
    if family.model_class not in classes:
        raise _unsupported(where, "architectures", classes, family)
    if config.get("quantization_config") is not None:
        method = config["quantization_config"]
        method = method.get("quant_method", "?") if isinstance(method, dict) else method
        raise ConfigError(
            f"{where}: the weights are quantized ({method}); give the model's unquantized folder"
        )
    return family


def _unsupported(where: Path, name: str, value: Any, family: Family) -> ConfigError:
    return ConfigError(
        f"{where}: {name} is {value!r}, which is not supported for {family.model_type}; give "
        "another model"
    )


def _activation(config: Json, family: Family, where: Path) -> str:
    default = "silu" if family.gated else "gelu"
    name = config.get("hidden_act", config.get("hidden_activation", default))
    known = _ACTIVATIONS[family.gated]
    if name not in known:
        raise _unsupported(where, "hidden_act", name, family)
    return known[name]


def _rotary(config: Json, family: Family, where: Path) -> dict[str, Any]:
    """rotary_base, rotary_percent and rotary_scaling, from either version's keys."""
    settings = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}

    def setting(ours: str, key: Key) -> Any:
        found = settings.get(ours)
        found = config.get(key.name) if found is None else found
        return key.default if found is None else found

    fields = {"rotary_base": setting("rope_theta", family.rotary_base)}
    percent = setting("partial_rotary_factor", family.rotary_percent or _PARTIAL)
    if family.rotary_percent is None and percent != 1.0:
        raise _unsupported(where, "partial_rotary_factor", percent, family)
    fields["rotary_percent"] = percent
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return fields
    if kind not in family.scalings:
        raise _unsupported(where, "rope_type", kind, family)
    if kind == "llama3":
        # transformers takes the outer value before the inner one
        outer = config.get("original_max_position_embeddings")
        length = outer or settings.get("original_max_position_embeddings")
        settings["original_max_position_embeddings"] = length or config.get(
            "max_position_embeddings"
        )
    known = RotaryScaling.model_fields.keys() - {"kind"}
    try:
        fields["rotary_scaling"] = RotaryScaling.model_validate(
            {"kind": kind, **{name: settings[name] for name in known if name in settings}}
        )
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{where}: rope_scaling {name}: {first['msg']}; mend the file") from None
    return fields


def _scaling_out(scaling: RotaryScaling | None) -> Json | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {"rope_type": scaling.kind, **scaling.model_dump(exclude={"kind"})}


def _window(config: Json, family: Family, where: Path) -> int | None:
    """sliding_window, where it holds in every layer. Raises ConfigError where in some only."""
    window = config.get("sliding_window", family.window_default)
    layers = config.get("num_hidden_layers", 0)
    if family.window == "switched" and not config.get("use_sliding_window", False):
        window = None
    kinds = config.get("layer_types")
    if kinds is None and family.window == "switched" and window is not None:
        full = min(config.get("max_window_layers", 28), layers)
        kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if kinds is None:
        return window
    if set(kinds) == {"full_attention"}:
        return None
    if set(kinds) != {"sliding_attention"}:
        raise _unsupported(where, "layer_types", sorted(set(kinds)), family)
    return window

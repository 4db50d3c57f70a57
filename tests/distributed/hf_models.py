"""Tiny random models of transformers, one or more per family, and what they compute."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import tokenizers
import torch
import transformers
from safetensors.torch import load_file

VOCABULARY = 157
BATCH, SEQ_LENGTH = 2, 24
ENDS = [5, 16]
WITH_DOCUMENTS = ("llama", "mistral", "gpt_neox")
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": VOCABULARY - 2,
    "eos_token_id": VOCABULARY - 1,
    "pad_token_id": None,
}
HEADS = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

# name -> (class of transformers' configuration, its arguments)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**SHAPE, "rope_parameters": LLAMA3}),
    "llama-tied-linear": (
        "LlamaConfig",
        {
            **HEADS,
            "rope_parameters": LINEAR,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "llama-one-kv-head": ("LlamaConfig", {**SHAPE, "num_key_value_heads": 1, "head_dim": 16}),
    "mistral": ("MistralConfig", {**SHAPE, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", SHAPE),
    "qwen2-tied": ("Qwen2Config", {**SHAPE, "tie_word_embeddings": True, "num_hidden_layers": 2}),
    "qwen3": ("Qwen3Config", {**SHAPE, "head_dim": 16}),
    "phi3": ("Phi3Config", {**SHAPE, "sliding_window": 8, "num_hidden_layers": 2}),
    "gpt_neox": ("GPTNeoXConfig", {**HEADS, "intermediate_size": 128}),
    "gpt_neox-in-turn": (
        "GPTNeoXConfig",
        {**HEADS, "use_parallel_residual": False, "num_hidden_layers": 2},
    ),
    "stablelm": ("StableLmConfig", {**SHAPE, "use_qkv_bias": True}),
    "mixtral": ("MixtralConfig", {**SHAPE, "num_local_experts": 4, "num_hidden_layers": 2}),
}


def build(name: str, **changes: Any) -> Any:
    """A model with no weight at its neutral start: exchanged or lost ones show."""
    kind, arguments = MODELS[name]
    arguments = {**arguments, **changes}
    if int(transformers.__version__.split(".")[0]) < 5 and "rope_parameters" in arguments:
        rotary = dict(arguments.pop("rope_parameters"))
        arguments["rope_theta"] = rotary.pop("rope_theta")
        arguments["rope_scaling"] = rotary
    config = getattr(transformers, kind)(**arguments)
    generator = torch.Generator().manual_seed(sorted(MODELS).index(name))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                noise = torch.empty_like(parameter).normal_(std=0.1, generator=generator)
                parameter.add_(noise)
            else:
                parameter.normal_(std=0.15, generator=generator)
    return model


def write(
    name: str, folder: Path, *, max_shard_size: str = "5GB", as_bin: bool = False, **changes: Any
) -> Path:
    """The model's folder, with `reference.pt`: ids [b, s] and transformers' logits [b, s, V]."""
    model = build(name, **changes)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if as_bin:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCABULARY, (BATCH, SEQ_LENGTH), generator=generator)
    with torch.no_grad():
        logits = model(ids).logits
    reference = {"ids": ids, "logits": logits}
    if name in WITH_DOCUMENTS:
        reference["documents"] = documents_apart(model, ids)
    torch.save(reference, folder / "reference.pt")
    return folder


def documents() -> tuple[torch.Tensor, torch.Tensor]:
    """Three documents in each sequence: their numbers and positions, [b, s]."""
    numbers = torch.bucketize(torch.arange(SEQ_LENGTH), torch.tensor(ENDS), right=True)
    starts = torch.tensor([0, *ENDS])[numbers]
    positions = torch.arange(SEQ_LENGTH) - starts
    return numbers.int().expand(BATCH, -1).contiguous(), positions.expand(BATCH, -1).contiguous()


@torch.no_grad()
def documents_apart(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits where each document is a text of its own, [b, s, V]."""
    parts = torch.tensor_split(ids, ENDS, dim=1)
    return torch.cat([model(part).logits for part in parts], 1)


def tokenizer() -> Any:
    """Words `w0`, `w1`, ... to their numbers."""
    words = {f"w{number}": number for number in range(VOCABULARY - 3)}
    words |= {"<unk>": VOCABULARY - 3, "<s>": VOCABULARY - 2, "</s>": VOCABULARY - 1}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def older(folder: Path) -> None:
    """Rewrite config.json as transformers 4 writes rotary settings."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rotary = config.pop("rope_parameters", None)
    if rotary is None:
        return  # transformers 4 wrote it
    neox = config["model_type"] == "gpt_neox"
    config["rotary_emb_base" if neox else "rope_theta"] = rotary.pop("rope_theta")
    if "partial_rotary_factor" in rotary:
        name = "rotary_pct" if neox else "partial_rotary_factor"
        config[name] = rotary.pop("partial_rotary_factor")
    config["rope_scaling"] = rotary if rotary.get("rope_type") != "default" else None
    path.write_text(json.dumps(config))

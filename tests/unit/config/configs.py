"""A small valid configuration to vary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from taid_megatron.config.schema import Config

SHAPE = {"num_layers": 8, "hidden_size": 64, "num_attention_heads": 8, "vocab_size": 100}


def values(folder: Path | str = "run", **changes: Any) -> dict[str, Any]:
    """Nested values of a run; changes name keys with '__': training__seq_length=64."""
    tree: dict[str, Any] = {
        "run": {"folder": str(folder)},
        "student": {"architecture": dict(SHAPE, ffn_hidden_size=128)},
        "teacher": {
            "architecture": dict(SHAPE, ffn_hidden_size=256),
            "init": {"source": "random"},
        },
        "training": {"global_batch_size": 16, "seq_length": 32, "steps": 100},
        "optimizer": {"lr": 1e-3},
        "data": {"blend": ["corpus"]},
    }
    for dotted, value in changes.items():
        *sections, key = dotted.split("__")
        at = tree
        for section in sections:
            at = at.setdefault(section, {})
        at[key] = value
    return tree


def make(folder: Path | str = "run", **changes: Any) -> Config:
    """The configuration of `values`."""
    return Config.model_validate(values(folder, **changes))

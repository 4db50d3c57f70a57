"""A run small enough for a test: made-up token files, a student and a larger random teacher."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_tools.indexed_writer import IndexedWriter
from taid_megatron.config.load import load
from taid_megatron.runtime import distributed
from taid_megatron.training import loop
from taid_megatron.training.setup import Trainer, build_trainer

from .ranks import run_ranks

VOCABULARY = 300
STEPS = 5


def write_tokens(prefix: Path, seed: int, documents: int = 60) -> Path:
    """Documents of 20 to 120 tokens that a model can learn; token 0 ends each."""
    rng = np.random.default_rng(seed)
    with IndexedWriter(prefix, vocab_size=VOCABULARY) as writer:
        for number in range(documents):
            steps = rng.integers(0, 5, int(rng.integers(20, 120)))
            tokens = np.append(np.cumsum(steps) % (VOCABULARY - 1) + 1, 0)
            writer.add_document(tokens, name=str(number))
        writer.finish()
    return prefix


def write_config(folder: Path) -> Path:
    """A run that every layout of the tests can do; overrides make the rest."""
    shape = {"vocab_size": VOCABULARY, "num_attention_heads": 4}
    config = {
        "run": {"folder": str(folder / "run")},
        "student": {
            "architecture": {
                **shape,
                "num_layers": 4,
                "hidden_size": 32,
                "num_query_groups": 2,
                "ffn_hidden_size": 64,
            }
        },
        "teacher": {
            "architecture": {
                **shape,
                "num_layers": 8,
                "hidden_size": 64,
                "ffn_hidden_size": 128,
                "init_method_std": 0.1,
            },
            "init": {"from": "random"},
        },
        "training": {
            "micro_batch_size": 1,
            "global_batch_size": 8,
            "seq_length": 32,
            "steps": STEPS,
            "precision": "fp32",
        },
        # a short ramp of t that the adaptive rule still moves
        "taid": {"t_start": 0.3, "t_end": 0.8, "alpha": 0.02},
        "optimizer": {"lr": 5e-3, "warmup_steps": 2},
        "data": {
            "blend": str(write_tokens(folder / "train", seed=0)),
            "validation": str(write_tokens(folder / "valid", seed=1)),
            "eod_id": 0,
            # so that micro-batches have unequal numbers of tokens
            "eod_mask_loss": True,
        },
        "evaluation": {"samples": 8},
        "logging": {"tensorboard": False, "progress": False},
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def train(
    config: Path, folder: Path, ranks: int, *overrides: str, save: bool = False
) -> list[dict[str, Any]]:
    """Run it on that many ranks; the records of metrics.jsonl. save: with its checkpoints."""
    exit_codes = run_ranks(ranks, _train, str(config), [f"run.folder={folder}", *overrides], save)
    assert exit_codes == [0] * ranks
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _train(rank: int, world_size: int, config: str, overrides: list[str], save: bool) -> int:
    if not save:  # seconds each, and most tests have no use for them
        loop._save = lambda trainer: None
    return loop.run(load(config, overrides))


@contextmanager
def trainer(config: str, *overrides: str) -> Iterator[Trainer]:
    """The parts of a run, on a rank, before its first step."""
    loaded = load(config, overrides)
    world = distributed.start(loaded.parallel, loaded.run.seed)
    try:
        yield build_trainer(loaded, world, distributed.abilities())
    finally:
        distributed.stop(world)


def column(records: list[dict[str, Any]], name: str) -> list[float]:
    """One figure over the steps."""
    return [record[name] for record in records if name in record]

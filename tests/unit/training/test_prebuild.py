"""The sample index built beforehand is the one that a run on so many ranks looks for."""

from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import yaml

from data_tools.indexed_writer import IndexedWriter
from taid_megatron import cli
from taid_megatron.config.load import load
from taid_megatron.training.setup import open_datasets


@pytest.fixture
def config(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b", "held_out"):
        with IndexedWriter(tmp_path / name, 100) as writer:
            for size in rng.integers(5, 60, size=50):
                tokens = np.append(rng.integers(1, 100, size=size), 0)
                writer.add_document(tokens, name="made up")
            writer.finish()
    shape = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 100}
    settings = {
        "run": {"folder": str(tmp_path / "run")},
        "student": {"architecture": shape},
        "loss": {"name": "cross_entropy"},
        "training": {
            "micro_batch_size": 1,
            "global_batch_size": 4,
            "seq_length": 16,
            "steps": 10,
        },
        "optimizer": {"lr": 1e-3},
        "data": {
            "blend": [{"prefix": str(tmp_path / name), "weight": 1} for name in "ab"],
            "validation": str(tmp_path / "held_out"),
            "eod_id": 0,
        },
        "evaluation": {"samples": 5},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def written(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_run_finds_all_that_was_built(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["index", str(config), "--ranks", "4"]) == 0
    cache = tmp_path / "run/cache"
    assert capsys.readouterr().out.strip().endswith(f"sample index: {cache}")
    before = written(cache)
    assert any("BlendedDataset" in name for name in before)
    assert sum("DocumentDataset" in name and "description" in name for name in before) == 3
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        train, validation = open_datasets(load(config), 4)
        assert train is not None
        assert validation is not None
        assert len(train) == 40  # type: ignore[arg-type]
        assert written(cache) == before
        open_datasets(load(config), 2)  # other ranks, other held-out samples
        assert set(written(cache)) > set(before)
    finally:
        dist.destroy_process_group()


def test_what_is_wrong_is_one_line(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.bin").unlink()
    assert cli.main(["index", str(config)]) == 2
    assert "a.bin: no such file" in capsys.readouterr().err
    assert not dist.is_initialized()

from __future__ import annotations

from pathlib import Path

import pytest

from .stand_ins import StandIns

CONFIG = """
run: {folder: run}
student:
  architecture: {num_layers: 1, hidden_size: 8, num_attention_heads: 1, vocab_size: 10}
loss: {name: cross_entropy}
training: {global_batch_size: 1, seq_length: 8, steps: 1}
optimizer: {lr: 1e-3}
data: {blend: corpus}
"""


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("answers")


@pytest.fixture
def stand_ins(tmp_path: Path, answers: Path) -> StandIns:
    (tmp_path / "run").mkdir()
    (tmp_path / "run.yaml").write_text(CONFIG)
    return StandIns(tmp_path, answers)

"""What an evaluation leaves in its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_tools import manifest
from taid_megatron.evaluation import report


def test_the_figures_come_last(tmp_path: Path, monkeypatch) -> None:
    """The quick start takes an evaluation for done where they are: the table is then there too."""

    def interrupted(path: Path, content: bytes) -> None:
        manifest.write_atomically(path, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "write_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.write({"model": "student"}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.md"]

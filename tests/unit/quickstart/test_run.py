"""What stops the quick start before its first stage."""

from __future__ import annotations

import shutil
import time
from collections import namedtuple
from pathlib import Path

import pytest

from taid_megatron import cli
from taid_megatron.quickstart.run import _timed


def _refusal(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["quickstart", "--folder", str(folder)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    said = _refusal(tmp_path / "file" / "run", capsys)
    assert "run: cannot be written to (Not a directory); give --folder another place" in said


def test_a_disk_with_little_room(tmp_path: Path, capsys, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 7 << 20))
    said = _refusal(tmp_path / "run", capsys)
    assert "7 MiB are free there, 500 are needed; make room, or give --folder another" in said
    assert list((tmp_path / "run").iterdir()) == []


def test_time_is_counted_over_all_calls(tmp_path: Path, monkeypatch) -> None:
    """A call that finds all done would else tell of no second, and one after a break of some."""
    clock = iter((100.0, 107.0, 200.0, 202.0, 203.0))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    with pytest.raises(KeyboardInterrupt), _timed(tmp_path):
        raise KeyboardInterrupt
    with _timed(tmp_path) as seconds:
        assert seconds() == 9.0
    assert (tmp_path / "seconds.json").read_text() == "10.0\n"

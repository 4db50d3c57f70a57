"""The quick start in miniature: public commands in real processes, and what they leave behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
from pathlib import Path
from taid_megatron import quickstart
sizes = quickstart.Sizes(teacher_steps=6, student_steps=4, held_out_samples=16)
sys.exit(quickstart.run(Path(sys.argv[1]), sizes=sizes))
"""


def _quickstart(folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    return folder, _quickstart(folder)


def test_leaves_what_it_promises(quickstart) -> None:
    folder, output = quickstart
    summary = json.loads((folder / "summary.json").read_text())

    assert summary["pipeline_check"]["passed"]
    assert summary["pipeline_check"]["steps"] == 4
    assert summary["teacher"]["parameters"] == 3_410_176
    assert 0 < summary["student"]["held_out_kl"] < 8
    assert 1 < summary["teacher"]["held_out_perplexity"] < 3000
    assert output.rstrip().endswith(f"Summary: {folder / 'summary.json'}")
    assert "same losses" in output
    for promised in (
        *("corpus/train.jsonl", "tokenizer.model", "data/train.manifest.json", "teacher.yaml"),
        *("teacher/metrics.jsonl", "student-taid/config.yaml", "student-taid/tensorboard"),
        "student-taid-pipeline/checkpoints/step_00000004/state.json",
    ):
        assert (folder / promised).exists(), promised


def test_teacher_of_the_student_is_the_trained_one(quickstart) -> None:
    folder, _ = quickstart
    lines = (folder / "teacher/metrics.jsonl").read_text().splitlines()
    taught = json.loads(lines[-1])["held_out_cross_entropy"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["teacher"]["held_out_cross_entropy"] == pytest.approx(taught, rel=1e-5)


def test_second_call_reuses_everything(quickstart) -> None:
    folder, first = quickstart
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    output = _quickstart(folder)
    changed = {
        path.name
        for path in folder.rglob("*")
        if path.is_file() and before.get(path) != path.stat().st_mtime_ns
    }
    assert changed == {"summary.json"}
    assert output.count("done before") == 3

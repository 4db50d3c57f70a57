"""The quick start in miniature: public commands in real processes, and what they leave behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CODE = """
import sys
from pathlib import Path
from taid_megatron import quickstart
sizes = quickstart.Sizes(teacher_steps=6, student_steps=4, held_out_samples=16)
sys.exit(quickstart.run(Path(sys.argv[1]), sizes=sizes))
"""
METHODS = ("cross-entropy", "forward-kl", "taid-linear", "taid")


def _start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CODE, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _quickstart(folder: Path) -> str:
    process = _start(folder)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


# What is there once a stage works that the interruption is to meet.
STAGES = (
    "corpus",
    "tokenizer.model",
    "teacher/metrics.jsonl",
    "exported",
)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Interrupted from the keyboard in one stage after the other, each call going on from there."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    for stage in STAGES:
        process = _start(folder)
        while process.poll() is None and not (folder / stage).exists():
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=120)
        assert process.returncode != 0, output
        assert not (folder / "summary.json").exists()
    return folder, _quickstart(folder)


def test_leaves_what_it_promises(quickstart) -> None:
    folder, output = quickstart
    summary = json.loads((folder / "summary.json").read_text())

    assert summary["pipeline_check"]["passed"]
    assert summary["pipeline_check"]["steps"] == 4
    assert summary["teacher"]["parameters"] == 3_410_176
    assert 1 < summary["teacher"]["perplexity"] < 3000
    assert tuple(summary["students"]) == METHODS
    for found in summary["students"].values():
        assert found["kl"]["deviation"] is None  # one seed has no spread
        assert 0 < found["kl"]["mean"] < 8
        # students of four steps are nearly flat: the tail is a fifth of the vocabulary
        assert 0 < found["head_mass"]["mean"] < found["tail_mass"]["mean"] < 0.25
        assert 0 <= found["top1_agreement"]["mean"] <= 1
    assert 0 < summary["teacher"]["tail_mass"] < 0.2
    lines = output.rstrip().splitlines()
    assert lines[-1] == f"Report: {(folder / 'report.html').resolve()}"
    assert lines[-2] == f"Summary: {folder / 'summary.json'}"
    assert "same losses" in output
    for promised in (
        *("corpus/train.jsonl", "tokenizer.model", "data/train.manifest.json", "teacher.yaml"),
        *("teacher/metrics.jsonl", "student-taid/config.yaml", "student-taid/tensorboard"),
        "student-taid-pipeline/checkpoints/step_00000004/state.json",
        *("exported/config.json", "exported/generation_config.json", "exported/tokenizer.json"),
        *(f"student-{method}/evaluation/evaluation.md" for method in METHODS),
    ):
        assert (folder / promised).exists(), promised


def test_the_exported_student_is_the_trained_one(quickstart) -> None:
    """By the check that a user sees, and its figures."""
    folder, output = quickstart
    check = json.loads((folder / "summary.json").read_text())["export_check"]
    assert check["passed"]
    assert 0 <= check["max_logit_difference"] <= 1e-4
    assert check["texts_with_other_ids"] == []
    assert check["texts"] == 20
    assert check["continuation"].startswith("def read_file(path):")
    assert "loads the exported student as the same model" in output


def test_the_page_needs_nothing_but_itself(quickstart) -> None:
    folder, _ = quickstart
    html = (folder / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert "<script" not in html
    assert html.count("data:image/png;base64,") == 5
    for method in METHODS:
        assert f">{method}</td>" in html
    pictures = {path.name for path in (folder / "plots").iterdir()}
    names = ("interpolation", "objectives", "held_out", "head", "tail")
    assert pictures == {f"{name}.png" for name in names}


def test_students_start_alike_and_learn_from_the_trained_teacher(quickstart) -> None:
    folder, _ = quickstart
    first = {}
    for method in METHODS:
        lines = (folder / f"student-{method}/metrics.jsonl").read_text().splitlines()
        first[method] = json.loads(lines[0])
    assert len({record["kl"] for record in first.values()}) == 1
    lines = (folder / "teacher/metrics.jsonl").read_text().splitlines()
    taught = json.loads(lines[-1])["held_out_perplexity"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["teacher"]["perplexity"] == pytest.approx(taught, rel=1e-4)


def test_second_call_reuses_everything(quickstart) -> None:
    folder, _ = quickstart
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    output = _quickstart(folder)
    changed = {
        path.name
        for path in folder.rglob("*")
        if path.is_file() and before.get(path) != path.stat().st_mtime_ns
    }
    pictures = {path.name for path in (folder / "plots").iterdir()}
    assert changed == {"summary.json", "report.html", "seconds.json"} | pictures
    assert output.count("done before") == 6

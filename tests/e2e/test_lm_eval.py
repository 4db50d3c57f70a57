"""A checkpoint through lm-eval, on a task whose file and data are local. By hand: it needs lm-eval.

pip install -e '.[lm-eval]' && python -m pytest -m slow tests/e2e/test_lm_eval.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import hf_models

TASK = """\
task: count_on
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{before}}}}"
doc_to_choice: ["w1", "w2"]
doc_to_target: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "taid_megatron", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", **environment}
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lm_eval")
    hf_models.write("llama", root / "student")
    imported = command("import", "--hf", root / "student", "--out", root / "checkpoint")
    assert imported.returncode == 0, imported.stderr
    return root / "checkpoint"


@pytest.mark.slow
def test_a_local_task_runs(checkpoint: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"before": f"w{n} w{n + 1}"}) for n in range(10)))
    (tasks / "count_on.yaml").write_text(TASK.format(data=data))
    options = ("--suite", "count_on:1", "--tasks", tasks, "--out", tmp_path / "out")
    done = command("evaluate", checkpoint, *options)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    result = found["suites"]["count_on:1"]["count_on"]
    assert (result["num_fewshot"], result["metric"]) == (1, "acc,none")
    assert 0 <= result["value"] <= 1
    assert "count_on, 1-shot" in (tmp_path / "out/evaluation.md").read_text()


@pytest.mark.slow
def test_absent_tasks_and_data_are_said_at_once(checkpoint: Path) -> None:
    done = command("evaluate", checkpoint, "--suite", "no_such_task")
    assert done.returncode == 2
    assert "lm-eval knows no task no_such_task" in done.stderr
    done = command("evaluate", checkpoint, "--suite", "leaderboard")
    assert done.returncode == 2
    assert "the data of task arc_challenge are not to be had" in done.stderr.splitlines()[-1]

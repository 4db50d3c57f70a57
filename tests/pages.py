"""Pages to look at: made-up runs of every kind, and a plan of two stages."""

from __future__ import annotations

import json
import math
from pathlib import Path

import yaml

from taid_megatron.config.load import load
from taid_megatron.planning import plan
from taid_megatron.planning.page import page
from taid_megatron.reporting.compare import report

RECIPES = Path(__file__).parents[1] / "launch" / "recipes"


def write_run(folder: Path, loss: str, steps: int, *, teacher: bool = True) -> Path:
    """A run folder as the trainer leaves it, its curves made up."""
    folder.mkdir(parents=True)
    config = {
        "loss": {"name": loss},
        "taid": {"t_start": 0.4, "t_end": 1.0},
        "training": {"steps": steps, "tokens": None, "global_batch_size": 2, "seq_length": 4},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    records = []
    for n in range(1, steps + 1):
        wave = math.sin(n * len(loss)) / 5
        record = {"step": n, "loss": 3 / math.sqrt(n) + 1 + wave, "lr": 1e-3 * (1 - n / steps)}
        record |= {"grad_norm": 1 + wave, "tokens_per_second": 1e5 * (1 + wave)}
        record |= {"kl": 2 / math.sqrt(n) + 0.5 + wave} if teacher else {}
        record |= {"t": min(1.0, 0.4 + n / steps)} if loss == "taid" else {}
        if n % (steps // 4) == 0:
            record |= {"held_out_kl": 2 / math.sqrt(n), "held_out_perplexity": 40 + 100 / n}
            record |= {"held_out_teacher_perplexity": 30.0}
        records.append(record)
    records[5] = {"step": 6, "skipped": "gradient"}
    records.insert(8, {"step": 8, "resumed_from": "step_00000008"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "run_status.json").write_text(json.dumps({"state": "done"}))
    masses = {"head_mass": 0.5 - len(loss) / 50, "tail_mass": 1e-4 * len(loss)}
    of_teacher = {"teacher_head_mass": 0.6, "teacher_tail_mass": 1e-5}
    (folder / "evaluation").mkdir()
    held_out = {"held_out": {**masses, **of_teacher}}
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(held_out))
    return folder


def write_report(folder: Path) -> Path:
    """The page of three runs, one of them long."""
    losses = {"taid": 40, "forward_kl": 1000, "skew_reverse_kl": 40}
    runs = [write_run(folder / "runs" / loss, loss, steps) for loss, steps in losses.items()]
    return report(runs, folder / "report.html")[0]


def write_plan(folder: Path) -> Path:
    """The page of a plan on two stages."""
    path = folder / "plan.html"
    config = load(RECIPES / "taid_qwen2_72b_1_5b.yaml")
    made = plan.make(config, world_size=16, gpu="h100", balance=True)
    path.write_text(page(made, "Plan of <taid_qwen2_72b_1_5b.yaml>"))
    return path


PAGES = {"report": write_report, "plan": write_plan}

"""Every recipe loads, passes the checks and fits; the command's answers and refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from taid_megatron import cli
from taid_megatron.config.batches import train_steps
from taid_megatron.config.load import load
from taid_megatron.planning import gpus, layouts, memory, plan
from taid_megatron.planning.costs import Costs
from taid_megatron.planning.page import page

from . import RECIPES

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def told(recipe: str) -> tuple[int, str]:
    """GPUs and their kind, from the command in the recipe's head."""
    head = (RECIPES / f"{recipe}.yaml").read_text().split("run:")[0]
    pattern = rf"plan launch/recipes/{recipe}\.yaml --gpus (\d+) --gpu (\S+)"
    found = re.search(pattern, head)
    assert found, f"{recipe}.yaml does not say how to plan it"
    return int(found[1]), found[2]


def test_the_recipes_are_those_of_the_papers_and_the_small_world() -> None:
    assert len(NAMES) == 14
    losses = {name: load(RECIPES / f"{name}.yaml").loss for name in NAMES}
    baselines = {loss.name for name, loss in losses.items() if name.startswith("baseline")}
    expected = {"forward_kl", "tvd", "adaptive_kl", "gjs", "skew_kl", "skew_reverse_kl"}
    assert baselines == expected
    assert losses["baseline_gjs_phi3_tinyllama"].beta == 0.1
    assert losses["baseline_skew_kl_phi3_tinyllama"].lam == 0.1


@pytest.mark.parametrize("recipe", NAMES)
def test_a_recipe_passes_the_checks_and_fits(recipe: str, monkeypatch) -> None:
    monkeypatch.setattr(layouts, "rank", lambda *arguments: [])
    world_size, gpu = told(recipe)
    made = plan.make(load(RECIPES / f"{recipe}.yaml"), world_size=world_size, gpu=gpu)
    assert made.figures["fits"]
    assert made.figures["time"]["tokens_per_second"] > 0


def test_the_papers_run_has_its_batch_and_length() -> None:
    config = load(RECIPES / "taid_phi3_tinyllama.yaml")
    made = plan.make(config, world_size=80, gpu="h100").figures
    assert made["batch"]["data_parallel_size"] == 80
    assert made["batch"]["micro_batches_per_step"] == 1
    assert train_steps(config) == -(-20_000_000_000 // (640 * 2048))


def test_what_does_not_fit_says_so_and_every_loser_has_a_reason() -> None:
    config = load(RECIPES / "taid_qwen2_72b_1_5b.yaml")
    made = plan.make(config, world_size=16, gpu="h100").figures
    first, *others = made["layouts"]
    assert first["fits"]
    assert first["reason"] == ""
    assert all(other["reason"] for other in others)
    assert any("does not fit" in other["reason"] for other in others)
    rates = [other["tokens_per_second"] for other in made["layouts"] if other["fits"]]
    assert rates == sorted(rates, reverse=True)
    # one GPU cannot hold a teacher of 72B
    alone = ("parallel.tensor=1", "parallel.sequence_parallel=false", "parallel.pipeline=1")
    small = plan.make(load(RECIPES / "taid_qwen2_72b_1_5b.yaml", alone), world_size=1, gpu="h100")
    assert not small.figures["fits"]


def test_balance_makes_the_step_shorter() -> None:
    config = load(RECIPES / "taid_qwen2_72b_1_5b.yaml", ["training.global_batch_size=256"])
    made = plan.make(config, world_size=16, gpu="h100", balance=True).figures
    assert made["balance"]["gain"] > 0.005
    assert sum(made["layers_per_stage"]["teacher"]) == 80
    assert made["layers_per_stage"]["teacher"][0] > made["layers_per_stage"]["teacher"][1]


def test_extrapolating_the_steady_middle_equals_simulating_every_micro_batch() -> None:
    config = load(RECIPES / "taid_qwen2_72b_1_5b.yaml")
    costs = Costs(memory.Sizes(config, config.teacher.architecture, 16), gpus.find("h100"), 0.45)
    time = costs.step()
    # 32 micro-batches, of which the step simulates ten
    whole = costs.timeline().seconds + time.data + time.optimizer
    assert time.seconds == pytest.approx(whole, rel=1e-9)
    parts = time.compute + time.tensor + time.waiting + time.data + time.optimizer
    assert parts == pytest.approx(time.seconds)


def test_what_is_ranked_can_be_run() -> None:
    """The overrides of the best layout are a configuration that plans to the same figures."""
    path = RECIPES / "taid_qwen2_72b_1_5b.yaml"
    best = plan.make(load(path), world_size=16, gpu="h100").figures["layouts"][0]
    again = plan.make(load(path, best["overrides"]), world_size=16, gpu="h100").figures
    assert again["time"]["seconds"] == pytest.approx(best["step_seconds"])


def test_a_student_alone_and_a_teacher_from_a_checkpoint(tmp_path: Path) -> None:
    path = RECIPES / "taid_two_gpus.yaml"
    alone = plan.make(
        load(path, ["teacher=null", "loss.name=cross_entropy"]), world_size=2, gpu="rtx4090"
    ).figures
    assert alone["parameters"]["teacher"] is None
    assert alone["memory"][0]["teacher"] == 0
    whole = plan.make(load(path), world_size=2, gpu="rtx4090").figures
    assert whole["time"]["seconds"] > alone["time"]["seconds"]

    architecture = load(path).teacher.architecture.model_dump(mode="json")
    step = tmp_path / "step_00000001"
    step.mkdir()
    (step / "state.json").write_text(json.dumps({"architecture": architecture}))
    given = ["teacher.architecture=null", f"teacher.checkpoint={step}"]
    saved = plan.make(load(path, given), world_size=2, gpu="rtx4090").figures
    assert saved["memory"] == whole["memory"]


def test_unknown_gpu_is_named_with_the_known_ones(capsys) -> None:
    recipe = str(RECIPES / "taid_two_gpus.yaml")
    assert cli.main(["plan", recipe, "--gpus", "2", "--gpu", "h10"]) == 2
    message = capsys.readouterr().err
    assert "h10: not a known kind" in message
    assert all(kind in message for kind in gpus.kinds())


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--gpus", "3"], "global_batch_size=128 is not divisible"),
        (["parallel.tensor=5"], "parallel.tensor=5"),
        (["--efficiency", "0"], "--efficiency 0.0"),
        (["--page", "/no/such/folder/p.html"], "cannot be written"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(arguments, part, capsys) -> None:
    recipe = str(RECIPES / "taid_two_gpus.yaml")
    given = [] if "--gpus" in arguments else ["--gpus", "2"]
    assert cli.main(["plan", recipe, *arguments, *given]) == 2
    message = capsys.readouterr().err
    assert part in message
    assert len(message.splitlines()) == 1


def test_json_alone_and_without_torch(tmp_path: Path) -> None:
    recipe = RECIPES / "taid_two_gpus.yaml"
    program = (
        "import sys; from taid_megatron.cli import main; "
        f"code = main(['plan', {str(recipe)!r}, '--gpus', '2', '--json']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    figures = json.loads(result.stdout)
    parts = {name: value for name, value in figures["memory"][0].items() if name != "total"}
    parts.pop("teacher_if_fp8")
    assert sum(parts.values()) == pytest.approx(figures["memory"][0]["total"])


def test_the_page_holds_tables_and_picture_and_links_nowhere() -> None:
    config = load(RECIPES / "taid_qwen2_72b_1_5b.yaml")
    text = page(plan.make(config, world_size=16, gpu="h100"), "Plan <of> a run")
    assert "data:image/png;base64," in text
    assert "Plan &lt;of&gt; a run" in text
    assert "Memory per GPU" in text
    assert not re.search(r"(src|href)=\"?http", text)

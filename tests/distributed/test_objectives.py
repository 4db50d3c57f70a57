"""Every loss trains, on a layout of shards as in one process; CTKD's temperature is trained too."""

from __future__ import annotations

import json

import pytest

from taid_megatron.losses.registry import LOSSES

from . import toy
from .ranks import run_ranks

OPTIONS = {
    "gjs": ("loss.beta=0.3",),
    "dkd": ("loss.alpha=0.5", "loss.beta=2", "loss.temperature=2"),
    "ctkd": ("loss.temperature_lr=0.3", "loss.ce_weight=0.2"),
    "adaptive_kl": ("loss.mu=0.7",),
}
# The others run on layouts in test_layouts.py.
NAMES = [name for name in LOSSES if name not in ("taid", "forward_kl", "cross_entropy")]


def _train_all(rank, world_size, config, folder, overrides):
    """Every loss after the other in the same ranks, which are what takes the time to start."""
    codes = []
    for name in NAMES:
        mine = [f"run.folder={folder}/{name}", f"loss.name={name}", *OPTIONS.get(name, ())]
        mine += ["training.micro_batch_size=4", "data.prefetch=0"]
        codes.append(toy._train(rank, world_size, config, [*mine, *overrides], False))
    return codes


@pytest.fixture(scope="module")
def runs(config, tmp_path_factory):
    """Records by layout and loss."""
    found = {}
    for layout, ranks, overrides in (
        ("one", 1, ()),
        ("shards", 2, ("parallel.tensor=2", "loss.collective=all_reduce")),
    ):
        folder = tmp_path_factory.mktemp(layout)
        codes = run_ranks(ranks, _train_all, str(config), str(folder), overrides)
        assert codes == [[0] * len(NAMES)] * ranks
        for name in NAMES:
            lines = (folder / name / "metrics.jsonl").read_text().splitlines()
            found[layout, name] = [json.loads(line) for line in lines]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_shards_give_the_run_of_one_process(runs, name) -> None:
    alone, spread = runs["one", name], runs["shards", name]
    # T^2 multiplies the rounding of a small divergence, and Adam that of the temperature's gradient
    relative = {"ctkd": 1e-3, "dkd": 1e-4}.get(name, 1e-5)
    figures = ["loss", "objective", "kl", "cross_entropy", "grad_norm"]
    figures += ["temperature", "temperature_gradient"] if name == "ctkd" else []
    for figure in figures:
        expected = toy.column(alone, figure)
        assert len(expected) == toy.STEPS
        assert toy.column(spread, figure) == pytest.approx(expected, rel=relative, abs=2e-6), figure


def test_the_temperature_of_ctkd_moves_after_the_first_step(runs) -> None:
    temperatures = toy.column(runs["one", "ctkd"], "temperature")
    assert temperatures[0] == temperatures[1]
    assert len(set(temperatures)) == toy.STEPS - 1


def test_the_temperature_is_saved_and_restored(config, tmp_path) -> None:
    overrides = ("loss.name=ctkd", "loss.temperature_lr=0.3", "training.steps=6")
    straight = toy.train(config, tmp_path / "a", 1, *overrides)
    toy.train(config, tmp_path / "b", 1, *overrides, "training.stop_at=3", save=True)
    resumed = toy.train(config, tmp_path / "b", 1, *overrides)
    for figure in ("loss", "temperature", "temperature_gradient"):
        assert toy.column(resumed, figure) == toy.column(straight, figure)

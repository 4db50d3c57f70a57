"""Weights & Biases, replaced by a stand-in: what it is told, and when it is left alone."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from taid_megatron.config.checks import check
from taid_megatron.config.engine import EngineAbilities
from taid_megatron.config.errors import UserError
from taid_megatron.training.metrics import MetricsWriter
from taid_megatron.training.wandb_log import WandbLog

from ..config.configs import make

CPU = EngineAbilities(has_cuda=False, has_transformer_engine=False, has_apex=False, gpu_count=0)


class StandIn:
    """wandb.init's run; `init` may refuse."""

    def __init__(self, refuses: str | None = None) -> None:
        self.refuses, self.starts, self.logged, self.finished = refuses, [], [], 0

    def init(self, **options):
        if self.refuses:
            raise RuntimeError(self.refuses)
        self.starts.append(options)
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, figures):
        self.logged.append(figures)

    def finish(self):
        self.finished += 1


@pytest.fixture
def run(tmp_path):
    return make(tmp_path / "taid", logging={"wandb": "small-models"})


def written(monkeypatch, run, stand_in, record) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=stand_in.init))
    writer = MetricsWriter(
        run.run.folder, tensorboard=False, progress=False, total_steps=2, wandb=WandbLog(run)
    )
    writer.log(record)
    writer.close()
    writer.close()


def test_it_gets_the_finite_numbers_and_is_finished_once(monkeypatch, run) -> None:
    stand_in = StandIn()
    record = {"step": 1, "loss": 2.5, "kl": float("nan"), "grad_norm": None, "skipped": "loss"}
    written(monkeypatch, run, stand_in, record)
    assert stand_in.logged == [{"step": 1, "loss": 2.5}]
    assert stand_in.finished == 1
    (start,) = stand_in.starts
    assert (start["project"], start["name"]) == ("small-models", "taid")
    assert start["config"]["training"]["seq_length"] == 32


def test_a_resume_goes_on_in_the_same_run(monkeypatch, run) -> None:
    stand_in = StandIn()
    for step in (1, 2):
        written(monkeypatch, run, stand_in, {"step": step, "loss": 1.0})
    first, second = stand_in.starts
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"


def test_what_it_refuses_is_one_line_with_a_mend(monkeypatch, run) -> None:
    with pytest.raises(UserError, match="small-models: no key.*wandb login"):
        written(monkeypatch, run, StandIn(refuses="no key"), {"step": 1})


def test_without_the_package_a_run_is_refused_before_it_starts(monkeypatch, run) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="needs wandb, which is not installed; pip install wandb"):
        check(run, engine=CPU)

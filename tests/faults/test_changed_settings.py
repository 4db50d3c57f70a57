"""A resume under other settings is refused; where they are accepted it goes on, loudly."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from taid_megatron.config.errors import ConfigError
from taid_megatron.training import loop

from ..distributed import toy
from ..distributed.ranks import run_ranks

STEPS = ("training.steps=6", "checkpoint.every=2")
CHANGED = ("optimizer.lr=1e-3", "optimizer.beta1=0.5", "training.global_batch_size=4")


@pytest.fixture
def half_way(straight, tmp_path) -> Path:
    """The straight run's folder, as it was after step 4."""
    name = "step_00000004"
    shutil.copytree(straight / "checkpoints" / name, tmp_path / "checkpoints" / name)
    return tmp_path


def test_other_settings_are_refused_by_name(config, half_way, capfd) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.accept_changes=true") as refusal:
        toy.train(config, half_way, 1, *STEPS, *CHANGED)
    assert str(refusal.value).startswith(
        "training.global_batch_size, optimizer.lr, optimizer.beta1: other settings than in "
    )
    lines = capfd.readouterr().err.splitlines()
    assert "warning: changed: optimizer.lr: 0.005 in step_00000004, 0.001 now" in lines
    assert not (half_way / "config.yaml").exists()


def test_accepted_settings_are_said_recorded_and_in_force(config, half_way, capfd) -> None:
    accepted = (*STEPS, *CHANGED, "checkpoint.accept_changes=true")
    records = toy.train(config, half_way, 1, *accepted, save=True)
    assert (
        "changed: training.global_batch_size: 8 in step_00000004, 4 now" in capfd.readouterr().err
    )
    (noted,) = toy.column(records, "config_changes")
    assert "optimizer.lr: 0.005 in step_00000004, 0.001 now" in noted
    assert toy.column(records, "batch_size") == [4, 4]
    # a cosine from 1e-3 to 0 over six steps, two of them warm-up: the last two
    expected = [1e-3 * (1 + math.cos(math.pi * done / 4)) / 2 for done in (3, 4)]
    assert toy.column(records, "lr") == pytest.approx(expected, abs=1e-12)
    # what was saved has the new settings: the same command goes on without a word
    toy.train(config, half_way, 1, *STEPS, *CHANGED, save=True)
    assert "changed" not in capfd.readouterr().err


def _groups(rank: int, size: int, config: str, overrides: list[str]) -> list[dict[str, Any]]:
    with toy.trainer(config, *overrides) as trainer:
        before = [dict(group) for group in trainer.optimizer.param_groups]
        loop._resume(trainer)
        after = trainer.optimizer.param_groups
        settings = ("betas", "eps", "weight_decay", "max_lr", "min_lr")
        for old, new in zip(before, after, strict=True):
            assert {name: old.get(name) for name in settings} == {
                name: new.get(name) for name in settings
            }
        return [{"betas": group["betas"]} for group in after]


def test_the_optimizer_takes_the_new_settings_not_the_saved_ones(config, half_way) -> None:
    changed = [f"run.folder={half_way}", *STEPS, *CHANGED, "checkpoint.accept_changes=true"]
    (groups,) = run_ranks(1, _groups, str(config), changed)
    assert {group["betas"] for group in groups} == {(0.5, 0.95)}


def test_data_is_known_by_its_content_not_by_its_place(config, half_way, capfd) -> None:
    moved = half_way / "moved"
    for ending in (".bin", ".idx", ".manifest.json"):
        if (source := config.parent / f"train{ending}").exists():
            shutil.copy(source, f"{moved}{ending}")
    toy.train(config, half_way, 1, *STEPS, f"data.blend={moved}")
    assert "changed" not in capfd.readouterr().err
    other = toy.write_tokens(half_way / "other", seed=7)
    with pytest.raises(ConfigError, match=r"^data\.blend: other settings"):
        toy.train(config, half_way, 1, *STEPS, f"data.blend={other}")


def test_a_checkpoint_without_its_configuration_says_so(config, half_way, capfd) -> None:
    from taid_megatron.checkpointing import manifest

    checkpoint = half_way / "checkpoints/step_00000004"
    state = json.loads((checkpoint / "state.json").read_text())
    assert state.pop("config")
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / manifest.MANIFEST).unlink()
    manifest.write(checkpoint, manifest.record(sorted(checkpoint.iterdir())))
    toy.train(config, half_way, 1, *STEPS, "optimizer.lr=1e-3")
    assert "step_00000004 was saved without its configuration" in capfd.readouterr().err

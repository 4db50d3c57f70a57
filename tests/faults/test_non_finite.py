"""No update is made with a loss or gradient that is not finite on any rank."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from taid_megatron.training import loop
from taid_megatron.training.evaluation import gathered_weights
from taid_megatron.training.setup import Trainer, build_batches

from ..distributed import toy
from ..distributed.ranks import run_ranks


def _moving(trainer: Trainer) -> list[torch.Tensor]:
    """Everything that an update changes, copied."""
    moments = [
        value
        for optimizer in trainer.optimizer.chained_optimizers
        for state in optimizer.optimizer.state.values()
        for value in state.values()
    ]
    weights = [parameter for pair in trainer.pairs for parameter in pair.parameters()]
    with gathered_weights(trainer.stages):  # else those of other ranks come with the next forward
        return [tensor.detach().clone() for tensor in (*weights, *moments)]


def _one_bad_step(
    rank: int, size: int, config: str, overrides: tuple[str, ...], fault: str, bad_rank: int
) -> dict[str, Any]:
    with toy.trainer(config, *overrides) as trainer:
        batches, _ = build_batches(trainer)
        with batches:
            loop._optimizer_step(trainer, batches)
            before, schedule = _moving(trainer), trainer.schedule or trainer.temperature
            state, lr = schedule.state_dict(), trainer.lr_schedule.num_steps
            heal = _BREAKS[fault](trainer) if rank == bad_rank else lambda: None
            record = loop._optimizer_step(trainer, batches)
            heal()
            after = _moving(trainer)
            same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            kept = schedule.state_dict() == state
            assert trainer.lr_schedule.num_steps == lr + 1
            good = loop._optimizer_step(trainer, batches)
        moved = not all(torch.equal(a, b) for a, b in zip(after, _moving(trainer), strict=True))
        return {
            **{"record": record, "same": same, "kept": kept, "good": good, "moved": moved},
            "finite": all(bool(torch.isfinite(tensor).all()) for tensor in _moving(trainer)),
        }


def _nan_teacher(trainer: Trainer) -> Any:
    weight = trainer.pairs[-1].teacher.output_layer.weight
    saved = weight.clone()
    weight.fill_(math.nan)
    return lambda: weight.copy_(saved)


def _bad_gradient(value: float) -> Any:
    def spoil(trainer: Trainer) -> Any:
        run = trainer.pipeline.run

        def spoiled(*args: Any, **kwargs: Any) -> Any:
            means = run(*args, **kwargs)
            trainer.stages[0].buffers[0].grad_data[7] = value
            return means

        object.__setattr__(trainer.pipeline, "run", spoiled)
        return lambda: object.__setattr__(trainer.pipeline, "run", run)

    return spoil


_BREAKS = {
    "teacher": _nan_teacher,
    "nan": _bad_gradient(math.nan),
    "inf": _bad_gradient(-math.inf),
    "overflow": _bad_gradient(1e38),
}
TP2 = ("parallel.tensor=2",)
SHARDED = (
    *("parallel.distributed_optimizer=true", "parallel.overlap_grad_reduce=true"),
    *("parallel.overlap_param_gather=true", "training.precision=bf16"),
)


@pytest.mark.parametrize(
    ("ranks", "overrides", "fault", "bad_rank", "named"),
    [
        pytest.param(1, ("optimizer.clip_grad=0",), "nan", 0, "gradient", id="no clipping"),
        pytest.param(1, (), "overflow", 0, "gradient", id="a norm that overflows"),
        pytest.param(2, TP2, "nan", 1, "gradient", id="TP=2, second rank alone"),
        pytest.param(2, ("parallel.pipeline=2",), "inf", 0, "gradient", id="PP=2, first rank"),
        pytest.param(2, SHARDED, "teacher", 1, "loss", id="DP=2 sharded, bf16, one teacher"),
        pytest.param(2, ("loss.name=ctkd", *TP2), "teacher", 0, "loss", id="ctkd"),
    ],
)
def test_the_step_is_skipped_everywhere(config, ranks, overrides, fault, bad_rank, named) -> None:
    told = run_ranks(ranks, _one_bad_step, str(config), overrides, fault, bad_rank)
    for rank in told:
        record = rank["record"]
        assert (record["step"], record["skipped"]) == (2, named)
        assert (record["skipped_first_sample"], record["skipped_last_sample"]) == (8, 15)
        assert rank["same"]
        assert rank["kept"]
        assert rank["moved"]  # and the next step is one as any other
        assert rank["finite"]
        assert rank["good"]["step"] == 3
        assert rank["good"]["consumed_samples"] == 24


def _always_bad(rank: int, size: int, config: str, overrides: list[str]) -> str:
    from taid_megatron.config.load import load

    build = loop.build_trainer

    def broken(*args: Any) -> Trainer:
        trainer = build(*args)
        _nan_teacher(trainer)
        return trainer

    loop.build_trainer = broken
    with pytest.raises(loop.NonFiniteError) as error:
        loop.run(load(config, overrides))
    return str(error.value)


def test_too_many_in_a_row_end_the_run(config, tmp_path) -> None:
    overrides = [f"run.folder={tmp_path}", "training.max_skipped_steps=2", "logging.every=5"]
    (text,) = run_ranks(1, _always_bad, str(config), overrides)
    assert "step 3: the loss is not finite" in text
    assert "samples 16 to 23" in text
    assert "3 in a row, training.max_skipped_steps is 2" in text
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2  # recorded though they are not logged steps
    assert not (tmp_path / "checkpoints").exists()

"""A run from its configuration to its last checkpoint: read `run`, then `_train`."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from torch.utils.data import Dataset

from taid_megatron.config.batches import global_batch_size_at
from taid_megatron.config.checks import EngineAbilities, check
from taid_megatron.config.load import dump
from taid_megatron.config.schema import Config
from taid_megatron.data import dali_reader
from taid_megatron.data.loader import DistributedBatches
from taid_megatron.runtime import distributed
from taid_megatron.runtime.distributed import World, any_of, on_first_rank
from taid_megatron.runtime.log import get_logger, say
from taid_megatron.runtime.refusal import agreed
from taid_megatron.training import checkpoints
from taid_megatron.training.checkpoints import resume as _resume
from taid_megatron.training.checkpoints import save as _save
from taid_megatron.training.evaluation import evaluate
from taid_megatron.training.metrics import MetricsWriter
from taid_megatron.training.objectives import TrainingObjective
from taid_megatron.training.profiling import Profiler
from taid_megatron.training.setup import (
    Trainer,
    build_batches,
    build_trainer,
    check_tokenizer,
    keep_tokenizer,
    teacher_architecture,
)
from taid_megatron.training.stopping import STOPPED, RunLock, Signals, recorded
from taid_megatron.training.wandb_log import WandbLog
from taid_megatron.training.watchdog import Watchdog


class NonFiniteError(RuntimeError):
    """Loss or gradients were not finite for more steps in a row than training.max_skipped_steps."""


def run(config: Config) -> int:
    """Train to the configured length, or on from the run folder's newest checkpoint.

    To be called on every rank. Returns the exit code. Raises UserError for what the user can mend,
    before anything is built.
    """
    with Signals() as signals:  # one that comes while ranks wait for one another is not lost
        abilities = agreed(lambda: _examined(config), _collectives_minutes(config))
        world = distributed.start(config.parallel, config.run.seed, _collectives_minutes(config))
        try:
            with (
                _sole_writer(config.run.folder, world) as (lock, told),
                _watchdog(config, world, lock) as watch,
            ):
                trainer = build_trainer(config, world, abilities)
                trainer.lock, trainer.watch = lock, watch
                code = _run(trainer, signals)
                told |= {"exit_code": code, "step": trainer.step, "signal": signals.received}
                return code
        finally:
            distributed.stop(world)


def _examined(config: Config) -> EngineAbilities:
    """What this machine offers. Raises UserError where the run cannot be had on it."""
    abilities = distributed.abilities()
    check(
        config,
        distributed.world_size_from_environment(),
        teacher_architecture=teacher_architecture(config),
        engine=abilities,
    )
    check_tokenizer(config)
    if config.data.reader == "dali":
        dali_reader.require()
    return abilities


def _collectives_minutes(config: Config) -> float:
    """The collectives' own time-out, in minutes: past the watchdog's, which says who it was."""
    return max(config.training.step_timeout, config.training.phase_timeout) / 60 + 2.0


def _watchdog(config: Config, world: World, lock: RunLock | None) -> Watchdog:
    return Watchdog(
        config.run.folder,
        rank=world.rank,
        size=world.size,
        store=distributed.private_store("watchdog"),
        step_timeout=config.training.step_timeout,
        phase_timeout=config.training.phase_timeout,
        silence_timeout=config.training.silence_timeout,
        on_end=lock.release if lock else lambda: None,
    )


def _run(trainer: Trainer, signals: Signals) -> int:
    """Resume, train, and return the exit code."""
    config = trainer.config
    resumed = _resume(trainer)
    if trainer.world.is_main:
        (config.run.folder / "config.yaml").write_text(dump(config))
        keep_tokenizer(config)
    dist.barrier()
    batches, validation = build_batches(trainer)
    with batches, _metrics(trainer) as metrics, checkpoints.no_save_left(trainer):
        if metrics is not None and resumed:
            metrics.log({"step": trainer.step, **resumed})
        return _train(trainer, batches, validation, metrics, signals)


@contextmanager
def _sole_writer(folder: Path, world: World) -> Iterator[tuple[RunLock | None, dict[str, Any]]]:
    """The run folder taken and run_status.json kept by the main rank; all ranks are refused alike.

    Gives the main rank's lock, and where to put what the status is to tell.
    """
    lock = RunLock(folder) if world.is_main else None
    on_first_rank(lambda: lock.take() if lock else None)
    if lock is None:
        yield None, {}
        return
    try:
        with recorded(folder) as told:
            yield lock, told
    finally:
        lock.release()


def _train(
    trainer: Trainer,
    batches: DistributedBatches,
    validation: Dataset | None,
    metrics: MetricsWriter | None,
    signals: Signals,
) -> int:
    config, watch = trainer.config, trainer.watch
    assert watch is not None
    started, minutes = time.monotonic(), config.training.max_minutes
    last_step = min(trainer.steps, config.training.stop_at or trainer.steps)
    if trainer.step >= last_step:
        say(f"nothing left to do: {config.run.folder} is at step {trainer.step} of {last_step}")
    profiler = Profiler(config.logging, config.run.folder, trainer.world)
    with profiler, _collected_by_hand(config.training.gc_interval):
        while trainer.step < last_step:
            profiler.before(trainer.step + 1)
            watch.step(trainer.step + 1)
            record = _optimizer_step(trainer, batches)
            profiler.after(trainer.step)
            late = minutes is not None and time.monotonic() - started > 60 * minutes
            stopped, out_of_time = any_of((signals.received is not None, late), trainer.world)
            last = stopped or out_of_time or trainer.step == last_step
            evaluated = (last and not stopped) or _due(config.evaluation.every, trainer)
            if validation is not None and evaluated:
                watch.phase(f"the evaluation after step {trainer.step}")
                record |= {"step": trainer.step, **_held_out(trainer, validation)}
            if metrics is not None and record:
                metrics.log(record)
            checkpoints.publish_written(trainer)
            if last or _due(config.checkpoint.every, trainer):
                watch.phase(f"the save of step {trainer.step}")
                _save(trainer)
            if last:
                checkpoints.finish(trainer)
            if _due(config.training.gc_interval, trainer):
                gc.collect()
            if stopped and trainer.step < last_step:
                name = signals.received or "signal on another rank"
                say(f"{name}: stopped after step {trainer.step}, to be resumed")
                return STOPPED
            if out_of_time:
                say(f"training.max_minutes is over: stopping after step {trainer.step}")
                break
    return 0


def _optimizer_step(trainer: Trainer, batches: DistributedBatches) -> dict[str, Any]:
    """One update of the student, and of t or the temperature.

    Returns the step's record, empty on unlogged steps.
    """
    config, started = trainer.config, time.perf_counter()
    logged = (trainer.step + 1) % config.logging.every == 0 or trainer.step + 1 == trainer.steps
    t = trainer.schedule.t if trainer.schedule else None
    temperature = trainer.temperature.value if trainer.temperature else None
    objective = TrainingObjective(
        trainer.world,
        trainer.vocabulary,
        loss=config.loss,
        sequence_parallel=config.parallel.sequence_parallel,
        t=t,
        temperature=temperature,
        logged=logged,
        with_teacher=trainer.has_teacher,
        rule=config.taid.rule,
    )
    for stage in trainer.stages:
        stage.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    batch_size = global_batch_size_at(config, trainer.consumed_samples)
    means = trainer.pipeline.run(batches.step(batch_size), objective)
    trainer.lr_schedule.step(1)
    trainer.step += 1
    trainer.consumed_samples += batch_size
    if fault := _not_finite(trainer, means):
        return _skipped(trainer, batch_size, fault)
    trainer.skipped_in_a_row = 0
    spike = _loss_spike(trainer, means["loss"], batch_size)
    _, grad_norm, _ = trainer.optimizer.step()
    if trainer.schedule is not None:
        trainer.schedule.update(means["objective"])
    if trainer.temperature is not None:
        share = 1.0 - config.loss.ce_weight
        lr = get_canonical_lr_for_logging(trainer.optimizer.param_groups)
        trainer.temperature.update(share * means["temperature_gradient"], lr)
    if not logged:
        return {"step": trainer.step, "loss": means["loss"], **spike} if spike else {}
    seconds = time.perf_counter() - started
    record: dict[str, Any] = {"step": trainer.step, **means}
    if t is not None:
        record["t"] = t
    if temperature is not None:
        record["temperature"] = temperature
    return record | {
        **spike,
        "lr": get_canonical_lr_for_logging(trainer.optimizer.param_groups),
        "grad_norm": float(grad_norm) if grad_norm is not None else None,
        "batch_size": batch_size,
        "consumed_samples": trainer.consumed_samples,
        "tokens_per_second": means["tokens"] / seconds,
        "step_seconds": seconds,
    }


def _not_finite(trainer: Trainer, means: dict[str, float]) -> str | None:
    """What of the step is not finite on any rank, the same answer on all; None where all is.

    megatron-core looks for NaN with fp16's loss scaler only: in bf16 and fp32 its clipping would
    write it into every weight. The gradients are read before they are clipped, whole buffers at
    once; squares that overflow count as not finite, for the clipped gradient would be nothing.
    """
    driving = ("loss", "objective", "temperature_gradient")
    loss = any(not math.isfinite(means.get(name, 0.0)) for name in driving)
    buffers = [
        buffer.grad_data
        for stage in trainer.stages
        for buffer in (*stage.buffers, *stage.expert_parallel_buffers)
    ]
    norms = [torch.linalg.vector_norm(buffer) for buffer in buffers]  # none without a layer
    gradient = bool(norms) and not bool(torch.isfinite(torch.stack(norms)).all())
    loss_on_any, gradient_on_any = any_of((loss, gradient), trainer.world)
    return "loss" if loss_on_any else "gradient" if gradient_on_any else None


def _skipped(trainer: Trainer, batch_size: int, fault: str) -> dict[str, Any]:
    """The record of a step that is not applied: weights, moments, t and temperature stay.

    The data and the learning rate move on. Raises NonFiniteError after too many in a row.
    """
    trainer.skipped_in_a_row += 1
    first, last = _samples(trainer, batch_size)
    text = (
        f"step {trainer.step}: the {fault} is not finite; the step was not applied on any rank "
        f"(samples {first} to {last})"
    )
    get_logger().warning(text)
    allowed = trainer.config.training.max_skipped_steps
    if trainer.skipped_in_a_row > allowed:
        raise NonFiniteError(
            f"{text}; {trainer.skipped_in_a_row} in a row, training.max_skipped_steps is "
            f"{allowed}: look at those samples and at the learning rate, then resume from the last "
            "checkpoint"
        )
    return {
        "step": trainer.step,
        "skipped": fault,
        "skipped_first_sample": first,
        "skipped_last_sample": last,
        "consumed_samples": trainer.consumed_samples,
    }


def _loss_spike(trainer: Trainer, loss: float, batch_size: int) -> dict[str, Any]:
    """What to record where the step's loss leaps up: by how much, and its samples."""
    above = trainer.recent_losses.add(loss, trainer.config.training.loss_spike_deviations)
    if above is None:
        return {}
    first, last = _samples(trainer, batch_size)
    get_logger().warning(
        f"step {trainer.step}: the loss is {loss:.4g}, {above:.1f} standard deviations above those "
        f"before (samples {first} to {last})"
    )
    return {
        "loss_spike": above,
        "loss_spike_first_sample": first,
        "loss_spike_last_sample": last,
    }


def _samples(trainer: Trainer, batch_size: int) -> tuple[int, int]:
    """First and last sample of the step that was just taken."""
    return trainer.consumed_samples - batch_size, trainer.consumed_samples - 1


def _due(every: int | None, trainer: Trainer) -> bool:
    return every is not None and every > 0 and trainer.step % every == 0


def _held_out(trainer: Trainer, validation: Dataset) -> dict[str, float]:
    return {f"held_out_{name}": value for name, value in evaluate(trainer, validation).items()}


@contextmanager
def _metrics(trainer: Trainer) -> Iterator[MetricsWriter | None]:
    """The writer, on the one rank that writes; all ranks are refused alike."""
    settings = trainer.config.logging
    wandb: list[WandbLog] = []
    if settings.wandb is not None:
        on_first_rank(lambda: wandb.append(WandbLog(trainer.config)))
    if not trainer.world.is_main:
        yield None
        return
    writer = MetricsWriter(
        trainer.config.run.folder,
        tensorboard=settings.tensorboard,
        progress=settings.progress,
        total_steps=trainer.steps,
        resume_step=trainer.step,
        wandb=wandb[0] if wandb else None,
    )
    try:
        yield writer
    finally:
        writer.close()


@contextmanager
def _collected_by_hand(interval: int) -> Iterator[None]:
    """Python's collector off while training, so that no rank pauses alone; 0 leaves it on."""
    if not interval:
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

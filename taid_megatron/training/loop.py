"""A run from its configuration to its last checkpoint: read `run`, then `_train`."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from torch.utils.data import Dataset

from taid_megatron import __version__
from taid_megatron.checkpointing import store
from taid_megatron.config.batches import global_batch_size_at
from taid_megatron.config.checks import check
from taid_megatron.config.errors import ConfigError
from taid_megatron.config.hf import differing
from taid_megatron.config.load import dump
from taid_megatron.config.schema import Architecture, Config
from taid_megatron.data.loader import DistributedBatches
from taid_megatron.runtime import distributed
from taid_megatron.runtime.distributed import any_rank
from taid_megatron.runtime.log import say
from taid_megatron.runtime.random_state import get_random_state, set_random_state
from taid_megatron.training.evaluation import evaluate, gathered_weights
from taid_megatron.training.metrics import MetricsWriter
from taid_megatron.training.objectives import TrainingObjective
from taid_megatron.training.profiling import Profiler
from taid_megatron.training.setup import (
    Trainer,
    build_batches,
    build_trainer,
    keep_tokenizer,
    teacher_architecture,
)

_OR_ELSE = "set it back, or name another run.folder"


class NonFiniteLossError(RuntimeError):
    """The loss of a step is not a number: the step was not applied."""


def run(config: Config) -> int:
    """Train to the configured length, or on from the run folder's newest checkpoint.

    To be called on every rank. Returns the exit code. Raises UserError for what the user can mend,
    before anything is built.
    """
    abilities = distributed.abilities()
    check(
        config,
        distributed.world_size_from_environment(),
        teacher_architecture=teacher_architecture(config),
        engine=abilities,
    )
    world = distributed.start(config.parallel, config.run.seed)
    try:
        trainer = build_trainer(config, world, abilities)
        _resume(trainer)
        if world.is_main:
            config.run.folder.mkdir(parents=True, exist_ok=True)
            (config.run.folder / "config.yaml").write_text(dump(config))
            keep_tokenizer(config)
        dist.barrier()
        batches, validation = build_batches(trainer)
        with batches, _metrics(trainer) as metrics:
            _train(trainer, batches, validation, metrics)
        return 0
    finally:
        distributed.stop(world)


def _train(
    trainer: Trainer,
    batches: DistributedBatches,
    validation: Dataset | None,
    metrics: MetricsWriter | None,
) -> None:
    config = trainer.config
    started, minutes = time.monotonic(), config.training.max_minutes
    last_step = min(trainer.steps, config.training.stop_at or trainer.steps)
    if trainer.step >= last_step:
        say(f"nothing left to do: {config.run.folder} is at step {trainer.step} of {last_step}")
    profiler = Profiler(config.logging, config.run.folder, trainer.world)
    with profiler, _collected_by_hand(config.training.gc_interval):
        while trainer.step < last_step:
            profiler.before(trainer.step + 1)
            record = _optimizer_step(trainer, batches)
            profiler.after(trainer.step)
            out_of_time = minutes is not None and any_rank(
                time.monotonic() - started > 60 * minutes, trainer.world
            )
            last = out_of_time or trainer.step == last_step
            if validation is not None and (last or _due(config.evaluation.every, trainer)):
                record |= {"step": trainer.step, **_held_out(trainer, validation)}
            if metrics is not None and record:
                metrics.log(record)
            if last or _due(config.checkpoint.every, trainer):
                _save(trainer)
            if _due(config.training.gc_interval, trainer):
                gc.collect()
            if out_of_time:
                say(f"training.max_minutes is over: stopping after step {trainer.step}")
                break


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
    if not math.isfinite(means["loss"]):
        raise NonFiniteLossError(
            f"step {trainer.step + 1}: the loss is {means['loss']}; the step was not applied "
            f"(samples {trainer.consumed_samples} to {trainer.consumed_samples + batch_size - 1})"
        )
    trainer.lr_schedule.step(1)
    _, grad_norm, _ = trainer.optimizer.step()
    trainer.step += 1
    trainer.consumed_samples += batch_size
    if trainer.schedule is not None:
        trainer.schedule.update(means["objective"])
    if trainer.temperature is not None:
        share = 1.0 - config.loss.ce_weight
        lr = get_canonical_lr_for_logging(trainer.optimizer.param_groups)
        trainer.temperature.update(share * means["temperature_gradient"], lr)
    if not logged:
        return {}
    seconds = time.perf_counter() - started
    record: dict[str, Any] = {"step": trainer.step, **means}
    if t is not None:
        record["t"] = t
    if temperature is not None:
        record["temperature"] = temperature
    return record | {
        "lr": get_canonical_lr_for_logging(trainer.optimizer.param_groups),
        "grad_norm": float(grad_norm) if grad_norm is not None else None,
        "batch_size": batch_size,
        "consumed_samples": trainer.consumed_samples,
        "tokens_per_second": means["tokens"] / seconds,
        "step_seconds": seconds,
    }


def _due(every: int | None, trainer: Trainer) -> bool:
    return every is not None and every > 0 and trainer.step % every == 0


def _held_out(trainer: Trainer, validation: Dataset) -> dict[str, float]:
    return {f"held_out_{name}": value for name, value in evaluate(trainer, validation).items()}


def _save(trainer: Trainer) -> None:
    config = trainer.config
    with gathered_weights(trainer.stages):
        path = store.save(
            config.run.folder / "checkpoints",
            trainer.step,
            stages=trainer.students,
            optimizer=trainer.optimizer,
            random_state=get_random_state(),
            state={
                "format": 1,
                "consumed_samples": trainer.consumed_samples,
                "taid": trainer.schedule.state_dict() if trainer.schedule else None,
                "ctkd": trainer.temperature.state_dict() if trainer.temperature else None,
                "architecture": config.student.architecture.model_dump(mode="json"),
                "seq_length": config.training.seq_length,
                "layout": _layout(trainer),
                "distributed_optimizer": config.parallel.distributed_optimizer,
                "versions": {"taid_megatron": __version__, "torch": torch.__version__},
            },
        )
    say(f"checkpoint: {path}")


def _layout(trainer: Trainer) -> dict[str, Any]:
    parallel = trainer.config.parallel.model_dump(mode="json")
    sizes = {name: parallel[name] for name in ("tensor", "pipeline", "virtual_pipeline", "context")}
    return {**sizes, "world_size": trainer.world.size, "device": trainer.world.device.type}


def _resume(trainer: Trainer) -> None:
    """Go on from the newest checkpoint of the run folder, where there is one."""
    config = trainer.config
    checkpoint = store.newest(config.run.folder / "checkpoints")
    if checkpoint is None:
        return
    if not config.checkpoint.resume:
        # starting over beside it would leave two runs' checkpoints to be taken for one
        raise ConfigError(
            f"checkpoint.resume is false and {checkpoint.path} is there: name another run.folder, "
            "or move this one away"
        )
    state = checkpoint.state()
    _refuse_other_model(config, state, checkpoint)
    same_layout = state["layout"] == _layout(trainer)
    restored = store.load(
        checkpoint,
        stages=trainer.students,
        optimizer=trainer.optimizer,
        random_state=get_random_state() if same_layout else None,
    )
    if restored is not None:
        set_random_state(restored)
    trainer.step = checkpoint.step
    trainer.consumed_samples = state["consumed_samples"]
    trainer.lr_schedule.step(trainer.step)
    for name, schedule in (("taid", trainer.schedule), ("ctkd", trainer.temperature)):
        if schedule is None:
            continue
        try:
            schedule.load_state_dict(state[name])
        except ValueError as error:
            message = f"{name} does not fit {checkpoint.path}: {error}; {_OR_ELSE}"
            raise ConfigError(message) from error
    layout = "" if same_layout else " (another layout: dropout draws anew from the seed)"
    say(f"resuming {checkpoint.path} after step {trainer.step}{layout}")


def _refuse_other_model(
    config: Config, state: dict[str, Any], checkpoint: store.Checkpoint
) -> None:
    saved, wanted = Architecture.model_validate(state["architecture"]), config.student.architecture
    if name := differing(saved, wanted):
        raise ConfigError(
            f"student.architecture.{name} is {getattr(wanted, name)}, {checkpoint.path} has "
            f"{getattr(saved, name)}: {_OR_ELSE}"
        )
    for name, what in (("taid", "TAID schedule"), ("ctkd", "CTKD temperature")):
        saved_one = state.get(name) is not None
        if saved_one != (config.loss.name == name):
            raise ConfigError(
                f"loss.name is {config.loss.name}, {checkpoint.path} "
                f"{'has a' if saved_one else 'has no'} {what}: {_OR_ELSE}"
            )
    if state["distributed_optimizer"] != config.parallel.distributed_optimizer:
        raise ConfigError(
            f"parallel.distributed_optimizer is {config.parallel.distributed_optimizer}, "
            f"{checkpoint.path} was saved with {state['distributed_optimizer']}, and the state of "
            f"one does not load into the other: {_OR_ELSE}"
        )


@contextmanager
def _metrics(trainer: Trainer) -> Iterator[MetricsWriter | None]:
    """The writer, on the one rank that writes."""
    if not trainer.world.is_main:
        yield None
        return
    settings = trainer.config.logging
    writer = MetricsWriter(
        trainer.config.run.folder,
        tensorboard=settings.tensorboard,
        progress=settings.progress,
        total_steps=trainer.steps,
        resume_step=trainer.step,
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

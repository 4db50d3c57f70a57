"""What a run puts into a checkpoint, and how it goes on from one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from data_tools.manifest import index_fingerprint
from taid_megatron.checkpointing import store
from taid_megatron.config.changes import changes, line
from taid_megatron.config.errors import ConfigError
from taid_megatron.config.hf import differing
from taid_megatron.config.schema import Architecture, Blend, Config
from taid_megatron.runtime.distributed import on_first_rank
from taid_megatron.runtime.log import get_logger, say
from taid_megatron.runtime.random_state import get_random_state, set_random_state
from taid_megatron.training.evaluation import gathered_weights
from taid_megatron.training.setup import Trainer, tokenizer_fingerprint

_LONG_WAIT_SECONDS = 1.0
_OR_ELSE = "set it back, or name another run.folder"
# In the optimizer's parameter groups: what the configuration says. A loaded state brings its own.
_SETTINGS = ("lr", "betas", "eps", "weight_decay", "max_lr", "min_lr", "start_wd", "end_wd")


def save(trainer: Trainer) -> None:
    """Write a checkpoint of the step just done; on every rank.

    With checkpoint.asynchronous it is a copy in memory that is taken here: `publish_written` looks
    after the rest, step by step, and `finish` waits for it.
    """
    config, lock = trainer.config, trainer.lock
    started = time.monotonic()
    finish(trainer)  # one save at a time
    if (waited := time.monotonic() - started) > _LONG_WAIT_SECONDS:
        get_logger().warning(
            f"step {trainer.step}: waited {waited:.0f} s for the save before to be written; raise "
            "checkpoint.every"
        )
    on_first_rank(lambda: lock.check() if lock else None)
    settings = config.checkpoint
    with gathered_weights(trainer.stages):
        trainer.saving = store.begin(
            config.run.folder / "checkpoints",
            trainer.step,
            stages=trainer.students,
            optimizer=trainer.optimizer,
            random_state=get_random_state(),
            state=_state(trainer) if trainer.world.is_main else {},
            retention=store.Retention(
                keep=settings.keep, every=settings.keep_every, in_use=trainer.resumed_from
            ),
            writer_timeout=settings.writer_timeout if settings.asynchronous else None,
        )
    if not settings.asynchronous:
        finish(trainer)


def publish_written(trainer: Trainer) -> None:
    """Publish the save under way, where there is one and every rank's part of it is written.

    To be called on every rank once per step; costs one small all-reduce while a save is under way.
    Raises on all ranks where a writer failed, died or is stuck.
    """
    if trainer.saving is not None and trainer.saving.written():
        _publish(trainer, trainer.saving)


def finish(trainer: Trainer) -> None:
    """Wait for the save under way, at most checkpoint.writer_timeout, and publish it."""
    if trainer.saving is not None:
        trainer.saving.wait()
        _publish(trainer, trainer.saving)


def _publish(trainer: Trainer, saving: store.PendingSave) -> None:
    lock = trainer.lock
    on_first_rank(lambda: lock.check() if lock else None)
    path = saving.publish()
    trainer.saving = None
    say(f"checkpoint: {path}")


@contextmanager
def no_save_left(trainer: Trainer) -> Iterator[None]:
    """At the end, whatever ended it, no writer of this rank runs on."""
    try:
        yield
    finally:
        if trainer.saving is not None:
            trainer.saving.abandon()


def _state(trainer: Trainer) -> dict[str, Any]:
    """state.json, but for the step and the versions."""
    config = trainer.config
    return {
        "format": 1,
        "consumed_samples": trainer.consumed_samples,
        "taid": trainer.schedule.state_dict() if trainer.schedule else None,
        "ctkd": trainer.temperature.state_dict() if trainer.temperature else None,
        "architecture": config.student.architecture.model_dump(mode="json"),
        "seq_length": config.training.seq_length,
        "tokenizer": tokenizer_fingerprint(config),
        "data": _blend(config.data.blend),
        "layout": _layout(trainer),
        "distributed_optimizer": config.parallel.distributed_optimizer,
        "config": config.model_dump(mode="json"),
    }


def _layout(trainer: Trainer) -> dict[str, Any]:
    parallel = trainer.config.parallel.model_dump(mode="json")
    sizes = {name: parallel[name] for name in ("tensor", "pipeline", "virtual_pipeline", "context")}
    return {**sizes, "world_size": trainer.world.size, "device": trainer.world.device.type}


def _blend(parts: Blend) -> list[dict[str, Any]]:
    """The training data: prefix, weight, and a hash by which it is known under another name."""
    return [
        {"prefix": str(part.prefix), "weight": part.weight, "index": _index_hash(str(part.prefix))}
        for part in parts
    ]


@lru_cache
def _index_hash(prefix: str) -> str | None:
    """None where the files are not there: opening them will say so."""
    try:
        return index_fingerprint(prefix)
    except OSError:
        return None


def resume(trainer: Trainer) -> dict[str, str]:
    """Go on from the newest sound checkpoint of the run folder, where there is one.

    To be called on every rank. Returns what metrics.jsonl is to tell of it: `resumed_from`, the
    checkpoint, `checkpoint_faults`, the damaged ones passed over, and `config_changes`, the
    settings that are others now.
    """
    config = trainer.config
    folder = config.run.folder / "checkpoints"
    if not config.checkpoint.resume and (there := store.newest(folder)):
        # starting over beside it would leave two runs' checkpoints to be taken for one
        raise ConfigError(
            f"checkpoint.resume is false and {there.path} is there: name another run.folder, "
            "or move this one away"
        )
    checkpoint, faults = store.choose(
        folder, verify=config.checkpoint.verify, strict=config.checkpoint.strict
    )
    if checkpoint is None:
        return {}
    for fault in faults:
        get_logger().warning(f"passed over: {fault}")
    state = checkpoint.state()
    _refuse_other_model(config, state, checkpoint)
    changed = on_first_rank(lambda: _changes(config, state, checkpoint.path.name))
    _tell(changed, checkpoint, accepted=config.checkpoint.accept_changes)
    _restore(trainer, checkpoint, state)
    told = {"checkpoint_faults": faults, "config_changes": changed}
    found = {name: "; ".join(lines) for name, lines in told.items() if lines}
    if trainer.step < trainer.steps:  # else nothing is left to do, and nothing restarts
        found["resumed_from"] = checkpoint.path.name
    return found


def _restore(trainer: Trainer, checkpoint: store.Checkpoint, state: dict[str, Any]) -> None:
    same_layout = state["layout"] == _layout(trainer)
    with _own_settings(trainer.optimizer):
        restored = store.load(
            checkpoint,
            stages=trainer.students,
            optimizer=trainer.optimizer,
            random_state=get_random_state() if same_layout else None,
        )
    if restored is not None:
        set_random_state(restored)
    trainer.resumed_from = checkpoint.path
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


@contextmanager
def _own_settings(optimizer: Any) -> Iterator[None]:
    """Keep the configuration's settings in the parameter groups over the loading of their state."""
    own = [
        {name: group[name] for name in _SETTINGS if name in group}
        for group in optimizer.param_groups
    ]
    yield
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def _changes(config: Config, state: dict[str, Any], where: str) -> list[str]:
    """What changes the training and is another than in the checkpoint, one line each."""
    if "config" not in state:
        get_logger().warning(
            f"{where} was saved without its configuration, by an older version: whether settings "
            "have changed since is not known"
        )
        return []
    found = changes(state["config"], config, where)
    before, now = state.get("data"), _blend(config.data.blend)
    if before is not None and _known_by(before) != _known_by(now):
        found.append(line("data.blend", before, now, where))
    theirs, ours = state.get("tokenizer"), tokenizer_fingerprint(config)
    if theirs is not None and ours is not None and theirs != ours:
        found.append(line("the tokenizer of data.blend", theirs, ours, where))
    return found


def _known_by(blend: list[dict[str, Any]]) -> list[Any]:
    """What makes two blends one, wherever their files lie."""
    return [(part["index"] or part["prefix"], part["weight"]) for part in blend]


def _tell(changed: list[str], checkpoint: store.Checkpoint, *, accepted: bool) -> None:
    """Say what has changed. Raises ConfigError where that was not accepted."""
    for each in changed:
        get_logger().warning(f"changed: {each}")
    if changed and not accepted:
        keys = ", ".join(each.partition(":")[0] for each in changed)
        raise ConfigError(
            f"{keys}: other settings than in {checkpoint.path}, and they change the training: set "
            "them back, name another run.folder, or go on with checkpoint.accept_changes=true"
        )


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

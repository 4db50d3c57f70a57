"""What of a configuration changes the training, and where a resumed run's differs from before."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from .explain import cut
from .schema import Config

# What may change between a save and a resume without changing what is learned: where the run lives
# and what it writes, how it is spread over the ranks and cut into micro-batches, which kernels
# compute it, when it stops. Where weights start (student.hf, student.init) is past; another
# architecture is refused elsewhere; the blend is compared by its files' content.
_FREE = {
    *("run.folder", "parallel", "checkpoint", "engine.layers", "evaluation", "logging"),
    *("student.hf", "student.init", "student.architecture"),
    *("student.layers_per_stage", "teacher.layers_per_stage", "teacher.init"),
    *("loss.kernel", "loss.collective", "loss.fused_head", "loss.head_chunk_tokens"),
    *("training.micro_batch_size", "training.recompute", "training.gc_interval"),
    *("training.stop_at", "training.max_minutes", "training.max_skipped_steps"),
    *("training.step_timeout", "training.phase_timeout", "training.silence_timeout"),
    "training.loss_spike_deviations",
    *("data.blend", "data.validation", "data.verify", "data.cache", "data.prefetch"),
    "data.reader",
}


def changes(saved: Any, now: Config, where: str) -> list[str]:
    """One line per setting that changes the training and is another than in a checkpoint.

    saved: the configuration in it, as `model_dump(mode="json")` made it; where: its name. A key
    that this version does not know, or that makes no configuration, is a line too: it cannot be
    compared.
    """
    try:
        before = Config.model_validate(saved).model_dump(mode="json")
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"]) or "the configuration"
        return [f"{key}: {where} was saved by another version, its settings cannot be compared"]
    free = _FREE if now.loss.name == "taid" else _FREE | {"taid"}
    return [
        line(key, old, new, where)
        for key, old, new in _differing(before, now.model_dump(mode="json"), "")
        if not any(key == name or key.startswith(f"{name}.") for name in free)
    ]


def line(key: str, before: Any, now: Any, where: str) -> str:
    """How a change is said."""
    return f"{key}: {cut(json.dumps(before))} in {where}, {cut(json.dumps(now))} now"


def _differing(before: Any, now: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value before, value now) of what differs, as deep as both have sections."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in now:
            yield from _differing(before[name], now[name], f"{key}.{name}".lstrip("."))
    elif before != now:
        yield key, before, now

"""`taid-megatron plan`: memory, time and traffic of a run, and the layouts beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from taid_megatron.checkpointing.folder import find as find_checkpoint
from taid_megatron.config.batches import data_parallel_size, train_samples, train_steps
from taid_megatron.config.checks import check_layout
from taid_megatron.config.errors import UserError
from taid_megatron.config.schema import Architecture, Config
from taid_megatron.planning import gpus, layouts
from taid_megatron.planning.costs import Costs
from taid_megatron.planning.memory import (
    USABLE,
    Sizes,
    logits_bytes,
    rank_memory,
    teacher_fp8_bytes,
)
from taid_megatron.planning.shape import parameters
from taid_megatron.planning.timeline import Timeline

EFFICIENCY = 0.45
"""Assumed share of the peak rate that matrix products reach (Megatron's large runs: 0.4 to 0.5)."""
_SHOWN = 5


@dataclass(frozen=True)
class Plan:
    """Everything that is known before a run."""

    costs: Costs
    figures: dict[str, Any]
    """What --json prints: counts, bytes, seconds."""
    ranked: list[layouts.Layout]
    """The best few, then the fastest of those that do not fit."""
    timeline: Timeline
    """The first micro-batches of a step, as many as a picture can show."""


def make(
    config: Config,
    *,
    world_size: int,
    gpu: str,
    efficiency: float = EFFICIENCY,
    balance: bool = False,
) -> Plan:
    """Plan a run on `world_size` GPUs of a kind. Raises UserError for what cannot run."""
    kind = gpus.find(gpu)
    if world_size < 1:
        raise UserError(f"--gpus {world_size}: expected 1 or more")
    if not 0 < efficiency <= 1:
        raise UserError(f"--efficiency {efficiency}: expected above 0 and at most 1")
    teacher = _teacher_architecture(config)
    engine = layouts.engine_for(kind)
    costs = Costs(Sizes(config, teacher, world_size), kind, efficiency)
    before = None
    if balance:
        before = costs if _divides(costs) else None
        costs = layouts.balanced(costs)
    check_layout(costs.sizes.config, world_size, teacher_architecture=teacher, engine=engine)
    ranked = layouts.rank(config, teacher, world_size, kind, efficiency)
    shown = [layout for layout in ranked if layout.fits][:_SHOWN]
    shown += [layout for layout in ranked if not layout.fits][: 2 if shown else _SHOWN]
    pipeline = costs.sizes.config.parallel.pipeline
    return Plan(
        costs=costs,
        figures=_figures(costs, shown, before),
        ranked=shown,
        timeline=costs.timeline(min(costs.micro_batches, 2 * pipeline)),
    )


def _teacher_architecture(config: Config) -> Architecture | None:
    if config.teacher is None or config.teacher.architecture is not None:
        return config.teacher.architecture if config.teacher else None
    assert config.teacher.checkpoint is not None
    state = find_checkpoint(config.teacher.checkpoint).state()
    return Architecture.model_validate(state["architecture"])


def _divides(costs: Costs) -> bool:
    """Whether the configuration's own split can be timed beside the balanced one."""
    config, teacher = costs.sizes.config, costs.sizes.teacher
    stages = config.parallel.pipeline * costs.sizes.chunks
    student = config.student
    own = student.layers_per_stage or student.architecture.num_layers % stages == 0
    if teacher is None or config.teacher is None:
        return bool(own)
    return bool(own and (config.teacher.layers_per_stage or teacher.num_layers % stages == 0))


def _figures(costs: Costs, ranked: list[layouts.Layout], before: Costs | None) -> dict[str, Any]:
    sizes, config = costs.sizes, costs.sizes.config
    layout = layouts.evaluate(costs)
    balance = None
    if before is not None:
        seconds = before.step().seconds
        balance = {
            "step_seconds_before": seconds,
            "step_seconds_after": layout.time.seconds,
            "gain": 1 - layout.time.seconds / seconds,
        }
    return {
        "gpu": asdict(costs.gpu),
        "gpus": sizes.world_size,
        "assumed_efficiency": costs.efficiency,
        "usable_share_of_memory": USABLE,
        "batch": {
            "data_parallel_size": data_parallel_size(config, sizes.world_size),
            "micro_batch_size": config.training.micro_batch_size,
            "micro_batches_per_step": costs.micro_batches,
            "global_batch_size": config.training.global_batch_size,
            "seq_length": config.training.seq_length,
            "steps": train_steps(config),
            "tokens": train_samples(config) * config.training.seq_length,
        },
        "parameters": {
            "student": parameters(config.student.architecture),
            "teacher": parameters(sizes.teacher) if sizes.teacher else None,
            "padded_vocabulary": sizes.vocabulary.padded,
        },
        "stages": _stages(costs),
        "memory": [_memory(sizes, rank) for rank in range(config.parallel.pipeline)],
        "logits": {kind: logits_bytes(sizes, kind) for kind in ("dense", "chunked", "fused")},
        "fits": layout.fits,
        "time": asdict(layout.time),
        "traffic": asdict(costs.traffic()),
        "layers_per_stage": {
            "student": [stage.layers for stage in sizes.student_stages()],
            "teacher": [stage.layers for stage in sizes.teacher_stages()],
        },
        "balance": balance,
        "layouts": [
            {
                "name": other.name,
                "fits": other.fits,
                "memory_bytes": other.memory.total,
                "step_seconds": other.time.seconds,
                "tokens_per_second": other.time.tokens_per_second,
                "days": other.time.days,
                "bubble": other.time.bubble,
                "reason": other.reason,
                "overrides": overrides(other.config),
            }
            for other in ranked
        ],
    }


def overrides(config: Config) -> list[str]:
    """What to append to the command line to run a layout."""
    parallel, training = config.parallel, config.training
    values: list[tuple[str, Any]] = [
        ("parallel.tensor", parallel.tensor),
        ("parallel.pipeline", parallel.pipeline),
        ("parallel.virtual_pipeline", parallel.virtual_pipeline),
        ("parallel.sequence_parallel", parallel.sequence_parallel),
        ("parallel.distributed_optimizer", parallel.distributed_optimizer),
        ("parallel.overlap_param_gather", parallel.overlap_param_gather),
        ("training.micro_batch_size", training.micro_batch_size),
        ("training.recompute.granularity", training.recompute.granularity),
        ("student.layers_per_stage", _yaml(config.student.layers_per_stage)),
    ]
    if config.teacher is not None:
        values.append(("teacher.layers_per_stage", _yaml(config.teacher.layers_per_stage)))
    return [f"{key}={'null' if value is None else str(value).lower()}" for key, value in values]


def _yaml(split: tuple[int, ...] | None) -> str | None:
    return None if split is None else "[" + ",".join(map(str, split)) + "]"


def _stages(costs: Costs) -> list[dict[str, Any]]:
    sizes, pipeline = costs.sizes, costs.sizes.config.parallel.pipeline
    teachers = sizes.teacher_stages()
    forward, backward = costs.forward(), costs.backward()
    return [
        {
            "stage": k,
            "pipeline_rank": k % pipeline,
            "student_layers": stage.layers,
            "student_parameters_per_rank": sizes.student_parameters(stage),
            "teacher_layers": teachers[k].layers if teachers else None,
            "teacher_parameters_per_rank": (
                sizes.teacher_parameters(teachers[k]) if teachers else None
            ),
            "forward_seconds": forward[k],
            "backward_seconds": backward[k],
        }
        for k, stage in enumerate(sizes.student_stages())
    ]


def _memory(sizes: Sizes, rank: int) -> dict[str, float]:
    memory = rank_memory(sizes, rank)
    others = sizes.teacher_stages()[rank :: sizes.config.parallel.pipeline]
    fp8 = teacher_fp8_bytes(sizes, others)
    return {**asdict(memory), "total": memory.total, "teacher_if_fp8": fp8}

"""Other layouts of the same run: which are best, and why the others lose."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from taid_megatron.config.checks import EngineAbilities, check_layout
from taid_megatron.config.errors import ConfigError
from taid_megatron.config.schema import Architecture, Config
from taid_megatron.planning.balance import balance
from taid_megatron.planning.costs import Costs, StepTime, with_splits
from taid_megatron.planning.gpus import GPU
from taid_megatron.planning.memory import USABLE, RankMemory, Sizes, fullest_rank

_PARTS = {
    "compute": "compute, with what is recomputed,",
    "tensor": "tensor-parallel traffic",
    "waiting": "pipeline bubble and messages",
    "data": "gradient reduction over the replicas",
    "optimizer": "the optimizer's update",
}


@dataclass(frozen=True)
class Layout:
    """One candidate with its figures."""

    config: Config
    memory: RankMemory
    time: StepTime
    fits: bool
    reason: str = ""
    """Why it is not the best; empty for the best."""

    @property
    def name(self) -> str:
        """Short: TP2 PP4 VPP2 mb8 full."""
        parallel, training = self.config.parallel, self.config.training
        name = f"TP{parallel.tensor} PP{parallel.pipeline}"
        if parallel.virtual_pipeline:
            name += f" VPP{parallel.virtual_pipeline}"
        name += f" mb{training.micro_batch_size}"
        if training.recompute.granularity != "none":
            name += f" recompute {training.recompute.granularity}"
        return name


def engine_for(gpu: GPU) -> EngineAbilities:
    """A machine of that kind, for the checks: what can be installed is."""
    return EngineAbilities(
        has_cuda=True,
        has_transformer_engine=True,
        has_apex=False,
        gpu_count=gpu.gpus_per_node,
        transformer_engine="taken as there",
        compute_capability=gpu.compute_capability,
    )


def evaluate(costs: Costs) -> Layout:
    """The figures of one layout."""
    _, memory = fullest_rank(costs.sizes)
    fits = memory.total <= costs.gpu.memory_gib * 2**30 * USABLE
    return Layout(costs.sizes.config, memory, costs.step(), fits)


def balanced(costs: Costs) -> Costs:
    """The layout with the layers per stage that make the slowest stage fastest."""
    teacher = costs.sizes.teacher
    student_split, teacher_split = balance(
        costs.sizes.config.student.architecture.num_layers,
        teacher.num_layers if teacher else 0,
        costs.student_layer(),
        costs.teacher_layer(),
        costs.beside_layers(),
    )
    return with_splits(costs, student_split, teacher_split if teacher else None)


def rank(
    config: Config, teacher: Architecture | None, world_size: int, gpu: GPU, efficiency: float
) -> list[Layout]:
    """All layouts that the checks allow, the fastest that fit first, each with its reason."""
    found = []
    for candidate in _candidates(config, world_size, gpu):
        costs = Costs(Sizes(candidate, teacher, world_size), gpu, efficiency)
        try:
            uneven = candidate.parallel.pipeline > 1
            costs = balanced(costs) if uneven else with_splits(costs, None, None)
            check_layout(
                costs.sizes.config,
                world_size,
                teacher_architecture=teacher,
                engine=engine_for(gpu),
            )
        except (ConfigError, ZeroDivisionError):
            continue
        found.append(evaluate(costs))
    found.sort(key=lambda layout: (not layout.fits, layout.time.seconds, layout.memory.total))
    return [replace(layout, reason=_reason(layout, found[0], gpu)) for layout in found]


def _candidates(config: Config, world_size: int, gpu: GPU) -> list[Config]:
    """Tensor within a node, pipeline up to 16, chunks, micro-batches and recomputation near by."""
    configs = []
    own = config.training.micro_batch_size
    deepest = config.student.architecture.num_layers
    for tensor in (1, 2, 4, 8):
        for pipeline in (1, 2, 4, 5, 8, 10, 16):
            ranks = tensor * pipeline * config.parallel.context
            if tensor > gpu.gpus_per_node or pipeline > deepest or world_size % ranks:
                continue
            for virtual in (None, 2) if 1 < pipeline <= deepest // 2 else (None,):
                for micro_batch in sorted({max(own // 2, 1), own, own * 2}):
                    for granularity in ("none", "full"):
                        replicas = world_size // ranks
                        if config.training.global_batch_size % (micro_batch * replicas) == 0:
                            configs.append(
                                _changed(
                                    config,
                                    tensor,
                                    pipeline,
                                    virtual,
                                    replicas,
                                    micro_batch,
                                    granularity,
                                )
                            )
    return configs


def _changed(
    config: Config,
    tensor: int,
    pipeline: int,
    virtual: int | None,
    replicas: int,
    micro_batch: int,
    granularity: str,
) -> Config:
    parallel = config.parallel.model_copy(
        update={
            "tensor": tensor,
            "pipeline": pipeline,
            "virtual_pipeline": virtual,
            "sequence_parallel": tensor > 1,
            "overlap_p2p": None,
            "distributed_optimizer": replicas > 1,
            "overlap_param_gather": config.parallel.overlap_param_gather and replicas > 1,
        }
    )
    recompute = config.training.recompute.model_copy(
        update={"granularity": granularity, "method": "uniform", "num_layers": 1}
    )
    training = config.training.model_copy(
        update={"micro_batch_size": micro_batch, "recompute": recompute}
    )
    return config.model_copy(update={"parallel": parallel, "training": training})


def _reason(layout: Layout, best: Layout, gpu: GPU) -> str:
    """What costs the layout its place."""
    if layout is best and layout.fits:
        return ""
    if not layout.fits:
        parts = {part.name: getattr(layout.memory, part.name) for part in fields(RankMemory)}
        largest = max(parts, key=lambda name: parts[name])
        usable = gpu.memory_gib * USABLE
        return (
            f"does not fit: {layout.memory.total / 2**30:.1f} GiB of {usable:.1f} usable, most in "
            f"{largest.replace('_', ' ')} ({parts[largest] / 2**30:.1f})"
        )
    more = {name: getattr(layout.time, name) - getattr(best.time, name) for name in _PARTS}
    worst = max(more, key=lambda name: more[name])
    slower = layout.time.seconds / best.time.seconds - 1
    if slower < 1e-3:
        return "as fast, but takes more memory"
    return (
        f"{slower:.1%} slower: {_PARTS[worst]} {getattr(layout.time, worst):.3g} s of a step, the "
        f"best layout's {getattr(best.time, worst):.3g}"
    )

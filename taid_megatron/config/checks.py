"""What must fit together: between sections, with the number of ranks, and with this machine.

Each refusal is one line that names the keys, their values and the mend. Where Megatron has the same
rule, it would fail later: after minutes of start-up, on every rank, or with a wrong number.
"""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from pathlib import Path

from .batches import data_parallel_size, train_steps
from .engine import EngineAbilities, check_engine
from .errors import ConfigError
from .schema import Architecture, Blend, Config, Parallel
from .weights import check_weights


def check(
    config: Config,
    world_size: int | None = None,
    *,
    teacher_architecture: Architecture | None = None,
    engine: EngineAbilities,
    trains: bool = True,
) -> None:
    """Raise ConfigError for the first thing that does not fit; read-only, no torch.

    `world_size` counts ranks; None: not known yet, its checks are left out.
    `teacher_architecture` is that of `teacher.checkpoint`, once the caller has read it. `trains`:
    False leaves out what a run needs and an evaluation does not: length, data, folders.
    """
    check_layout(
        config,
        world_size,
        teacher_architecture=teacher_architecture,
        engine=engine,
        trains=trains,
    )
    if not trains:
        return
    _check_logging(config, engine)
    check_taught(config)
    _check_inputs(config)
    _check_writable("run.folder", config.run.folder)
    if config.data.cache is not None:
        _check_writable("data.cache", config.data.cache)


def check_layout(
    config: Config,
    world_size: int | None = None,
    *,
    teacher_architecture: Architecture | None = None,
    engine: EngineAbilities,
    trains: bool = True,
) -> None:
    """The part of `check` that needs neither data nor a run folder: models, ranks, batches."""
    _check_parallel(config.parallel)
    _check_models(config, teacher_architecture)
    check_weights(config, teacher_architecture)
    check_engine(config, teacher_architecture, engine)
    _check_recompute(config)
    if world_size is not None:
        _check_world_size(config.parallel, world_size, engine)
    _check_experts(config, teacher_architecture, world_size)
    _check_batches(config, world_size)
    if trains:
        _check_length(config)
        _check_retention(config)


def _check_retention(config: Config) -> None:
    checkpoint = config.checkpoint
    if checkpoint.keep_every is not None and checkpoint.keep is None:
        raise ConfigError(
            f"checkpoint.keep_every={checkpoint.keep_every} without checkpoint.keep, so that all "
            "checkpoints stay; set checkpoint.keep as well, or checkpoint.keep_every=null"
        )


def _check_parallel(parallel: Parallel) -> None:
    if parallel.sequence_parallel and parallel.tensor == 1:
        raise ConfigError(
            "parallel.sequence_parallel=true needs tensor parallelism, parallel.tensor=1; "
            "set parallel.sequence_parallel=false or a larger parallel.tensor"
        )
    _check_virtual_pipeline(parallel)
    _check_overlap(parallel)


def _check_virtual_pipeline(parallel: Parallel) -> None:
    virtual = parallel.virtual_pipeline
    if virtual is None:
        if parallel.overlap_p2p:
            raise ConfigError(
                "parallel.overlap_p2p=true needs the interleaved schedule; set "
                "parallel.virtual_pipeline to 2 or more, or parallel.overlap_p2p=null"
            )
        return
    if virtual < 2:
        raise ConfigError(
            f"parallel.virtual_pipeline={virtual}: expected 2 or more model chunks per stage; "
            "set parallel.virtual_pipeline=null for none"
        )
    if parallel.pipeline == 1:
        raise ConfigError(
            f"parallel.virtual_pipeline={virtual} needs parallel.pipeline above 1; raise "
            "parallel.pipeline, or set parallel.virtual_pipeline=null"
        )
    if parallel.pipeline == 2 and not parallel.p2p_overlapped:
        # Not a matter of speed: batched messages between two ranks take each other's place.
        raise ConfigError(
            f"parallel.overlap_p2p=false with parallel.pipeline=2 and virtual_pipeline={virtual} "
            "would mix up the two directions' messages; set parallel.overlap_p2p=true"
        )


def _check_overlap(parallel: Parallel) -> None:
    if not parallel.overlap_param_gather:
        return
    if not parallel.distributed_optimizer:
        raise ConfigError(
            "parallel.overlap_param_gather=true needs the distributed optimizer; set "
            "parallel.distributed_optimizer=true or parallel.overlap_param_gather=false"
        )
    if not parallel.overlap_grad_reduce:
        # Without it Megatron makes a single bucket: the first layer would wait for all weights.
        raise ConfigError(
            "parallel.overlap_param_gather=true needs the buckets of overlap_grad_reduce; set "
            "parallel.overlap_grad_reduce=true or parallel.overlap_param_gather=false"
        )


def _check_models(config: Config, teacher_architecture: Architecture | None) -> None:
    student, teacher, parallel = config.student, config.teacher, config.parallel
    _check_architecture("student", student.architecture, parallel.tensor)
    _check_split("student", student.architecture, student.layers_per_stage, parallel)
    if teacher is None:
        if config.loss.name != "cross_entropy":
            raise ConfigError(
                f"loss.name={config.loss.name} needs a teacher, and teacher is not given; add "
                "teacher.hf or teacher.checkpoint, or set loss.name=cross_entropy"
            )
        return
    if teacher.checkpoint is not None and not os.path.isdir(teacher.checkpoint):
        raise ConfigError(
            f"teacher.checkpoint={teacher.checkpoint}: no such folder; give a checkpoint folder or "
            "a run folder"
        )
    architecture = teacher_architecture or teacher.architecture
    if architecture is not None:
        _check_architecture("teacher", architecture, parallel.tensor)
        _check_split("teacher", architecture, teacher.layers_per_stage, parallel)


def _check_architecture(model: str, shape: Architecture, tensor: int) -> None:
    where = f"{model}.architecture"
    heads, groups = shape.num_attention_heads, shape.query_groups
    if shape.kv_channels is None and shape.hidden_size % heads:
        raise ConfigError(
            f"{where}.hidden_size={shape.hidden_size} is not divisible by num_attention_heads="
            f"{heads}; change one of them, or set {where}.kv_channels"
        )
    if heads % groups:
        raise ConfigError(
            f"{where}.num_attention_heads={heads} is not divisible by num_query_groups={groups}; "
            "give each query group as many heads"
        )
    rotated = int(shape.head_channels * shape.rotary_percent)
    if rotated < 2 or rotated % 2:
        raise ConfigError(
            f"{where}: rotary_percent={shape.rotary_percent} of {shape.head_channels} channels per "
            f"head rotates {rotated}, expected an even number above 0; change "
            f"{where}.rotary_percent or kv_channels"
        )
    if shape.num_moe_experts is not None and shape.moe_router_topk > shape.num_moe_experts:
        raise ConfigError(
            f"{where}.moe_router_topk={shape.moe_router_topk} is above num_moe_experts="
            f"{shape.num_moe_experts}; lower it"
        )
    _check_tensor(where, shape, tensor)


def _check_tensor(where: str, shape: Architecture, tensor: int) -> None:
    """Heads, query groups, their projection and the feed-forward block over tensor ranks."""
    groups = shape.query_groups
    mend = f"; set parallel.tensor to fit, such as {_fitting_tensor(shape, tensor)}"
    for key, size in (
        ("num_attention_heads", shape.num_attention_heads),
        ("ffn_hidden_size", shape.ffn_width),
    ):
        if size % tensor:
            raise ConfigError(
                f"{where}.{key}={size} is not divisible by parallel.tensor={tensor}{mend}"
            )
    # With fewer groups than ranks, Megatron gathers the projection and gives ranks a share of one.
    if groups % tensor and tensor % groups:
        raise ConfigError(
            f"{where}.num_query_groups={groups} is neither a multiple nor a divisor of "
            f"parallel.tensor={tensor}{mend}"
        )
    if 2 * groups * shape.head_channels % tensor:
        raise ConfigError(
            f"{where}: the key and value projection, 2 * {groups} query groups * "
            f"{shape.head_channels} channels, is not divisible by parallel.tensor={tensor}{mend}"
        )


def _fitting_tensor(shape: Architecture, tensor: int) -> int:
    """The largest tensor-parallel size up to `tensor` that divides everything."""
    common = math.gcd(shape.num_attention_heads, shape.ffn_width, shape.query_groups)
    return max(size for size in range(1, tensor + 1) if common % size == 0)


def _check_split(
    model: str, shape: Architecture, layers_per_stage: tuple[int, ...] | None, parallel: Parallel
) -> None:
    stages = _num_stages(parallel)
    layout = f"parallel.pipeline={parallel.pipeline}"
    if parallel.virtual_pipeline is not None:
        layout += f" * virtual_pipeline={parallel.virtual_pipeline}"
    layers = f"{model}.architecture.num_layers={shape.num_layers}"
    if layers_per_stage is None:
        if shape.num_layers % stages:
            raise ConfigError(
                f"{layers} is not divisible by {layout}; change one of them, or give "
                f"{model}.layers_per_stage, such as {near_even(shape.num_layers, stages)}"
            )
        return
    given = f"{model}.layers_per_stage={list(layers_per_stage)}"
    if len(layers_per_stage) != stages:
        raise ConfigError(
            f"{given} has {len(layers_per_stage)} entries, expected {stages} for {layout}; "
            f"give one per stage in model order, such as {near_even(shape.num_layers, stages)}"
        )
    if sum(layers_per_stage) != shape.num_layers:
        raise ConfigError(
            f"{given} sums to {sum(layers_per_stage)}, expected {layers}; "
            f"give, for example, {near_even(shape.num_layers, stages)}"
        )


def _num_stages(parallel: Parallel) -> int:
    return parallel.pipeline * (parallel.virtual_pipeline or 1)


def near_even(layers: int, stages: int) -> list[int]:
    """Layers per stage that differ by one at most."""
    return [layers // stages + (stage < layers % stages) for stage in range(stages)]


def _check_experts(config: Config, teacher: Architecture | None, world_size: int | None) -> None:
    """parallel.expert against the mixture (a teacher's alone) and the ranks it is spread over."""
    parallel = config.parallel
    expert = f"parallel.expert={parallel.expert}"
    if parallel.expert == 1:
        return
    shape = teacher or (config.teacher.architecture if config.teacher else None)
    if shape is None and config.teacher is not None:
        return  # its checkpoint has not been read yet
    if shape is None or shape.num_moe_experts is None:
        raise ConfigError(
            f"{expert} spreads the experts of a mixture, and the teacher is none; set "
            "parallel.expert=1"
        )
    if shape.num_moe_experts % parallel.expert:
        raise ConfigError(
            f"{expert} does not divide the teacher's num_moe_experts={shape.num_moe_experts}; set "
            f"parallel.expert={math.gcd(shape.num_moe_experts, parallel.expert)}"
        )
    if parallel.tensor > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            f"{expert} with parallel.tensor={parallel.tensor} would send every token "
            f"{parallel.tensor} times; set parallel.sequence_parallel=true"
        )
    others = None if world_size is None else world_size // (parallel.tensor * parallel.pipeline)
    if others is not None and others % parallel.expert:
        raise ConfigError(
            f"{expert} does not divide the {others} ranks that would hold the same part of the "
            "teacher (replicas * parallel.context); set parallel.expert="
            f"{math.gcd(others, parallel.expert)}"
        )


def _check_recompute(config: Config) -> None:
    recompute = config.training.recompute
    where = "training.recompute"
    if recompute.granularity == "selective":
        if not recompute.modules:
            raise ConfigError(
                f"{where}.modules is empty with granularity=selective; name modules, or set "
                f"{where}.granularity=none"
            )
        if "layernorm" in recompute.modules:
            raise ConfigError(
                f"{where}.modules names layernorm: Transformer Engine has it inside the linear "
                "behind it, the local layers cannot recompute it; leave layernorm out"
            )
    if recompute.granularity != "full":
        return
    student, stages = config.student, _num_stages(config.parallel)
    split = student.layers_per_stage or (student.architecture.num_layers // stages,) * stages
    if recompute.method == "uniform" and any(layers % recompute.num_layers for layers in split):
        raise ConfigError(
            f"{where}.num_layers={recompute.num_layers} does not divide the student's layers per "
            f"stage {list(split)}; set {where}.num_layers=1 or a common divisor"
        )
    if recompute.method == "block" and recompute.num_layers > max(split):
        raise ConfigError(
            f"{where}.num_layers={recompute.num_layers} is above the student's layers per stage "
            f"{list(split)}; set {where}.num_layers to at most {max(split)}"
        )


def _check_world_size(parallel: Parallel, world_size: int, engine: EngineAbilities) -> None:
    ranks = parallel.model_ranks
    if world_size % ranks == 0:
        return
    raise ConfigError(
        f"{world_size} rank{'s' * (world_size > 1)}: expected a multiple of parallel.tensor="
        f"{parallel.tensor} * pipeline={parallel.pipeline} * context={parallel.context} = {ranks}; "
        f"start it as `{_torchrun(max(1, world_size // ranks) * ranks, engine)} -m taid_megatron "
        "train ...`, or lower them"
    )


def _torchrun(world_size: int, engine: EngineAbilities) -> str:
    """A command that starts so many ranks, on several nodes where one has too few GPUs."""
    per_node = engine.gpu_count
    if engine.has_cuda and world_size > per_node > 0 and world_size % per_node == 0:
        return f"torchrun --nnodes {world_size // per_node} --nproc-per-node {per_node}"
    return f"torchrun --nproc-per-node {world_size}"


def _check_batches(config: Config, world_size: int | None) -> None:
    training, parallel = config.training, config.parallel
    _check_ramp_up(config)
    replicas = 1 if world_size is None else data_parallel_size(config, world_size)
    per_pass = training.micro_batch_size * replicas
    sizes = [("training.global_batch_size", training.global_batch_size)]
    if training.rampup is not None:
        # All sizes of the ramp are start + k * increment: these two stand for them.
        sizes.append(("training.rampup.start", training.rampup.start))
        sizes.append(("training.rampup.increment", training.rampup.increment))
    for key, size in sizes:
        if size % per_pass:
            raise ConfigError(
                f"{key}={size} is not divisible by training.micro_batch_size="
                f"{training.micro_batch_size} * {replicas} data-parallel replicas = {per_pass}; "
                f"set {key} to a multiple of {per_pass}, such as {_multiple_near(size, per_pass)}"
            )
        if parallel.virtual_pipeline is not None and size // per_pass % parallel.pipeline:
            # Megatron takes micro-batches in groups of `pipeline` through each model chunk.
            whole = per_pass * parallel.pipeline
            raise ConfigError(
                f"{key}={size} makes {size // per_pass} micro-batches per step, and the "
                f"interleaved schedule needs a multiple of parallel.pipeline={parallel.pipeline}; "
                f"set {key} to a multiple of {whole}, such as {_multiple_near(size, whole)}"
            )
    _check_seq_length(training.seq_length, parallel)


def _check_seq_length(length: int, parallel: Parallel) -> None:
    if parallel.sequence_parallel and length % parallel.tensor:
        raise ConfigError(
            f"training.seq_length={length} is not divisible by parallel.tensor="
            f"{parallel.tensor}, and parallel.sequence_parallel shards it; set "
            f"training.seq_length={_multiple_near(length, parallel.tensor)}"
        )
    # Two parts for each context-parallel rank, sharded further by sequence parallelism.
    parts = 2 * parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)
    if parallel.context > 1 and length % parts:
        raise ConfigError(
            f"training.seq_length={length} is not divisible by the {parts} parts that "
            f"parallel.context={parallel.context} makes of it (two for each rank, each sharded by "
            f"sequence parallelism); set training.seq_length={_multiple_near(length, parts)}"
        )


def _multiple_near(size: int, step: int) -> int:
    """The multiple of `step` at or above `size`."""
    return -(-size // step) * step


def _check_ramp_up(config: Config) -> None:
    rampup, full = config.training.rampup, config.training.global_batch_size
    if rampup is None:
        return
    if rampup.start >= full:
        raise ConfigError(
            f"training.rampup.start={rampup.start} is not below training.global_batch_size={full}; "
            "lower training.rampup.start, or set training.rampup=null"
        )
    if (full - rampup.start) % rampup.increment:
        raise ConfigError(
            f"training.rampup: start={rampup.start} plus increments of {rampup.increment} does not "
            f"hit training.global_batch_size={full}; set training.rampup.increment to a divisor of "
            f"{full - rampup.start}"
        )


def _check_length(config: Config) -> None:
    """Parts of the run against its number of optimizer steps."""
    steps, optimizer = train_steps(config), config.optimizer
    length = f"the run's {steps} optimizer steps"
    if optimizer.warmup_steps >= steps:
        raise ConfigError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} leaves none of {length}; "
            "lower optimizer.warmup_steps, or train longer"
        )
    if optimizer.decay == "wsd":
        if optimizer.wsd_decay_steps == 0:
            raise ConfigError(
                "optimizer.wsd_decay_steps=0 with optimizer.decay=wsd: expected the length of the "
                "final decay; set optimizer.wsd_decay_steps, or optimizer.decay=constant for none"
            )
        if optimizer.warmup_steps + optimizer.wsd_decay_steps > steps:
            raise ConfigError(
                f"optimizer.warmup_steps={optimizer.warmup_steps} + wsd_decay_steps="
                f"{optimizer.wsd_decay_steps} is more than {length}; lower one of them"
            )
    if config.evaluation.every is not None and config.data.validation is None:
        raise ConfigError(
            f"evaluation.every={config.evaluation.every} needs data.validation, which is not "
            "given; add data.validation, or set evaluation.every=null"
        )


def _check_logging(config: Config, engine: EngineAbilities) -> None:
    logging = config.logging
    if logging.wandb is not None and find_spec("wandb") is None:
        raise ConfigError(
            f"logging.wandb={logging.wandb} needs wandb, which is not installed; pip install "
            "wandb, or set logging.wandb=null"
        )
    if logging.profile_steps is not None and logging.profile_steps[0] > logging.profile_steps[1]:
        raise ConfigError(
            f"logging.profile_steps={list(logging.profile_steps)}: expected the first step, then "
            "the last; swap them"
        )
    if logging.memory_snapshot_step is not None and not engine.has_cuda:
        raise ConfigError(
            f"logging.memory_snapshot_step={logging.memory_snapshot_step} records CUDA's "
            "allocator, and there is no GPU here; set logging.memory_snapshot_step=null"
        )
    if config.run.seed >= 2**31:
        raise ConfigError(
            f"run.seed={config.run.seed}: expected a number below 2**31={2**31}, which every "
            "generator takes; set a smaller run.seed"
        )


def check_taught(config: Config) -> None:
    """Raise ConfigError for a teacher that is a shape alone, unless random weights are asked for.

    A shape is enough to plan with; a run would learn from random numbers for days.
    """
    teacher = config.teacher
    if teacher is not None and not teacher.has_weights and teacher.init is None:
        raise ConfigError(
            "teacher is an architecture without weights; give teacher.hf=FOLDER or "
            "teacher.checkpoint=FOLDER, or teacher.init.from=random if random weights are meant"
        )


def _check_inputs(config: Config) -> None:
    _check_blend("data.blend", config.data.blend)
    if config.data.validation is not None:
        _check_blend("data.validation", config.data.validation)


def _check_blend(key: str, blend: Blend) -> None:
    if not blend:
        raise ConfigError(f"{key} is empty; give at least one prefix of a .bin/.idx pair")
    for part in blend:
        if part.prefix.suffix in (".bin", ".idx") and part.prefix.is_file():
            raise ConfigError(
                f"{key}: {part.prefix} is one file of the pair; give {part.prefix.with_suffix('')}"
            )
        for ending in (".bin", ".idx"):
            if not os.path.isfile(f"{part.prefix}{ending}"):
                raise ConfigError(
                    f"{key}: {part.prefix}{ending} is missing; make it with `taid-data prepare` "
                    f"(--out {part.prefix}), or correct the prefix"
                )


def _check_writable(key: str, folder: Path) -> None:
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ConfigError(f"{key}={folder} is a file; give a folder")
    parent = folder.absolute()
    while not os.path.exists(parent):
        parent = parent.parent
    if not os.path.isdir(parent):
        raise ConfigError(f"{key}={folder} lies below {parent}, a file; give another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}={folder}: {parent} is not writable; give another folder")

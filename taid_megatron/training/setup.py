"""From a configuration to everything a run is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.utils.data import Dataset

from data_tools.manifest import DataError, read_manifest
from taid_megatron.checkpointing import store
from taid_megatron.config.batches import data_parallel_size, train_samples, train_steps
from taid_megatron.config.engine import EngineAbilities, describe, takes_transformer_engine
from taid_megatron.config.errors import ConfigError, UserError
from taid_megatron.config.schema import Architecture, Blend, Config
from taid_megatron.config.weights import source
from taid_megatron.conversion import companions
from taid_megatron.conversion.checkpoint import import_checkpoint
from taid_megatron.conversion.hf_import import import_hf
from taid_megatron.data import dali_reader
from taid_megatron.data.datasets import build_datasets
from taid_megatron.data.inspection import inspect
from taid_megatron.data.loader import DistributedBatches, MapDataset, MicroBatch
from taid_megatron.models.build import DTYPES, GPTStage, build_stages, transformer_config
from taid_megatron.models.initialize import initialize
from taid_megatron.models.pair import Pair
from taid_megatron.models.teacher_p2p import TeacherCarryingCommunicator
from taid_megatron.models.vocabulary import Vocabulary, align
from taid_megatron.runtime.distributed import World, on_first_rank
from taid_megatron.runtime.log import say
from taid_megatron.schedules import CTKDTemperature, TAIDSchedule
from taid_megatron.training.objectives import build_schedule, build_temperature
from taid_megatron.training.optimizer import build_lr_schedule, build_optimizer, wire, wrap
from taid_megatron.training.spikes import RecentLosses
from taid_megatron.training.step import Pipeline
from taid_megatron.training.stopping import RunLock
from taid_megatron.training.watchdog import Watchdog


@dataclass
class Trainer:
    """The parts of a run on this rank."""

    config: Config
    world: World
    vocabulary: Vocabulary
    pairs: list[Pair]
    stages: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    lr_schedule: OptimizerParamScheduler
    schedule: TAIDSchedule | None
    temperature: CTKDTemperature | None
    pipeline: Pipeline
    steps: int
    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Sequences those steps have used, over all ranks."""
    skipped_in_a_row: int = 0
    """Steps just before this one that were not applied."""
    resumed_from: Path | None = None
    """The checkpoint that the run goes on from."""
    lock: RunLock | None = None
    """On the main rank: the run folder's, to be held when it writes."""
    watch: Watchdog | None = None
    """Told where the run is, so that a rank that hangs is noticed."""
    recent_losses: RecentLosses = field(default_factory=RecentLosses)
    """What the next loss is held against, to record its leaps."""
    saving: store.PendingSave | None = None
    """A save that is still being written."""

    @property
    def students(self) -> list[GPTStage]:
        """The student's stages on this rank: what a checkpoint holds."""
        return [pair.student for pair in self.pairs]

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher runs beside the student."""
        return self.pairs[0].teacher is not None


def teacher_architecture(config: Config) -> Architecture | None:
    """The teacher's shape: the configuration's (teacher.hf as well), or its checkpoint's."""
    if config.teacher is None:
        return None
    if config.teacher.architecture is not None:
        return config.teacher.architecture
    assert config.teacher.checkpoint is not None
    state = store.find(config.teacher.checkpoint).state()
    return Architecture.model_validate(state["architecture"])


def keep_tokenizer(config: Config) -> None:
    """Keep what an export needs beside the weights, from the student's or the teacher's folder."""
    student, teacher = config.student, config.teacher
    folders = [student.hf, teacher.hf if teacher else None]
    if teacher is not None and teacher.checkpoint is not None:
        folders.append(companions.find(store.find(teacher.checkpoint).path))
    for folder in folders:
        if folder is not None and companions.has_tokenizer(folder):
            companions.keep(folder, config.run.folder / companions.FOLDER)
            return


def build_trainer(config: Config, world: World, abilities: EngineAbilities) -> Trainer:
    """Models, optimizer and schedules, with the weights a fresh run starts from."""
    say(describe(config, abilities))
    vocabulary, pairs = build_pairs(config, abilities)
    if config.loss.fused_head:
        for pair in pairs:
            for stage in (pair.student, pair.teacher):
                if stage is not None:
                    stage.leave_head_to_loss()
    stages = wrap(pairs, config.parallel)
    wire(stages, config.parallel)
    dtype = DTYPES[config.training.precision]
    optimizer = build_optimizer(stages, config.optimizer, config.parallel, dtype)
    steps = train_steps(config)
    return Trainer(
        config=config,
        world=world,
        vocabulary=vocabulary,
        pairs=pairs,
        stages=stages,
        optimizer=optimizer,
        lr_schedule=build_lr_schedule(optimizer, config.optimizer, steps),
        schedule=build_schedule(config.loss, config.taid, steps),
        temperature=build_temperature(config.loss, steps),
        pipeline=Pipeline(
            world=world,
            stages=stages,
            communicator=teacher_communicator(config, world, pairs),
            seq_length=config.training.seq_length,
            micro_batch_size=config.training.micro_batch_size,
        ),
        steps=steps,
    )


def build_pairs(
    config: Config, abilities: EngineAbilities, student: store.Checkpoint | None = None
) -> tuple[Vocabulary, list[Pair]]:
    """Both models' stages on this rank, weights filled.

    student: a checkpoint that the student's weights are taken from, whatever the configuration says
    of where they start.
    """
    teacher_shape = teacher_architecture(config)
    vocabulary = align(
        config.student.architecture.vocab_size,
        teacher_shape.vocab_size if teacher_shape else None,
        config.parallel.tensor,
    )
    students = _student(config, vocabulary, abilities, student)
    teachers: list[GPTStage | None] = [None] * len(students)
    if teacher_shape is not None:
        teachers = [*_teacher(config, teacher_shape, vocabulary, abilities)]
    return vocabulary, [Pair(s, t) for s, t in zip(students, teachers, strict=True)]


def _student(
    config: Config,
    vocabulary: Vocabulary,
    abilities: EngineAbilities,
    checkpoint: store.Checkpoint | None,
) -> list[GPTStage]:
    stages = _stages(
        config,
        config.student.architecture,
        vocabulary,
        abilities,
        precision=config.training.precision,
        layers_per_stage=config.student.layers_per_stage,
        fp8=config.engine.fp8,
        recompute=config.training.recompute,
        hidden_dropout=config.student.hidden_dropout,
        attention_dropout=config.student.attention_dropout,
    )
    kind = source(config.student)
    if checkpoint is not None:
        store.load_weights(checkpoint, stages)
    elif kind == "random":
        for stage in stages:
            initialize(stage, config.student.architecture, config.run.seed)
    elif kind == "hf":
        assert config.student.hf is not None
        import_hf(config.student.hf, stages, config.student.architecture, vocabulary)
    else:
        assert config.student.init is not None
        _fill_from_teacher(config, stages, vocabulary, config.student.init.layers)
    return stages


def _fill_from_teacher(
    config: Config,
    stages: list[GPTStage],
    vocabulary: Vocabulary,
    layers: tuple[int, ...] | None = None,
) -> None:
    """Weights of the teacher's file; layers: those of it that the stages consist of; None: all."""
    teacher, architecture = config.teacher, teacher_architecture(config)
    assert teacher is not None
    assert architecture is not None
    if teacher.hf is not None:
        import_hf(teacher.hf, stages, architecture, vocabulary, layers=layers)
        return
    assert teacher.checkpoint is not None
    checkpoint = store.find(teacher.checkpoint)
    if layers is None:
        store.load_weights(checkpoint, stages, verify=config.checkpoint.verify)
    else:
        import_checkpoint(checkpoint.path, stages, architecture, vocabulary, layers=layers)


@torch.no_grad()  # no room for what a backward would need beside weights in FP8
def _teacher(
    config: Config,
    architecture: Architecture,
    vocabulary: Vocabulary,
    abilities: EngineAbilities,
) -> list[GPTStage]:
    assert config.teacher is not None
    stages = _stages(
        config,
        architecture,
        vocabulary,
        abilities,
        precision=config.teacher.precision or config.training.precision,
        layers_per_stage=config.teacher.layers_per_stage,
        fp8=config.engine.teacher_fp8,
        frozen=True,
    )
    if config.teacher.hf is None and config.teacher.checkpoint is None:
        for stage in stages:
            initialize(stage, architecture, config.run.seed + 1)
    else:
        _fill_from_teacher(config, stages, vocabulary)
    return stages


def _stages(
    config: Config,
    architecture: Architecture,
    vocabulary: Vocabulary,
    abilities: EngineAbilities,
    *,
    precision: str,
    **options: Any,
) -> list[GPTStage]:
    """A model's chunks on this rank, weights not filled; options: of transformer_config."""
    return build_stages(
        architecture,
        transformer_config(
            architecture, config.parallel, precision=precision, abilities=abilities, **options
        ),
        vocabulary,
        seq_length=config.training.seq_length,
        reset_positions=config.data.reset_position_ids,
        transformer_engine=takes_transformer_engine(config.engine, precision, abilities),
        documents_apart=config.data.reset_attention_mask,
    )


def teacher_communicator(
    config: Config, world: World, pairs: list[Pair]
) -> TeacherCarryingCommunicator | None:
    """What carries the teacher's activations; None where none travel."""
    teacher = pairs[0].teacher
    if teacher is None or world.teacher_groups is None:
        return None
    parallel, training = config.parallel, config.training
    shards = parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)
    return TeacherCarryingCommunicator(
        world.groups.pp,
        pairs[0].config,
        teacher_groups=world.teacher_groups,
        teacher_shape=(
            training.seq_length // shards,
            training.micro_batch_size,
            teacher.config.hidden_size,
        ),
        teacher_dtype=teacher.config.params_dtype,
    )


def build_batches(
    trainer: Trainer,
) -> tuple[DistributedBatches, Dataset | None]:
    """The training batches, at the trainer's position, and the held-out dataset."""
    config, world = trainer.config, trainer.world
    check_vocabulary(config, trainer.vocabulary)
    on_first_rank(lambda: _inspect(config, trainer.vocabulary))
    train, validation = open_datasets(config, world.size)
    batches = DistributedBatches(
        train,  # type: ignore[arg-type]
        micro_batch_size=config.training.micro_batch_size,
        dp_rank=world.data_rank,
        dp_size=world.groups.dp.size(),
        consumed_samples=trainer.consumed_samples,
        prefetch=config.data.prefetch,
        transport=dali_reader.through_dali if config.data.reader == "dali" else None,
    )
    return batches, validation


def open_datasets(config: Config, world_size: int) -> tuple[Dataset | None, Dataset | None]:
    """(training, held-out) datasets of a run on so many ranks; see build_datasets."""
    data = config.data
    return build_datasets(
        train_blend=blend_parts(data.blend),
        valid_blend=blend_parts(data.validation or ()),
        seq_length=config.training.seq_length,
        seed=config.run.seed,
        num_train_samples=train_samples(config),
        num_valid_samples=evaluation_samples(config, world_size),
        eod_id=eod_id(config),
        cache_path=data.cache or config.run.folder / "cache",
        eod_mask_loss=data.eod_mask_loss,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
    )


def evaluation_samples(config: Config, world_size: int) -> int:
    """evaluation.samples, rounded up to whole micro-batches on every replica (and VPP groups)."""
    unit = config.training.micro_batch_size * data_parallel_size(config, world_size)
    if config.parallel.virtual_pipeline:
        unit *= config.parallel.pipeline
    return -(-config.evaluation.samples // unit) * unit


def first_samples(
    config: Config, world: World, dataset: MapDataset, count: int
) -> list[MicroBatch]:
    """This rank's micro-batches of a dataset's first `count` samples, as of one step."""
    batches = DistributedBatches(
        dataset,
        micro_batch_size=config.training.micro_batch_size,
        dp_rank=world.data_rank,
        dp_size=world.groups.dp.size(),
        prefetch=0,
    )
    return batches.step(count)


def blend_parts(parts: Blend) -> list[tuple[str, float]]:
    """(prefix, weight) of each part, as the datasets take them."""
    return [(str(part.prefix), part.weight) for part in parts]


def check_vocabulary(config: Config, vocabulary: Vocabulary) -> None:
    """Refuse data whose token ids reach beyond what both models know, as far as manifests tell."""
    for key, blend in (("blend", config.data.blend), ("validation", config.data.validation or ())):
        for part in blend:
            manifest = read_manifest(part.prefix)
            if manifest is not None and manifest.tokenizer.vocab_size > vocabulary.shared:
                raise ConfigError(
                    f"data.{key}: {part.prefix} was made with a tokenizer of "
                    f"{manifest.tokenizer.vocab_size} ids, the models share {vocabulary.shared}: "
                    "set vocab_size to the tokenizer's, or prepare the data with the models' own"
                )


def _inspect(config: Config, vocabulary: Vocabulary) -> None:
    """Refuse damaged files and token ids that the models do not have; on one rank."""
    data = config.data
    for prefix in sorted({str(part.prefix) for part in (*data.blend, *(data.validation or ()))}):
        try:
            inspect(prefix, vocab_size=vocabulary.shared, full=data.verify == "full")
        except DataError as error:
            raise UserError(str(error)) from error


def tokenizer_fingerprint(config: Config) -> str | None:
    """Of the tokenizer that made the training data; None where no manifest says."""
    manifests = (read_manifest(part.prefix) for part in config.data.blend)
    return next((manifest.tokenizer.fingerprint for manifest in manifests if manifest), None)


def check_tokenizer(config: Config) -> None:
    """Refuse a teacher whose checkpoint names another tokenizer than the data's."""
    if config.teacher is None or config.teacher.checkpoint is None:
        return
    teacher = store.find(config.teacher.checkpoint)
    theirs, ours = teacher.state().get("tokenizer"), tokenizer_fingerprint(config)
    if theirs is not None and ours is not None and theirs != ours:
        raise ConfigError(
            f"teacher.checkpoint: {teacher.path} was trained on data of the tokenizer {theirs}, "
            f"data.blend is of {ours}, so ids mean different things; prepare the data with the "
            "teacher's tokenizer"
        )


def eod_id(config: Config) -> int:
    """The end-of-document id that the data was prepared with."""
    if config.data.eod_id is not None:
        return config.data.eod_id
    prefix: Path = config.data.blend[0].prefix
    manifest = read_manifest(prefix)
    if manifest is None:
        raise ConfigError(
            f"data.eod_id is not set and {prefix} has no manifest to read it from: set it, or "
            "prepare the data with `taid-data prepare`"
        )
    return manifest.tokenizer.eod_id

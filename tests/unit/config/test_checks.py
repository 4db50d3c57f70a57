"""Every refusal names the keys, their values and the mend; every mend it gives is accepted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from taid_megatron.config.checks import EngineAbilities, check
from taid_megatron.config.errors import ConfigError
from taid_megatron.config.schema import Architecture, Config

from .configs import SHAPE, make

CPU = EngineAbilities(has_cuda=False, has_transformer_engine=False, has_apex=False, gpu_count=0)
GPU = EngineAbilities(has_cuda=True, has_transformer_engine=True, has_apex=True, gpu_count=8)


@pytest.fixture(autouse=True)
def in_a_folder_with_a_corpus(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("corpus.bin", "corpus.idx"):
        (tmp_path / name).touch()


def refusal(config: Config, world_size: int | None = None, **options: Any) -> str:
    """The one line that check refuses with."""
    with pytest.raises(ConfigError) as refused:
        check(config, world_size, **{"engine": CPU, **options})
    message = str(refused.value)
    assert len(message.splitlines()) == 1
    return message


MIXTURE = dict(SHAPE, ffn_hidden_size=256, num_moe_experts=6)
VPP = {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}
RAMP = {"start": 8, "increment": 4, "samples": 100}

# What does not fit -> what the line must say -> the change that mends it.
CLASHES: dict[str, tuple[dict[str, Any], list[str], dict[str, Any]]] = {
    "context": (
        {"parallel__context": 2, "training__seq_length": 34},
        ["training.seq_length=34", "4 parts", "parallel.context=2", "training.seq_length=36"],
        {"training__seq_length": 36},
    ),
    "context and sequence parallel": (
        {
            "parallel__context": 2,
            "parallel__tensor": 4,
            "parallel__sequence_parallel": True,
            "training__seq_length": 40,
        },
        ["training.seq_length=40", "16 parts", "training.seq_length=48"],
        {"training__seq_length": 48},
    ),
    "experts of no mixture": (
        {"parallel__expert": 2},
        ["parallel.expert=2", "the teacher is none", "set parallel.expert=1"],
        {"parallel__expert": 1},
    ),
    "too many ranks for the experts": (
        {"parallel__expert": 4, "teacher__architecture": MIXTURE},
        ["parallel.expert=4", "num_moe_experts=6", "set parallel.expert=2"],
        {"parallel__expert": 2},
    ),
    "experts and every token several times": (
        {"parallel__expert": 2, "parallel__tensor": 2, "teacher__architecture": MIXTURE},
        ["parallel.expert=2 with parallel.tensor=2", "set parallel.sequence_parallel=true"],
        {"parallel__sequence_parallel": True},
    ),
    "sequence parallel alone": (
        {"parallel__sequence_parallel": True},
        ["parallel.sequence_parallel=true", "parallel.tensor=1", "a larger parallel.tensor"],
        {"parallel__tensor": 2},
    ),
    "sequence length": (
        {
            "parallel__sequence_parallel": True,
            "parallel__tensor": 4,
            "training__seq_length": 30,
        },
        ["training.seq_length=30", "parallel.tensor=4", "set training.seq_length=32"],
        {"training__seq_length": 32},
    ),
    "overlap without chunks": (
        {"parallel__pipeline": 2, "parallel__overlap_p2p": True},
        ["parallel.overlap_p2p=true", "virtual_pipeline", "parallel.overlap_p2p=null"],
        {"parallel__overlap_p2p": None},
    ),
    "one chunk": (
        {"parallel__pipeline": 2, "parallel__virtual_pipeline": 1},
        ["parallel.virtual_pipeline=1", "2 or more", "parallel.virtual_pipeline=null"],
        {"parallel__virtual_pipeline": None},
    ),
    "chunks without pipeline": (
        {"parallel__virtual_pipeline": 2},
        ["parallel.virtual_pipeline=2 needs parallel.pipeline above 1", "null"],
        {"parallel__pipeline": 2},
    ),
    "batched messages of two stages": (
        {**VPP, "parallel__overlap_p2p": False},
        ["parallel.overlap_p2p=false", "parallel.pipeline=2", "set parallel.overlap_p2p=true"],
        {"parallel__overlap_p2p": True},
    ),
    "gather without sharding": (
        {"parallel__overlap_param_gather": True, "parallel__overlap_grad_reduce": True},
        ["parallel.overlap_param_gather=true", "set parallel.distributed_optimizer=true"],
        {"parallel__distributed_optimizer": True},
    ),
    "gather without buckets": (
        {"parallel__overlap_param_gather": True, "parallel__distributed_optimizer": True},
        ["parallel.overlap_param_gather=true", "set parallel.overlap_grad_reduce=true"],
        {"parallel__overlap_grad_reduce": True},
    ),
    "hidden size": (
        {"student__architecture__hidden_size": 60},
        ["student.architecture.hidden_size=60", "num_attention_heads=8", "kv_channels"],
        {"student__architecture__kv_channels": 8},
    ),
    "query groups": (
        {"student__architecture__num_query_groups": 3},
        ["student.architecture.num_attention_heads=8", "num_query_groups=3", "as many heads"],
        {"student__architecture__num_query_groups": 4},
    ),
    "odd rotary channels": (
        {"student__architecture__kv_channels": 5},
        ["student.architecture", "rotary_percent=1.0 of 5 channels", "rotates 5", "even"],
        {"student__architecture__rotary_percent": 0.5},
    ),
    "no rotary channels": (
        {"student__architecture__rotary_percent": 0.1},
        ["rotary_percent=0.1 of 8 channels", "rotates 0", "change student.architecture.rotary"],
        {"student__architecture__rotary_percent": 0.25},
    ),
    "heads over ranks": (
        {"parallel__tensor": 16},
        ["student.architecture.num_attention_heads=8", "parallel.tensor=16", "such as 8"],
        {"parallel__tensor": 8},
    ),
    "feed-forward over ranks": (
        {"student__architecture__ffn_hidden_size": 130, "parallel__tensor": 4},
        ["student.architecture.ffn_hidden_size=130", "parallel.tensor=4", "such as 2"],
        {"parallel__tensor": 2},
    ),
    "groups over ranks": (
        {
            "student__architecture__num_attention_heads": 12,
            "student__architecture__kv_channels": 8,
            "student__architecture__num_query_groups": 6,
            "student__architecture__ffn_hidden_size": 128,
            "parallel__tensor": 4,
        },
        ["student.architecture.num_query_groups=6", "parallel.tensor=4", "such as 2"],
        {"parallel__tensor": 2},
    ),
    "a group's channels over ranks": (
        {
            "student__architecture__num_attention_heads": 16,
            "student__architecture__num_query_groups": 2,
            "student__architecture__kv_channels": 2,
            "teacher__architecture__num_attention_heads": 16,
            "parallel__tensor": 16,
        },
        ["student.architecture", "2 * 2 query groups * 2 channels", "parallel.tensor=16"],
        {"parallel__tensor": 8},
    ),
    "the teacher's heads": (
        {"teacher__architecture__num_attention_heads": 4, "parallel__tensor": 8},
        ["teacher.architecture.num_attention_heads=4", "parallel.tensor=8", "such as 4"],
        {"parallel__tensor": 4},
    ),
    "layers over stages": (
        {"parallel__pipeline": 3},
        ["student.architecture.num_layers=8", "divisible by parallel.pipeline=3;", "[3, 3, 2]"],
        {"student__layers_per_stage": [3, 3, 2], "teacher__layers_per_stage": [3, 3, 2]},
    ),
    "layers over chunks": (
        {"parallel__pipeline": 2, "parallel__virtual_pipeline": 3},
        ["student.architecture.num_layers=8", "parallel.pipeline=2 * virtual_pipeline=3"],
        {"parallel__virtual_pipeline": 4},
    ),
    "the teacher's layers": (
        {"teacher__architecture__num_layers": 7, "parallel__pipeline": 2},
        ["teacher.architecture.num_layers=7", "give teacher.layers_per_stage", "[4, 3]"],
        {"teacher__layers_per_stage": [4, 3]},
    ),
    "entries of the split": (
        {**VPP, "student__layers_per_stage": [4, 4]},
        ["student.layers_per_stage=[4, 4]", "2 entries, expected 4", "[2, 2, 2, 2]"],
        {"student__layers_per_stage": [1, 2, 2, 3]},
    ),
    "sum of the split": (
        {"parallel__pipeline": 2, "student__layers_per_stage": [4, 5]},
        ["student.layers_per_stage=[4, 5] sums to 9", "num_layers=8", "[4, 4]"],
        {"student__layers_per_stage": [8, 0]},
    ),
    "no teacher": (
        {"teacher": None},
        ["loss.name=taid needs a teacher", "teacher.checkpoint", "loss.name=cross_entropy"],
        {"loss__name": "cross_entropy"},
    ),
    "a teacher without weights": (
        {"teacher": {"architecture": SHAPE}},
        ["teacher is an architecture without weights", "teacher.hf=FOLDER", "init.from=random"],
        {"teacher": {"architecture": SHAPE, "init": {"source": "random"}}},
    ),
    "no such checkpoint": (
        {"teacher": {"checkpoint": "nowhere"}},
        ["teacher.checkpoint=nowhere: no such folder", "give a checkpoint folder"],
        {"teacher": {"checkpoint": "."}},
    ),
    "nothing to recompute": (
        {"training__recompute": {"granularity": "selective", "modules": []}},
        ["training.recompute.modules is empty", "training.recompute.granularity=none"],
        {"training__recompute": {"granularity": "none", "modules": []}},
    ),
    "recomputed norm": (
        {"training__recompute": {"granularity": "selective", "modules": ["mlp", "layernorm"]}},
        ["training.recompute.modules", "Transformer Engine", "leave layernorm out"],
        {"training__recompute": {"granularity": "selective", "modules": ["mlp", "core_attn"]}},
    ),
    "uniform recompute": (
        {
            "parallel__pipeline": 2,
            "training__recompute": {"granularity": "full", "num_layers": 3},
        },
        ["training.recompute.num_layers=3", "stage [4, 4]", "num_layers=1"],
        {"training__recompute": {"granularity": "full", "num_layers": 2}},
    ),
    "block recompute": (
        {
            "parallel__pipeline": 2,
            "training__recompute": {"granularity": "full", "method": "block", "num_layers": 5},
        },
        ["training.recompute.num_layers=5 is above", "[4, 4]", "at most 4"],
        {"training__recompute": {"granularity": "full", "method": "block", "num_layers": 4}},
    ),
    "micro-batches": (
        {"training__micro_batch_size": 3},
        ["training.global_batch_size=16", "training.micro_batch_size=3", "such as 18"],
        {"training__global_batch_size": 18},
    ),
    "micro-batches of the interleaved schedule": (
        {**VPP, "training__global_batch_size": 15},
        ["training.global_batch_size=15 makes 15 micro-batches", "pipeline=2", "such as 16"],
        {"training__global_batch_size": 16},
    ),
    "ramp-up start": (
        {"training__rampup": {**RAMP, "start": 16}},
        ["training.rampup.start=16", "training.global_batch_size=16", "rampup=null"],
        {"training__rampup": {**RAMP, "start": 12}},
    ),
    "ramp-up misses": (
        {"training__rampup": {**RAMP, "increment": 3}},
        ["start=8", "increments of 3", "training.global_batch_size=16", "a divisor of 8"],
        {"training__rampup": {**RAMP, "increment": 2}},
    ),
    "ramp-up start in micro-batches": (
        {"training__rampup": {**RAMP, "start": 6, "increment": 5}, "training__micro_batch_size": 4},
        ["training.rampup.start=6", "training.micro_batch_size=4", "such as 8"],
        {"training__rampup": {**RAMP, "start": 8}},
    ),
    "ramp-up increment in micro-batches": (
        {"training__rampup": {**RAMP, "increment": 2}, "training__micro_batch_size": 4},
        ["training.rampup.increment=2", "training.micro_batch_size=4", "such as 4"],
        {"training__rampup": {**RAMP, "increment": 4}},
    ),
    "ramp-up of the interleaved schedule": (
        {**VPP, "training__rampup": {**RAMP, "increment": 4}, "training__micro_batch_size": 4},
        ["training.rampup.increment=4", "multiple of parallel.pipeline=2", "such as 8"],
        {"training__rampup": {**RAMP, "increment": 8}},
    ),
    "warm-up": (
        {"optimizer__warmup_steps": 100},
        ["optimizer.warmup_steps=100", "100 optimizer steps", "lower optimizer.warmup_steps"],
        {"optimizer__warmup_steps": 99},
    ),
    "wsd without decay": (
        {"optimizer__decay": "wsd"},
        ["optimizer.wsd_decay_steps=0", "optimizer.decay=wsd", "optimizer.decay=constant"],
        {"optimizer__decay": "constant"},
    ),
    "wsd and warm-up": (
        {
            "optimizer__decay": "wsd",
            "optimizer__warmup_steps": 50,
            "optimizer__wsd_decay_steps": 51,
        },
        ["optimizer.warmup_steps=50", "wsd_decay_steps=51", "100 optimizer steps", "lower one"],
        {"optimizer__wsd_decay_steps": 50},
    ),
    "evaluation without data": (
        {"evaluation__every": 5},
        ["evaluation.every=5", "add data.validation", "evaluation.every=null"],
        {"data__validation": "corpus"},
    ),
    "profile backwards": (
        {"logging__profile_steps": [5, 4]},
        ["logging.profile_steps=[5, 4]", "swap"],
        {"logging__profile_steps": [4, 4]},
    ),
    "snapshot without CUDA": (
        {"logging__memory_snapshot_step": 5},
        ["logging.memory_snapshot_step=5", "no GPU", "logging.memory_snapshot_step=null"],
        {"logging__memory_snapshot_step": None},
    ),
    "seed": (
        {"run__seed": 2**31},
        ["run.seed=2147483648", "below 2**31", "smaller run.seed"],
        {"run__seed": 2**31 - 1},
    ),
    "no data": (
        {"data__blend": []},
        ["data.blend is empty", "give at least one prefix"],
        {"data__blend": ["corpus"]},
    ),
    "missing data": (
        {"data__blend": ["corpus", "other"]},
        ["data.blend: other.bin is missing", "taid-data prepare", "correct the prefix"],
        {"data__blend": ["corpus", "corpus"]},
    ),
    "missing validation data": (
        {"data__validation": ["other"]},
        ["data.validation: other.bin is missing", "taid-data prepare"],
        {"data__validation": ["corpus"]},
    ),
    "a file for a prefix": (
        {"data__blend": ["corpus.bin"]},
        ["data.blend: corpus.bin is one file of the pair", "give corpus"],
        {"data__blend": ["corpus"]},
    ),
    "a file for a folder": (
        {"run__folder": "corpus.bin"},
        ["run.folder=corpus.bin is a file", "give a folder"],
        {"run__folder": "corpus"},
    ),
    "a folder below a file": (
        {"run__folder": "corpus.bin/run"},
        ["run.folder=corpus.bin/run", "corpus.bin, a file", "another folder"],
        {"run__folder": "a/b/c"},
    ),
    "a file for the cache": (
        {"data__cache": "corpus.bin"},
        ["data.cache=corpus.bin is a file", "give a folder"],
        {"data__cache": "cache"},
    ),
}


@pytest.mark.parametrize("name", CLASHES)
def test_refuses_what_does_not_fit_and_accepts_the_mend(name: str):
    clash, parts, mend = CLASHES[name]
    message = refusal(make(**clash))
    assert all(part in message for part in parts), message
    check(make(**{**clash, **mend}), engine=CPU)


def test_the_base_fits_and_nothing_is_written(tmp_path: Path):
    check(make(), 16, engine=CPU)
    assert sorted(os.listdir(tmp_path)) == ["corpus.bin", "corpus.idx"]


def test_experts_are_spread_over_the_ranks_that_hold_the_same_part():
    config = make(parallel__expert=2, parallel__context=2, teacher__architecture=MIXTURE)
    check(config, 2, engine=CPU)
    config = make(parallel__expert=2, teacher__architecture=MIXTURE)
    check(config, 4, engine=CPU)
    message = refusal(config, 1)
    assert "parallel.expert=2 does not divide the 1 ranks" in message
    assert "set parallel.expert=1" in message


def test_missing_index_is_named(tmp_path: Path):
    (tmp_path / "corpus.idx").unlink()
    assert "data.blend: corpus.idx is missing" in refusal(make())


def test_prefixes_may_hold_dots(tmp_path: Path):
    for ending in (".bin", ".idx"):
        (tmp_path / f"wiki.v1.2{ending}").touch()
    check(make(data__blend=["wiki.v1.2"]), engine=CPU)


def test_a_folder_that_is_not_writable_is_refused(tmp_path: Path, monkeypatch):
    """By what os.access says: tests may run as root, who may write anywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert f"run.folder=run: {tmp_path} is not writable" in refusal(make())


def test_a_checkpoints_architecture_is_checked_once_read():
    config = make(teacher={"checkpoint": "."}, parallel__pipeline=2)
    check(config, engine=CPU)
    shape = Architecture.model_validate({**SHAPE, "num_layers": 9, "ffn_hidden_size": 64})
    message = refusal(config, teacher_architecture=shape)
    assert "teacher.architecture.num_layers=9" in message


def test_more_ranks_than_query_groups_share_them():
    """Megatron replicates a group over ranks where the groups divide them."""
    check(make(student__architecture__num_query_groups=2, parallel__tensor=8), engine=CPU)


@pytest.mark.parametrize(
    ("world_size", "engine", "command"),
    [
        (1, CPU, "torchrun --nproc-per-node 4 -m taid_megatron train"),
        (6, CPU, "torchrun --nproc-per-node 4 -m"),
        (9, CPU, "torchrun --nproc-per-node 8 -m"),
        (17, GPU, "torchrun --nnodes 2 --nproc-per-node 8 -m"),
        (1, GPU, "torchrun --nproc-per-node 4 -m"),
    ],
)
def test_ranks_that_do_not_fit_name_a_command_that_does(world_size, engine, command):
    config = make(parallel__tensor=2, parallel__pipeline=2)
    message = refusal(config, world_size, engine=engine)
    assert message.startswith("1 rank:" if world_size == 1 else f"{world_size} ranks:")
    assert "parallel.tensor=2 * pipeline=2 * context=1 = 4" in message
    assert command in message


def test_replicas_count_in_the_batch():
    config = make(training__micro_batch_size=2, parallel__tensor=2)
    check(config, 8, engine=CPU)
    message = refusal(config, 12)
    assert "training.global_batch_size=16" in message
    assert "micro_batch_size=2 * 6 data-parallel replicas = 12" in message
    assert "such as 24" in message


def test_interleaved_micro_batches_count_per_replica():
    config = make(**VPP, training__micro_batch_size=2)
    check(config, 8, engine=CPU)
    assert "makes 1 micro-batches" in refusal(config, 16)


def test_four_stages_may_batch_their_messages():
    check(
        make(parallel__pipeline=4, parallel__virtual_pipeline=2, parallel__overlap_p2p=False),
        engine=CPU,
    )


def test_cross_entropy_may_have_a_teacher_and_bf16_runs_on_cpu():
    check(make(loss__name="cross_entropy", training__precision="bf16"), engine=CPU)


def test_layer_counts_of_recompute_only_matter_for_whole_layers():
    check(make(training__recompute={"granularity": "selective", "num_layers": 77}), engine=CPU)

"""`taid-megatron evaluate`: a model in place, on one rank or several."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from taid_megatron.checkpointing import store
from taid_megatron.config.checks import check
from taid_megatron.config.errors import UserError
from taid_megatron.config.hf import CONFIG_FILE
from taid_megatron.config.load import from_tree, read_tree
from taid_megatron.config.schema import Config
from taid_megatron.conversion import companions
from taid_megatron.data.loader import MapDataset
from taid_megatron.evaluation import harness, report
from taid_megatron.evaluation.figures import HeldOut, LastWord
from taid_megatron.evaluation.last_word import LastWords, read_texts
from taid_megatron.models.pair import Pair
from taid_megatron.models.vocabulary import Vocabulary
from taid_megatron.runtime import distributed
from taid_megatron.runtime.distributed import World
from taid_megatron.training.setup import (
    build_pairs,
    check_vocabulary,
    evaluation_samples,
    first_samples,
    open_datasets,
    teacher_architecture,
    teacher_communicator,
)
from taid_megatron.training.step import PerToken, Pipeline
from taid_megatron.training.watchdog import Watchdog

Tree = dict[str, Any]


def evaluate(
    model: Path,
    overrides: Sequence[str] = (),
    *,
    last_word: Path | None = None,
    suites: Sequence[str] = (),
    tasks: Path | None = None,
    tokenizer: Path | None = None,
    out: Path | None = None,
) -> int:
    """Measure what is asked for, show one table, write it; on every rank. Returns the exit code.

    model: a checkpoint's, run's or Hugging Face folder. overrides: settings of a configuration.
    Raises UserError.
    """
    checkpoint = None if (model / CONFIG_FILE).is_file() else store.find(model)
    config = _config(model, checkpoint, overrides)
    held_out = config.data.validation
    if held_out is None and last_word is None and not suites:
        raise UserError(
            f"{model}: nothing to measure; give data.validation=PREFIX, --last-word FILE or --suite"
        )
    harness.check(suites, tasks)
    texts = read_texts(last_word) if last_word else None
    source = tokenizer or (companions.find(checkpoint.path) if checkpoint else model)
    if (texts or (suites and checkpoint)) and source is None:
        raise UserError(f"{model}: no tokenizer was kept with it; give --tokenizer")
    results: Tree = {"model": str(checkpoint.path if checkpoint else model)}
    if config.teacher is not None:
        results["teacher"] = str(config.teacher.hf or config.teacher.checkpoint)
    if held_out is not None or texts:
        encoder = companions.load_tokenizer(source) if texts and source else None
        results |= _measured(config, checkpoint, texts, encoder)
    if suites:
        results["suites"] = harness.run(suites, tasks, model, checkpoint, source)
    if os.environ.get("RANK", "0") == "0":
        report.show(results)
        if out is not None:
            report.write(results, out)
    return 0


@contextmanager
def whole_student(path: Path) -> Iterator[tuple[Callable[[torch.Tensor], torch.Tensor], int]]:
    """A checkpoint's model in this process, and its run's sequence length.

    The model is a function from tokens [b, s] to its logits [b, s, V], padding included, on the
    CPU, without gradient.
    """
    checkpoint = store.find(path)
    config = _config(path, checkpoint, ["teacher=null"])
    world = distributed.start(config.parallel, config.run.seed)
    try:
        _, (pair,) = build_pairs(config, distributed.abilities(), checkpoint)
        pair.eval()

        @torch.no_grad()
        def logits(tokens: torch.Tensor) -> torch.Tensor:
            tokens = tokens.to(world.device)
            positions = torch.arange(tokens.shape[1], device=world.device).expand_as(tokens)
            return pair.student(tokens, positions, None).transpose(0, 1).float().cpu()

        yield logits, config.training.seq_length
    finally:
        distributed.stop(world)


def _config(model: Path, checkpoint: store.Checkpoint | None, overrides: Sequence[str]) -> Config:
    """Models, data and layout as a configuration; its training sections are of no account."""
    source, tree = str(model), {}
    run = companions.run_folder(checkpoint.path) if checkpoint else None
    if run is not None and (run / "config.yaml").is_file():
        source, tree = str(run / "config.yaml"), read_tree(run / "config.yaml")
    training = {
        name: value
        for name, value in (tree.get("training") or {}).items()
        if name in ("seq_length", "micro_batch_size", "precision", "silence_timeout")
    }
    teacher = dict(tree.get("teacher") or {})
    teacher.pop("layers_per_stage", None)
    if teacher.get("hf") is None and teacher.get("checkpoint") is None:
        teacher = {}  # random weights: nothing to compare with
    student = {"hf": str(model)} if checkpoint is None else _shape(checkpoint)
    data = {**(tree.get("data") or {}), "blend": []}
    if data.get("cache") is None:
        data["cache"] = str(_cache(run))
    merged: Tree = {
        "student": student,
        "teacher": teacher or None,
        "loss": {"name": "cross_entropy"},
        "training": {"seq_length": 1024, "micro_batch_size": 1, **training},
        "optimizer": {"lr": 1.0},
        "data": data,
        "evaluation": {"samples": (tree.get("evaluation") or {}).get("samples", 64)},
        "run": {"folder": "."},
    }
    merged["training"] |= {"steps": 1, "global_batch_size": 1}
    config = from_tree(merged, source, overrides)
    ranks = distributed.world_size_from_environment()
    replicas = max(ranks // config.parallel.model_ranks, 1)
    unit = config.training.micro_batch_size * replicas * (config.parallel.pipeline)
    config = config.model_copy(
        update={
            "training": config.training.model_copy(update={"global_batch_size": unit}),
            "data": config.data.model_copy(update={"blend": config.data.validation or ()}),
        }
    )
    check(
        config,
        ranks,
        teacher_architecture=teacher_architecture(config),
        engine=distributed.abilities(),
        trains=False,
    )
    return config


def _shape(checkpoint: store.Checkpoint) -> Tree:
    return {"architecture": checkpoint.state()["architecture"]}


def _cache(run: Path | None) -> Path:
    """Where sample indices are kept: the run's cache, else the user's."""
    if run is not None and (run / "cache").is_dir():
        return run / "cache"
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "taid_megatron"


def _measured(
    config: Config, checkpoint: store.Checkpoint | None, texts: list[str] | None, encoder: Any
) -> Tree:
    world = distributed.start(config.parallel, config.run.seed)
    try:
        with _watchdog(config, world) as watch:
            # texts are encoded before the models take memory: a bad one ends it early
            words = None if texts is None else _last_words(config, world, texts, encoder)
            vocabulary, pairs = build_pairs(config, distributed.abilities(), checkpoint)
            for pair in pairs:
                pair.eval()
            results: Tree = {}
            if config.data.validation is not None:
                watch.phase("the evaluation on held-out text")
                results["held_out"] = _held_out(config, world, vocabulary, pairs)
            if words is not None:
                watch.phase("the guessing of last words")
                results["last_word"] = _guessed(config, world, vocabulary, pairs, words)
            return results
    finally:
        distributed.stop(world)


def _watchdog(config: Config, world: World) -> Watchdog:
    """Against ranks that die or stop; an evaluation itself may take as long as it does."""
    return Watchdog(
        None,
        rank=world.rank,
        size=world.size,
        store=distributed.private_store("watchdog"),
        step_timeout=math.inf,
        phase_timeout=math.inf,
        silence_timeout=config.training.silence_timeout,
    )


def _held_out(config: Config, world: World, vocabulary: Vocabulary, pairs: list[Pair]) -> Tree:
    check_vocabulary(config, vocabulary)
    samples = evaluation_samples(config, world.size)
    _, dataset = open_datasets(config, world.size)
    figures = HeldOut(vocabulary, world.groups.tp, config.teacher is not None)
    means = _means(config, world, pairs, dataset, samples, figures)  # type: ignore[arg-type]
    found: Tree = {"cross_entropy": means.pop("loss"), **means}
    found["perplexity"] = math.exp(found["cross_entropy"])
    if config.teacher is not None:
        found["teacher_perplexity"] = math.exp(found["teacher_cross_entropy"])
    prefixes = [str(part.prefix) for part in config.data.validation or ()]
    return {"data": prefixes, "samples": samples, **found}


def _last_words(config: Config, world: World, texts: list[str], encoder: Any) -> LastWords:
    unit = config.training.micro_batch_size * world.groups.dp.size()
    if config.parallel.virtual_pipeline:
        unit *= config.parallel.pipeline
    largest = max(encoder.get_vocab(with_added_tokens=True).values())
    shapes = (config.student.architecture, teacher_architecture(config))
    known = min(shape.vocab_size for shape in shapes if shape is not None)
    if largest >= known:
        raise UserError(
            f"the tokenizer has id {largest}, the models know {known} ids; give the models' own "
            "--tokenizer"
        )
    return LastWords(texts, encoder, config.training.seq_length, pad_to=unit)


def _guessed(
    config: Config, world: World, vocabulary: Vocabulary, pairs: list[Pair], words: LastWords
) -> Tree:
    groups = world.groups
    figures = LastWord(vocabulary, groups.tp, config.teacher is not None, groups.cp)
    means = _means(config, world, pairs, words, len(words), figures)
    texts = round(means.pop("tokens"))
    found: Tree = {"texts": texts}
    for prefix in ("", "teacher_") if config.teacher is not None else ("",):
        found[f"{prefix}accuracy"] = means[f"{prefix}accuracy"]
        found[f"{prefix}perplexity"] = math.exp(means[f"{prefix}loss"])
    return found


def _means(
    config: Config,
    world: World,
    pairs: list[Pair],
    dataset: MapDataset,
    samples: int,
    figures: PerToken,
) -> dict[str, float]:
    batches = first_samples(config, world, dataset, samples)
    pipeline = Pipeline(
        world=world,
        stages=pairs,  # type: ignore[arg-type]
        communicator=teacher_communicator(config, world, pairs),
        seq_length=config.training.seq_length,
        micro_batch_size=config.training.micro_batch_size,
    )
    with torch.no_grad():
        return pipeline.run(batches, figures, forward_only=True)

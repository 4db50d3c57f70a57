"""A run between Hugging Face folders: import, train, checkpoint, another layout, export."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file

from taid_megatron.checkpointing import store
from taid_megatron.cli import main
from taid_megatron.models.initialize import global_name
from taid_megatron.training import loop
from taid_megatron.training.setup import keep_tokenizer

from . import hf_models, toy
from .ranks import run_ranks
from .test_hf_import import forward

IDS = torch.randint(0, toy.VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(3))
SIZES = {"vocab_size": toy.VOCABULARY}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and a teacher of other families, width and depth, over the toy's vocabulary."""
    root = tmp_path_factory.mktemp("hf")
    hf_models.write("qwen2-tied", root / "student", **SIZES)
    hf_models.write("gpt_neox", root / "teacher", **SIZES, hidden_size=64, num_hidden_layers=5)
    hf_models.write("gpt_neox", root / "side-by-side", **SIZES, num_hidden_layers=4)
    hf_models.write("mixtral", root / "mixture", **SIZES)
    return root


def overrides(models: Path, folder: Path) -> list[str]:
    return [
        f"student={{hf: {models / 'student'}}}",
        f"teacher={{hf: {models / 'teacher'}, layers_per_stage: [5]}}",
        f"run.folder={folder}",
    ]


def trainer_logits(rank: int, size: int, config: str, changes: list[str]) -> torch.Tensor | None:
    """Resumed as a pipeline of two stages: the student's logits [b, s, V] on the last."""
    split = [change.replace("[5]", "[3, 2]") for change in changes]
    with toy.trainer(config, *split, "parallel.pipeline=2") as trainer:
        loop._resume(trainer)
        assert trainer.step == 5
        (stage,) = trainer.students
        stage.eval()
        with torch.no_grad():
            logits = forward(trainer.world, stage, IDS)
        return None if logits is None else logits.transpose(0, 1)[..., : toy.VOCABULARY]


@pytest.mark.parametrize("depth", ["a folder's", "of its own"])
def test_what_was_trained_is_what_is_exported(config, models, tmp_path, depth) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    changes, source = overrides(models, run), "student"
    if depth == "of its own":
        changes[0], source = "student={init: {from: teacher, layers: [4, 1, 0, 2]}}", "teacher"
    toy.train(config, run, 2, *changes[:2], "parallel.tensor=2", save=True)
    assert main(["export", str(run), "--out", str(out)]) == 0

    _, expected = run_ranks(2, trainer_logits, str(config), changes)
    automatic = transformers.AutoModelForCausalLM
    model, info = automatic.from_pretrained(out, output_loading_info=True)
    assert [names for names in info.values() if names] == []
    with torch.no_grad():
        assert (model(IDS).logits - expected).abs().max() <= 2e-5
        before = automatic.from_pretrained(models / source)(IDS).logits
    assert (before - expected).abs().max() > 1e-2
    assert model.config.tie_word_embeddings == (source == "student")
    assert model.config.num_hidden_layers == (2 if source == "student" else 4)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (models / source / name).read_bytes()


def test_a_student_of_the_teacher_s_layers(config, models, tmp_path) -> None:
    """From the folder and from an imported checkpoint, in any order, over any split."""
    imported = tmp_path / "imported"
    command = ["import", "--hf", str(models / "teacher"), "--out", str(imported)]
    assert run_ranks(2, lambda rank, size: main(command)) == [0, 0]
    run_ranks(4, layers_dropped, str(config), str(models / "teacher"), str(imported))


def layers_dropped(rank: int, size: int, config: str, folder: str, imported: str) -> None:
    layout = ("parallel.tensor=2", "parallel.pipeline=2")
    init = "init: {from: teacher, layers: [4, 0, 2]}, layers_per_stage: [1, 2]"
    shape = store.find(Path(imported)).state()["architecture"] | {"num_layers": 3}
    cases = (
        (f"student={{{init}}}", f"teacher={{hf: {folder}, layers_per_stage: [2, 3]}}"),
        (
            f"student={{{init}, architecture: {shape}}}".replace("None", "null")
            .replace("True", "true")
            .replace("False", "false"),
            f"teacher={{checkpoint: {imported}, layers_per_stage: [2, 3]}}",
        ),
    )
    seen = []
    for case in cases:
        with toy.trainer(config, *case, *layout) as trainer:
            (pair,) = trainer.pairs
            teacher = {global_name(pair.teacher, n): p for n, p in pair.teacher.named_parameters()}
            whole = gathered(teacher, trainer.world)
            for name, weight in pair.student.named_parameters():
                name = global_name(pair.student, name)
                for ours, theirs in ((0, 4), (1, 0), (2, 2)):
                    if f".layers.{ours}." in name:
                        name = name.replace(f".layers.{ours}.", f".layers.{theirs}.")
                        break
                seen.append(name)
                assert torch.equal(weight.detach(), whole[name]), name
    assert len(set(seen)) > 12


def gathered(own: dict[str, torch.Tensor], world) -> dict[str, torch.Tensor]:
    """The teacher's tensors of both stages, of this tensor-parallel rank."""
    parts: list = [None] * world.groups.pp.size()
    named = {name: tensor.detach().clone() for name, tensor in own.items()}
    dist.all_gather_object(parts, named, group=world.groups.pp)
    return {name: tensor for part in parts for name, tensor in part.items()}


def test_an_import_that_fails_leaves_nothing(models, tmp_path, capfd) -> None:
    damaged, out = tmp_path / "damaged", tmp_path / "out"
    shutil.copytree(models / "student", damaged)
    weights = load_file(damaged / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, damaged / "model.safetensors")
    command = ["import", "--hf", str(damaged), "--out", str(out)]
    assert run_ranks(2, lambda rank, size: main(command)) == [2, 2]
    assert (
        f"{damaged}: model.norm.weight is missing; get the whole folder" in capfd.readouterr().err
    )
    assert not out.exists()
    out.mkdir()
    (out / "something").touch()
    assert main([*command[:2], str(models / "student"), *command[3:]]) == 2
    assert f"{out}: exists" in capfd.readouterr().err


def test_a_run_keeps_the_tokenizer(config, models, tmp_path) -> None:
    from taid_megatron.config.load import load

    for changes in (overrides(models, tmp_path / "a"), overrides(models, tmp_path / "b")[1:]):
        settings = load(config, changes)
        keep_tokenizer(settings)
        kept = settings.run.folder / "hf"
        source = models / ("student" if settings.student.hf else "teacher")
        for name in ("tokenizer.json", "generation_config.json"):
            assert (kept / name).read_bytes() == (source / name).read_bytes()


VPP2 = ("parallel.pipeline=2", "parallel.virtual_pipeline=2", "teacher.layers_per_stage=[1,0,0,1]")
SEQUENCE = ("parallel.tensor=2", "parallel.sequence_parallel=true")
RECOMPUTE = ("training.recompute.granularity=full",)


@pytest.mark.parametrize("layout", [VPP2, (*SEQUENCE, *RECOMPUTE)], ids=["VPP=2", "TP=2 SP"])
def test_a_mixture_teaches_a_parallel_residual_on_every_layout(
    config, models, tmp_path, layout
) -> None:
    pair = (f"student={{hf: {models / 'side-by-side'}}}", f"teacher={{hf: {models / 'mixture'}}}")
    one = toy.train(config, tmp_path / "one", 1, *pair, "training.steps=3")
    two = toy.train(config, tmp_path / "two", 2, *pair, "training.steps=3", *layout)
    for name in ("loss", "kl", "grad_norm", "held_out_kl", "held_out_teacher_cross_entropy"):
        expected = toy.column(one, name)
        assert expected[0] > 0.01
        assert toy.column(two, name) == pytest.approx(expected, rel=1e-5, abs=1e-6), name

"""`taid-megatron evaluate` under several layouts: the figures that transformers' logits give."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from taid_megatron.cli import main
from taid_megatron.data.datasets import build_datasets
from taid_megatron.evaluation.figures import compare

from . import hf_models, toy
from .ranks import run_ranks

SAMPLES, SEQ_LENGTH = 8, 32
TEXTS = ["w5 w6 w7 w8", "w100 w3", "w9 w9 w9 w12 w150"]
SIZES = {"vocab_size": toy.VOCABULARY}


@pytest.fixture(scope="module")
def root(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """student, teacher: Hugging Face folders; run: a run's, with a checkpoint of the student."""
    root = tmp_path_factory.mktemp("evaluate")
    hf_models.write("qwen2-tied", root / "student", **SIZES)
    hf_models.write("gpt_neox", root / "teacher", **SIZES, num_hidden_layers=4)
    (root / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    command = ["import", "--hf", str(root / "student"), "--out", str(root / "run/checkpoints")]
    assert run_ranks(1, lambda rank, size: main(command)) == [0]
    shutil.move(root / "run/checkpoints/hf", root / "run/hf")
    return root


@pytest.fixture(scope="module")
def expected(root: Path, config: Path) -> dict[str, dict[str, float]]:
    """From transformers, in one piece."""
    prefix = str(config.parent / "valid")
    _, dataset = build_datasets(
        train_blend=[(prefix, 1.0)],
        valid_blend=[(prefix, 1.0)],
        seq_length=SEQ_LENGTH,
        seed=1234,
        num_train_samples=1,
        num_valid_samples=SAMPLES,
        eod_id=0,
        cache_path=root / "cache",
    )
    automatic = transformers.AutoModelForCausalLM
    student, teacher = (automatic.from_pretrained(root / name) for name in ("student", "teacher"))
    rows = [dataset[number] for number in range(SAMPLES)]  # type: ignore[index]
    tokens, labels = (torch.stack([row[name] for row in rows]) for name in ("tokens", "labels"))
    with torch.no_grad():
        held_out = compare(
            student(tokens).logits.flatten(0, 1),
            teacher(tokens).logits.flatten(0, 1),
            labels.flatten(),
        )
        words: dict[str, list[float]] = {"accuracy": [], "teacher_accuracy": [], "loss": []}
        for text in TEXTS:
            *context, word = (int(name[1:]) for name in text.split())
            for name, model in (("accuracy", student), ("teacher_accuracy", teacher)):
                logits = model(torch.tensor([context])).logits[0, -1]
                words[name].append(float(logits.argmax() == word))
                if model is student:
                    words["loss"].append(-logits.log_softmax(-1)[word].item())
    means = {name: values.mean().item() for name, values in held_out.items()}
    means["cross_entropy"] = means.pop("loss")
    per_text = {name: sum(values) / len(TEXTS) for name, values in words.items()}
    return {"held_out": means, "last_word": per_text}


def evaluated(rank: int, size: int, model: Path, arguments: list[str]) -> int:
    return main(["evaluate", str(model), *arguments])


def arguments(root: Path, config: Path, *overrides: str) -> list[str]:
    return [
        f"teacher.hf={root / 'teacher'}",
        f"data.validation={config.parent / 'valid'}",
        "data.eod_id=0",
        f"data.cache={root / 'cache'}",
        f"training.seq_length={SEQ_LENGTH}",
        "training.precision=fp32",
        f"evaluation.samples={SAMPLES}",
        *overrides,
        "--last-word",
        str(root / "texts.jsonl"),
    ]


@pytest.mark.parametrize(
    ("ranks", "model", "overrides"),
    [
        pytest.param(1, "student", (), id="a folder, 1x1"),
        pytest.param(2, "run", ("training.micro_batch_size=2",), id="a checkpoint, DP=2"),
        pytest.param(
            4, "run", ("parallel.tensor=2", "parallel.pipeline=2"), id="a checkpoint, TP=2 PP=2"
        ),
    ],
)
def test_the_figures_of_transformers(
    root, config, expected, tmp_path, ranks, model, overrides
) -> None:
    command = [*arguments(root, config, *overrides), "--out", str(tmp_path)]
    assert run_ranks(ranks, evaluated, root / model, command) == [0] * ranks
    found: dict[str, Any] = json.loads((tmp_path / "evaluation.json").read_text())

    held_out = found["held_out"]
    assert held_out["tokens"] == SAMPLES * SEQ_LENGTH
    for name, value in expected["held_out"].items():
        assert held_out[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    assert held_out["kl"] > 0.01
    words = found["last_word"]
    assert words["texts"] == len(TEXTS)
    for name in ("accuracy", "teacher_accuracy"):
        assert words[name] == pytest.approx(expected["last_word"][name])
    loss = torch.tensor(words["perplexity"]).log().item()
    assert loss == pytest.approx(expected["last_word"]["loss"], rel=1e-5)

    table = (tmp_path / "evaluation.md").read_text().splitlines()
    assert table[2] == "| | model | teacher |"
    assert table[4].startswith(f"| held-out perplexity | {held_out['perplexity']:.4g} |")
    assert len(table) == 4 + 7


def test_what_cannot_be_measured_is_one_line(root, config, tmp_path) -> None:
    student, texts = str(root / "student"), str(root / "texts.jsonl")
    cases: list[tuple[list[str], str]] = [
        ([student], "nothing to measure; give data.validation=PREFIX"),
        ([str(tmp_path)], "no checkpoint there"),
        ([student, "--last-word", str(tmp_path / "no.jsonl")], "cannot be read"),
        ([student, "data.validation=no/such"], "no/such"),
        ([student, "--suite", "a:b"], "--suite a:b: expected leaderboard, smollm"),
        ([student, "--suite", "leaderboard"], "needs the package lm_eval, which is not installed"),
        ([student, "parallel.tensor=3", "--last-word", texts], "parallel.tensor=3"),
    ]
    (said,) = run_ranks(1, refusals, [command for command, _ in cases])
    for (code, text), (command, words) in zip(said, cases, strict=True):
        assert code == 2, command
        assert words in text
        assert text.count("\n") == 1


def refusals(rank: int, size: int, commands: list[list[str]]) -> list[tuple[int, str]]:
    said = []
    for command in commands:
        with contextlib.redirect_stderr(io.StringIO()) as stream:
            code = main(["evaluate", *command])
        said.append((code, stream.getvalue()))
    return said

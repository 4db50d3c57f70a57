"""Layers and formats: what is taken, what is refused, and what the user is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from taid_megatron.config.checks import check_layout
from taid_megatron.config.engine import EngineAbilities, describe, takes_transformer_engine
from taid_megatron.config.errors import ConfigError
from taid_megatron.config.schema import Config

from .configs import make

CPU = EngineAbilities(has_cuda=False, has_transformer_engine=False, has_apex=False, gpu_count=0)
H100 = EngineAbilities(
    has_cuda=True,
    has_transformer_engine=True,
    has_apex=False,
    gpu_count=8,
    transformer_engine="2.11.0",
    compute_capability=(9, 0),
    cuda_version=(12, 9),
)
A100, B200 = (replace(H100, compute_capability=found) for found in ((8, 0), (10, 0)))


def refusal(config: Config, machine: EngineAbilities) -> str:
    with pytest.raises(ConfigError) as refused:
        check_layout(config, engine=machine)
    message = str(refused.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("layers", "precision", "machine", "taken"),
    [
        ("auto", "bf16", H100, True),
        ("te", "bf16", H100, True),
        ("local", "bf16", H100, False),
        ("auto", "fp32", H100, False),
        ("auto", "bf16", CPU, False),
    ],
)
def test_which_layers(layers, precision, machine, taken) -> None:
    config = make(engine__layers=layers, training__precision=precision)
    check_layout(config, engine=machine)
    assert takes_transformer_engine(config.engine, precision, machine) == taken
    assert describe(config, machine).startswith("layers: Transformer Engine 2.11.0") == taken


def test_the_user_is_told_why() -> None:
    assert describe(make(), CPU) == (
        "layers: megatron-core's own with torch's attention (Transformer Engine: not installed)"
    )
    mixed = make(teacher__precision="fp32", engine__fp8="tensorwise")
    assert describe(mixed, H100) == (
        "layers: student: Transformer Engine 2.11.0, FP8 tensorwise; teacher: megatron-core's own "
        "with torch's attention (Transformer Engine would multiply fp32 in TF32)"
    )


# What is asked, on which machine -> what the line must say.
REFUSED: dict[str, tuple[dict[str, Any], EngineAbilities, list[str]]] = {
    "te without it": (
        {"engine__layers": "te"},
        CPU,
        ["engine.layers=te cannot be had (Transformer Engine: not installed)", "pip install"],
    ),
    "te in fp32": (
        {"engine__layers": "te", "training__precision": "fp32"},
        H100,
        ["engine.layers=te", "TF32", "training.precision=bf16"],
    ),
    "fp8 without te": ({"engine__fp8": "delayed"}, CPU, ["engine.fp8=delayed", "not installed"]),
    "fp8 with local layers": (
        {"engine__fp8": "delayed", "engine__layers": "local"},
        H100,
        ["engine.fp8=delayed needs", "(engine.layers=local)", "set engine.fp8=none"],
    ),
    "fp8 on an old card": (
        {"engine__fp8": "tensorwise"},
        A100,
        ["engine.fp8=tensorwise needs a GPU of compute capability 8.9", "8.0", "engine.fp8=none"],
    ),
    "mxfp8 on Hopper": (
        {"engine__fp8": "mxfp8"},
        H100,
        ["capability 10.0", "below 12.0", "has 9.0", "set engine.fp8=tensorwise"],
    ),
    "mxfp8 on consumer Blackwell": (
        {"engine__fp8": "mxfp8"},
        replace(B200, compute_capability=(12, 0)),
        ["has 12.0"],
    ),
    "blockwise with an old CUDA": (
        {"engine__fp8": "blockwise"},
        replace(H100, cuda_version=(12, 6)),
        ["engine.fp8=blockwise needs CUDA 12.9", "built with 12.6", "engine.fp8=tensorwise"],
    ),
    "a frozen teacher's delayed scales": (
        {"engine__teacher_fp8": "delayed"},
        H100,
        ["engine.teacher_fp8=delayed", "frozen", "engine.teacher_fp8=tensorwise"],
    ),
    "no teacher": (
        {"engine__teacher_fp8": "tensorwise", "teacher": None, "loss__name": "cross_entropy"},
        H100,
        ["engine.teacher_fp8=tensorwise without a teacher"],
    ),
    "teacher in fp32": (
        {"engine__teacher_fp8": "tensorwise", "teacher__precision": "fp32"},
        H100,
        ["engine.teacher_fp8=tensorwise", "the teacher does not get", "TF32"],
    ),
    "narrow heads": (
        {"engine__fp8": "tensorwise", "parallel__tensor": 8},
        H100,
        ["the student's query channels on one rank, 8, must be a multiple of 16"],
    ),
    "few tokens": (
        {"engine__teacher_fp8": "mxfp8", "training__seq_length": 16},
        B200,
        ["the teacher's tokens of a micro-batch on one rank, 16, must be a multiple of 32"],
    ),
    "parts of blocks gathered": (
        {
            "engine__fp8": "blockwise",
            "parallel__tensor": 2,
            "parallel__sequence_parallel": True,
            "training__seq_length": 512,
        },
        H100,
        ["the student's hidden_size on one rank, 64, must be a multiple of 128"],
    ),
}


@pytest.mark.parametrize(("asked", "machine", "parts"), REFUSED.values(), ids=REFUSED)
def test_refused(asked, machine, parts) -> None:
    message = refusal(make(**asked), machine)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("recipe", "machine"),
    [("delayed", H100), ("tensorwise", H100), ("blockwise", H100), ("mxfp8", B200)],
)
def test_accepted(recipe, machine) -> None:
    check_layout(make(engine__fp8=recipe), engine=machine)
    if recipe != "delayed":
        check_layout(make(engine__teacher_fp8=recipe), engine=machine)

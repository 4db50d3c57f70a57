"""What `distillation_loss` refuses, and how it says so."""

import re

import pytest
import torch

from taid_megatron.losses import distillation_loss, reference
from taid_megatron.losses.registry import LOSSES

STUDENT, TEACHER = torch.zeros(2, 3, 8), torch.ones(2, 3, 8)
LABELS = torch.zeros(2, 3, dtype=torch.int64)
VALID = {"name": "taid", "student_logits": STUDENT, "teacher_logits": TEACHER, "t": 0.5}

WRONG = {
    "unknown loss": ({"name": "tiad"}, "'tiad'; there are: taid, forward_kl, "),
    "unknown kernel": ({"kernel": "cuda"}, "'cuda'; there are: auto, triton, native, torch"),
    "unknown option": ({"lam": 0.1}, "'taid' has no option lam; its options: t"),
    "option of another": ({"name": "forward_kl"}, "'forward_kl' has no option t; its options: no"),
    "t above 1": ({"t": 1.5}, "t=1.5"),
    "t below 0": ({"t": torch.tensor(-0.25)}, "t=-0.25"),
    "t not a number": ({"t": float("nan")}, "t=nan"),
    "t as text": ({"t": "0.5"}, "t='0.5'"),
    "t per token": ({"t": torch.zeros(2, 3)}, r"t must be .* 0-d .* \(2, 3\)"),
    "t an integer tensor": ({"t": torch.tensor(1)}, "t must be .* not torch.int64"),
    "shapes": ({"teacher_logits": torch.ones(2, 3, 9)}, r"\(2, 3, 8\) .* \(2, 3, 9\)"),
    "transposed": ({"teacher_logits": torch.ones(3, 2, 8)}, r"\(2, 3, 8\) .* \(3, 2, 8\)"),
    "no teacher": ({"teacher_logits": None}, "'taid' needs teacher_logits"),
    "integer logits": ({"student_logits": STUDENT.long()}, "int64"),
    "integer teacher": ({"teacher_logits": TEACHER.long()}, "int64"),
    "no axis": ({"student_logits": torch.tensor(1.0)}, r"\[\.\.\., V\]"),
    "labels missing": ({"ce_weight": 0.5}, "labels are missing"),
    "labels' shape": ({"labels": LABELS.T}, r"\(3, 2\) .* \(2, 3, 8\)"),
    "labels' type": ({"labels": LABELS.float()}, "float32: they must be integer"),
    "labels as mask": ({"labels": LABELS.bool()}, "bool: they must be integer"),
    "label too large": ({"labels": LABELS + 8, "ce_weight": 0.5}, "label 8 "),
    "label in the padding": ({"labels": LABELS + 7, "ce_weight": 0.5, "padding": 1}, "label 7 "),
    "ce_weight": ({"labels": LABELS, "ce_weight": 1.5}, "ce_weight=1.5"),
    "ce_weight below": ({"labels": LABELS, "ce_weight": -0.5}, "ce_weight=-0.5"),
    "unknown statistic": ({"return_stats": ("kl", "entropy")}, "'entropy'.* there are: objective"),
    "statistic without labels": ({"return_stats": ("cross_entropy",)}, "needs labels"),
    "padding": ({"padding": 9}, "padding=9 exceeds the 8"),
    "padding below": ({"padding": -1}, "padding=-1"),
    "nothing but padding": ({"padding": 8}, "padding=8 leaves none"),
    "chunk_tokens": ({"chunk_tokens": 0}, "chunk_tokens=0"),
    "vocab_offset": ({"vocab_offset": -1}, "vocab_offset=-1"),
    "inplace on a view of itself": (
        {"student_logits": STUDENT[:1].expand(2, 3, 8), "inplace": True},
        "expanded",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        distillation_loss(**{**VALID, **change})


def test_a_required_option_is_missing():
    with pytest.raises(ValueError, match="'taid' needs the option t"):
        distillation_loss("taid", STUDENT, TEACHER)


def test_cross_entropy_without_labels():
    with pytest.raises(ValueError, match="labels are missing"):
        distillation_loss("cross_entropy", STUDENT, None)


def test_kl_without_a_teacher():
    with pytest.raises(ValueError, match="'kl' needs teacher_logits"):
        distillation_loss("cross_entropy", STUDENT, None, labels=LABELS, return_stats=("kl",))


def test_the_valid_call_is_valid():
    assert distillation_loss(**VALID).shape == (2, 3)
    value, stats = distillation_loss(**VALID, return_stats=())
    assert value.shape == (2, 3)
    assert stats == {}


def test_labels_of_any_integer_type():
    for dtype in (torch.int32, torch.int16, torch.uint8):
        arguments = {**VALID, "labels": LABELS.to(dtype), "ce_weight": 0.5}
        assert distillation_loss(**arguments).isfinite().all()


def test_every_name_has_its_definition():
    for name, loss in LOSSES.items():
        assert re.fullmatch("[a-z_]+", name)
        assert loss.reference is getattr(reference, name)

"""The definitions: right by hand-computed values, finite differences and torch's own losses."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from taid_megatron.losses import reference

TOKENS, VOCABULARY = 4, 7


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(1)
    return [
        2 * torch.randn(TOKENS, VOCABULARY, generator=generator, dtype=torch.float64)
        for _ in range(2)
    ]


def test_forward_kl_of_a_coin():
    """Teacher (3/4, 1/4), student (1/2, 1/2)."""
    student = torch.zeros(1, 2, dtype=torch.float64)
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert reference.forward_kl(student, teacher).item() == pytest.approx(expected, abs=1e-15)


def test_taid_of_a_coin_half_way():
    """Logits are interpolated, not probabilities: (log 3) / 2 gives root 3 to 1."""
    student = torch.zeros(1, 2, dtype=torch.float64)
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    p = math.sqrt(3) / (1 + math.sqrt(3))
    expected = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    assert reference.taid(student, teacher, 0.5).item() == pytest.approx(expected, abs=1e-15)


def test_taid_runs_from_nothing_to_forward_kl(logits):
    student, teacher = logits
    assert reference.taid(student, teacher, 0.0).abs().max() < 1e-14
    expected = reference.forward_kl(student, teacher)
    torch.testing.assert_close(reference.taid(student, teacher, 1.0), expected)


def test_forward_kl_by_finite_differences(logits):
    student, teacher = logits
    assert gradcheck(lambda s: reference.forward_kl(s, teacher), student.requires_grad_())


def test_cross_entropy_by_finite_differences(logits):
    labels = torch.tensor([3, -100, 0, 6])
    assert gradcheck(lambda s: reference.cross_entropy(s, labels), logits[0].requires_grad_())


def test_the_student_in_taids_target_is_a_constant(logits):
    """taid is forward KL to a fixed target, in value and gradient; that gradient is q - p_t."""
    student, teacher = logits
    student.requires_grad_()
    fixed = 0.7 * student.detach() + 0.3 * teacher
    (grad,) = torch.autograd.grad(reference.taid(student, teacher, 0.3).sum(), student)
    expected = reference.forward_kl(student, fixed)
    (expected_grad,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(reference.taid(student, teacher, 0.3), expected)
    torch.testing.assert_close(grad, expected_grad)
    torch.testing.assert_close(grad, student.softmax(-1) - fixed.softmax(-1))


def test_cross_entropy_is_torchs_with_negative_labels_ignored(logits):
    student, labels = logits[0], torch.tensor([1, -100, 5, -1])
    expected = torch.nn.functional.cross_entropy(
        student, labels.where(labels >= 0, -100), reduction="none"
    )
    torch.testing.assert_close(reference.cross_entropy(student, labels), expected)


def test_the_teacher_gets_no_gradient(logits):
    student, teacher = (x.requires_grad_() for x in logits)
    for loss in (reference.taid(student, teacher, 0.5), reference.forward_kl(student, teacher)):
        assert torch.autograd.grad(loss.sum(), teacher, allow_unused=True) == (None,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_float_dtype_and_shape(dtype):
    student, teacher = torch.randn(2, 2, 3, VOCABULARY, dtype=dtype)
    loss = reference.taid(student, teacher, 0.5)
    assert loss.dtype == dtype
    assert loss.shape == (2, 3)

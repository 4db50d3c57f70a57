"""One case per divergence and variant: its options and its definition on whole rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from taid_megatron.losses import distillation_loss, reference


@dataclass(frozen=True)
class Case:
    """A loss under its options; `define(student, teacher, labels)` is its reference."""

    name: str
    define: Callable[[Tensor, Tensor, Tensor], Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    collectives: int = 1
    error: float = 1.0
    """Times the promised error: where a temperature or the logits' difference multiplies it."""


CASES = {
    "taid": Case("taid", lambda s, z, y: reference.taid(s, z, 0.4), {"t": 0.4}),
    "forward_kl": Case("forward_kl", lambda s, z, y: reference.forward_kl(s, z)),
    "reverse_kl": Case("reverse_kl", lambda s, z, y: reference.reverse_kl(s, z), error=3.0),
    "tvd": Case("tvd", lambda s, z, y: reference.tvd(s, z), collectives=2),
    "gjs": Case("gjs", lambda s, z, y: reference.gjs(s, z, 0.1), {"beta": 0.1}, collectives=2),
    "gjs 0.7": Case("gjs", lambda s, z, y: reference.gjs(s, z, 0.7), {"beta": 0.7}, collectives=2),
    "skew_kl": Case(
        "skew_kl", lambda s, z, y: reference.skew_kl(s, z, 0.1), {"lam": 0.1}, collectives=2
    ),
    "skew_reverse_kl": Case(
        "skew_reverse_kl",
        lambda s, z, y: reference.skew_reverse_kl(s, z, 0.1),
        {"lam": 0.1},
        collectives=2,
    ),
    "adaptive_kl": Case(
        "adaptive_kl",
        lambda s, z, y: reference.adaptive_kl(s, z, 0.5),
        {"mu": 0.5},
        collectives=3,
        error=3.0,
    ),
    "adaptive_kl 0.9": Case(
        "adaptive_kl",
        lambda s, z, y: reference.adaptive_kl(s, z, 0.9),
        {"mu": 0.9},
        collectives=3,
        error=3.0,
    ),
    "adaptive_kl official": Case(
        "adaptive_kl",
        lambda s, z, y: reference.adaptive_kl(s, z, 0.5, "official"),
        {"mu": 0.5, "variant": "official"},
        collectives=4,
        error=3.0,
    ),
    "dkd": Case(
        "dkd",
        lambda s, z, y: reference.dkd(s, z, y, 1.0, 2.0, 2.0),
        {"alpha": 1.0, "beta": 2.0, "temperature": 2.0},
        error=8.0,
    ),
    "ctkd": Case(
        "ctkd", lambda s, z, y: reference.ctkd(s, z, 3.0), {"temperature": 3.0}, error=3.0
    ),
    "ctkd official": Case(
        "ctkd",
        lambda s, z, y: reference.ctkd(s, z, 3.0, "official"),
        {"temperature": 3.0, "variant": "official"},
        error=3.0,
    ),
    "cross_entropy": Case("cross_entropy", lambda s, z, y: reference.cross_entropy(s, y)),
}


def exact(
    case: Case, student: Tensor, teacher: Tensor, labels: Tensor, upstream: Tensor, ce_weight: float
) -> tuple[Tensor, Tensor]:
    """Loss and gradient by the reference, in float64 on whole rows."""
    student = student.detach().double().requires_grad_()
    loss = case.define(student, teacher.double(), labels)
    if case.name != "cross_entropy":
        loss = (1 - ce_weight) * loss + ce_weight * reference.cross_entropy(student, labels)
    loss.backward(upstream.double())
    assert student.grad is not None
    return loss.detach(), student.grad


def assert_accurate(
    case: Case, loss: Tensor, grad: Tensor, expected_loss: Tensor, expected_grad: Tensor
) -> None:
    """Within 2e-6 + 1e-6 |loss| and 1e-6 in the gradient, upstream gradients in [-1, 1]."""
    torch.testing.assert_close(loss.double(), expected_loss, atol=2e-6 * case.error, rtol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, atol=1e-6 * case.error, rtol=0)


def assert_as_torchs_operations(
    case: Case, kernel: str, student: Tensor, teacher: Tensor, labels: Tensor, upstream: Tensor
) -> None:
    """A kernel beside torch's operations, tokens that do not lie one after the other. [a, b, V]."""
    results = []
    for each in ("torch", kernel):
        leaf = student.clone().requires_grad_()
        view = leaf.transpose(0, 1).contiguous().transpose(0, 1)
        loss = distillation_loss(
            *(case.name, view, teacher),
            labels=labels,
            ce_weight=0.25,
            kernel=each,
            **case.options,
        )
        loss.backward(upstream)
        results.append((loss.detach(), leaf.grad))
    (loss, grad), (kernel_loss, kernel_grad) = results
    torch.testing.assert_close(kernel_loss, loss, atol=8e-6, rtol=2e-6)
    torch.testing.assert_close(kernel_grad, grad, atol=1e-6 * case.error, rtol=0)

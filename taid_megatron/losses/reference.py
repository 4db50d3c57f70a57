"""What each loss means: whole rows, plain autograd, written to be read.

Every function takes logits `[..., V]` in any float dtype, computes in that dtype, returns one value
per token in nats `[...]`, and gives a gradient to the student alone. The fast code is held to these
functions by tests, gradients included. float64 makes them exact to about 1e-14.
"""

from __future__ import annotations

import torch
from torch import Tensor


def taid(student: Tensor, teacher: Tensor, t: float | Tensor) -> Tensor:
    """KL(p_t || q) per token. [..., V] x 2 -> [...]. Source: TAID, eq. 2.

    p_t = softmax((1 - t) student + t teacher), in which the student is a constant: the gradient in
    the student's logits is q - p_t.
    """
    target = (1 - t) * student.detach() + t * teacher.detach()
    return _kl_divergence(target.log_softmax(-1), student.log_softmax(-1))


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) per token. [..., V] x 2 -> [...]. Source: TAID, eq. 2 at t = 1."""
    return _kl_divergence(teacher.detach().log_softmax(-1), student.log_softmax(-1))


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """-log q(label) per token, 0 where the label is negative. [..., V], [...] ids -> [...]."""
    log_q = student.log_softmax(-1)
    picked = log_q.gather(-1, labels.long().clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels >= 0, -picked, torch.zeros_like(picked))


def _kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p (log p - log q) over the last axis."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)

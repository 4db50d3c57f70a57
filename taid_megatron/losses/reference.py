"""What each loss means: whole rows, plain autograd, written to be read.

Every function takes logits `[..., V]` in any float dtype, computes in that dtype, returns one value
per token in nats `[...]`, and gives a gradient to the student alone (`ctkd` also to the
temperature). p is the teacher's distribution, q the student's. The fast code is held to these
functions by tests, gradients included. float64 makes them exact to about 1e-14.
"""

from __future__ import annotations

import torch
from torch import Tensor

Temperature = float | Tensor


def taid(student: Tensor, teacher: Tensor, t: float | Tensor) -> Tensor:
    """KL(p_t || q) per token. [..., V] x 2 -> [...]. Source: TAID, eq. 2.

    p_t = softmax((1 - t) student + t teacher), in which the student is a constant: the gradient in
    the student's logits is q - p_t.
    """
    target = (1 - t) * student.detach() + t * teacher.detach()
    return _kl_divergence(target.log_softmax(-1), student.log_softmax(-1))


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(p || q) per token. [..., V] x 2 -> [...]. Source: TAID, eq. 2 at t = 1."""
    return _kl_divergence(teacher.detach().log_softmax(-1), student.log_softmax(-1))


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(q || p) per token. [..., V] x 2 -> [...]. Source: MiniLLM, arXiv 2306.08543."""
    return _kl_divergence(student.log_softmax(-1), teacher.detach().log_softmax(-1))


def tvd(student: Tensor, teacher: Tensor) -> Tensor:
    """Total variation distance, half of sum |p - q|. [..., V] x 2 -> [...]. arXiv 2307.15190."""
    return 0.5 * (teacher.detach().softmax(-1) - student.softmax(-1)).abs().sum(-1)


def gjs(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """beta KL(p || r) + (1 - beta) KL(q || r), r = beta p + (1 - beta) q. [..., V] x 2 -> [...].

    The generalised Jensen-Shannon divergence; source: GKD, arXiv 2306.13649.
    """
    log_p, log_q = teacher.detach().log_softmax(-1), student.log_softmax(-1)
    log_r = _log_mixture(log_p, log_q, beta)
    return beta * _kl_divergence(log_p, log_r) + (1 - beta) * _kl_divergence(log_q, log_r)


def skew_kl(student: Tensor, teacher: Tensor, lam: float) -> Tensor:
    """KL(p || lam p + (1 - lam) q) per token. [..., V] x 2 -> [...]. DistiLLM, arXiv 2402.03898."""
    log_p, log_q = teacher.detach().log_softmax(-1), student.log_softmax(-1)
    return _kl_divergence(log_p, _log_mixture(log_p, log_q, lam))


def skew_reverse_kl(student: Tensor, teacher: Tensor, lam: float) -> Tensor:
    """KL(q || (1 - lam) p + lam q) per token. [..., V] x 2 -> [...]. DistiLLM, arXiv 2402.03898."""
    log_p, log_q = teacher.detach().log_softmax(-1), student.log_softmax(-1)
    return _kl_divergence(log_q, _log_mixture(log_p, log_q, 1 - lam))


def adaptive_kl(student: Tensor, teacher: Tensor, mu: float, variant: str = "paper") -> Tensor:
    """w KL(p || q) + (1 - w) KL(q || p) per token. [..., V] x 2 -> [...]. arXiv 2404.02657.

    The head is the teacher's smallest set of most likely tokens whose mass reaches mu (of equal
    ones the lower id first); w is the head's share of sum |p - q|, a constant. 'official' follows
    the TAID authors' code: the first columns of the vocabulary, as many as the head has, stand for
    it, and the gradient goes through w.
    """
    p, q = teacher.detach().softmax(-1), student.softmax(-1)
    ranked, order = p.sort(dim=-1, descending=True, stable=True)
    in_head = (ranked.cumsum(-1) - ranked) < mu
    if variant == "paper":
        q = q.detach()
        in_head = torch.zeros_like(in_head).scatter_(-1, order, in_head)
    gap = (p - q).abs()
    head, whole = (gap * in_head).sum(-1), gap.sum(-1)
    weight = head / whole.clamp_min(torch.finfo(whole.dtype).tiny)
    return weight * forward_kl(student, teacher) + (1 - weight) * reverse_kl(student, teacher)


def dkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """T^2 (alpha target-class KL + beta non-target-class KL) per token. arXiv 2203.08679.

    [..., V] x 2, [...] ids -> [...]. All at temperature T. The first is the KL between the two-way
    distributions (label, anything else), the second the KL between the distributions over all
    tokens but the label. 0 where the label is negative.
    """
    index = labels.long().clamp(min=0).unsqueeze(-1)
    log_p = (teacher.detach() / temperature).log_softmax(-1)
    log_q = (student / temperature).log_softmax(-1)
    two_way = _kl_divergence(_label_or_not(log_p, index), _label_or_not(log_q, index))
    others = _kl_divergence(_without(log_p, index), _without(log_q, index))
    value = temperature**2 * (alpha * two_way + beta * others)
    return torch.where(labels >= 0, value, torch.zeros_like(value))


def ctkd(
    student: Tensor, teacher: Tensor, temperature: Temperature, variant: str = "paper"
) -> Tensor:
    """T^2 KL(p || q), both at temperature T, per token. [..., V] x 2 -> [...]. arXiv 2211.16231.

    Differentiable in T too. 'official' is the TAID authors' code: the cross-entropy
    -T^2 sum p log q, whose gradient in the student is the same and in T another.
    """
    log_p = (teacher.detach() / temperature).log_softmax(-1)
    log_q = (student / temperature).log_softmax(-1)
    if variant == "official":
        return temperature**2 * -(log_p.exp() * log_q).sum(-1)
    return temperature**2 * _kl_divergence(log_p, log_q)


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """-log q(label) per token, 0 where the label is negative. [..., V], [...] ids -> [...]."""
    log_q = student.log_softmax(-1)
    picked = log_q.gather(-1, labels.long().clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels >= 0, -picked, torch.zeros_like(picked))


def _kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p (log p - log q) over the last axis."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    return torch.log(share * log_p.exp() + (1 - share) * log_q.exp())


def _label_or_not(log_p: Tensor, index: Tensor) -> Tensor:
    """Log-probabilities of the label and of everything else. [..., V] -> [..., 2]."""
    others = log_p.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, index), others], -1)


def _without(log_p: Tensor, index: Tensor) -> Tensor:
    """Log-probabilities given that it is not the label; the label's own column becomes tiny."""
    # not -inf: its gradient would be 0 times infinity
    masked = log_p.scatter(-1, index, torch.finfo(log_p.dtype).min / 2)
    return masked.log_softmax(-1)

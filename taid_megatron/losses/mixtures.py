"""The divergences of two collectives: those that need log q and log p before they can sum.

The first collective brings the normalisers of both models. Then each rank knows q and p of its own
columns, and sums two numbers per token over them:

    value   the divergence D
    slope   sum q h, with h = dD/dq per column, up to a constant

The second collective adds them up. The gradient in the student's logits is local: q (h - slope).

    tvd               value = |q - p| / 2                                    h = sign(q - p) / 2
    gjs               value = beta p log(p/r) + (1-beta) q log(q/r)          h = (1-beta) log(q/r)
    skew_kl           value = p log(p/r), r = lam p + (1-lam) q              h = -(1-lam) p/r
    skew_reverse_kl   value = q log(q/r), r = (1-lam) p + lam q              h = log(q/r) - lam q/r
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from taid_megatron.losses.forms import (
    Form,
    Walk,
    fill_teacher,
    label_names,
    teacher_names,
    teacher_values,
)
from taid_megatron.losses.shards import Chunk, Columns, Request, exp, exponentials, load

# Where both masses underflow, log r must stay finite: 0 times it is then 0.
_TINY = 1e-37


class Mixture(Form):
    """A divergence given by what it sums and by its slope h.

    Args:
        kind: a key of KINDS.
        share: weight of the teacher in r (of no meaning for tvd).
    """

    num_buffers = 5

    def __init__(self, kind: str, share: float = 0.5) -> None:
        self.kind, self.share = kind, share

    def names(self, request: Request) -> tuple[str, ...]:
        return ("max_s", "sum_s", *teacher_names(request), *label_names(request))

    def fill(self, chunk: Chunk, columns: Columns) -> None:
        fill_teacher(chunk, columns)
        s = chunk.buffers[0]
        exponentials(s, columns["max_s"], columns["sum_s"], out=s)

    def refine(self, walk: Walk, merged: Columns) -> None:
        merged.update(walk.sums(("value", "slope"), self._sum, self._normalisers(merged)))

    def _sum(self, chunk: Chunk, rows: Tensor, columns: Columns) -> None:
        KINDS[self.kind].sums(self._masses(chunk, rows), columns)

    def _normalisers(self, merged: Columns) -> list[Tensor]:
        return [merged["max_s"], merged["sum_s"].log(), merged["max_p"], merged["sum_p"].log()]

    def _masses(self, chunk: Chunk, rows: Tensor) -> Masses:
        log_q, log_p, q, p, work = chunk.buffers
        load(chunk.student, log_q)
        load(chunk.teacher, log_p)
        log_q.sub_(rows[:, 0:1]).sub_(rows[:, 1:2])
        log_p.sub_(rows[:, 2:3]).sub_(rows[:, 3:4])
        exp(log_q, out=q)
        exp(log_p, out=p)
        return Masses(self.share, log_q, log_p, q, p, work)

    def values(self, merged: Columns, request: Request) -> Columns:
        return {**teacher_values(merged), "objective": merged["value"]}

    def saved(self) -> tuple[str, ...]:
        return ("max_s", "sum_s", "max_p", "sum_p", "slope")

    def coefficients(self, merged: Columns, divergence: Tensor, surprise: Tensor) -> list[Tensor]:
        return [
            *self._normalisers(merged),
            divergence,
            surprise - divergence * merged["slope"],
        ]

    def gradient(self, chunk: Chunk, rows: Tensor, out: Tensor) -> None:
        masses = self._masses(chunk, rows)
        h = KINDS[self.kind].slope(masses)
        torch.mul(h.mul_(rows[:, 4:5]).add_(rows[:, 5:6]), masses.q, out=out)


@dataclass(frozen=True)
class Masses:
    """Of a chunk, [T, V] each; all but q may be overwritten."""

    share: float
    log_q: Tensor
    log_p: Tensor
    q: Tensor
    p: Tensor
    work: Tensor


@dataclass(frozen=True)
class Kind:
    """What a divergence sums into the columns `value` and `slope` [T], and its h [T, V]."""

    sums: Callable[[Masses, Columns], None]
    slope: Callable[[Masses], Tensor]


def _tvd_sums(m: Masses, columns: Columns) -> None:
    gap = torch.sub(m.q, m.p, out=m.work)
    torch.sum(torch.sign(gap, out=m.log_q).mul_(m.q), -1, out=columns["slope"])
    torch.sum(gap.abs_(), -1, out=columns["value"])
    columns["slope"].mul_(0.5)
    columns["value"].mul_(0.5)


def _tvd_slope(m: Masses) -> Tensor:
    return torch.sub(m.q, m.p, out=m.work).sign_().mul_(0.5)


def _log_mixture(m: Masses) -> Tensor:
    """log(share p + (1 - share) q), in the buffer `work`."""
    return torch.lerp(m.q, m.p, m.share, out=m.work).clamp_min_(_TINY).log_()


def _gjs_sums(m: Masses, columns: Columns) -> None:
    log_r = _log_mixture(m)
    torch.sum(m.log_q.sub_(log_r).mul_(m.q), -1, out=columns["slope"])
    torch.sum(m.log_p.sub_(log_r).mul_(m.p), -1, out=columns["value"])
    columns["slope"].mul_(1 - m.share)
    columns["value"].mul_(m.share).add_(columns["slope"])


def _gjs_slope(m: Masses) -> Tensor:
    return m.log_q.sub_(_log_mixture(m)).mul_(1 - m.share)


def _skew_sums(m: Masses, columns: Columns) -> None:
    log_ratio = m.log_p.sub_(_log_mixture(m))
    torch.sum(torch.mul(log_ratio, m.p, out=m.work), -1, out=columns["value"])
    torch.sum(exp(log_ratio, out=log_ratio).mul_(m.q), -1, out=columns["slope"])
    columns["slope"].mul_(m.share - 1)


def _skew_slope(m: Masses) -> Tensor:
    log_ratio = m.log_p.sub_(_log_mixture(m))
    return exp(log_ratio, out=log_ratio).mul_(m.share - 1)


def _skew_reverse_sums(m: Masses, columns: Columns) -> None:
    log_ratio = m.log_q.sub_(_log_mixture(m))
    torch.sum(torch.mul(log_ratio, m.q, out=m.work), -1, out=columns["value"])
    torch.sum(exp(log_ratio, out=log_ratio).mul_(m.q), -1, out=columns["slope"])
    columns["slope"].mul_(m.share - 1).add_(columns["value"])


def _skew_reverse_slope(m: Masses) -> Tensor:
    log_ratio = m.log_q.sub_(_log_mixture(m))
    ratio = exp(log_ratio, out=m.work)
    return log_ratio.add_(ratio, alpha=m.share - 1)


KINDS: dict[str, Kind] = {
    "tvd": Kind(_tvd_sums, _tvd_slope),
    "gjs": Kind(_gjs_sums, _gjs_slope),
    "skew_kl": Kind(_skew_sums, _skew_slope),
    "skew_reverse_kl": Kind(_skew_reverse_sums, _skew_reverse_slope),
}

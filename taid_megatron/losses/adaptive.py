"""Adaptive KL on vocabulary shards, in three collectives.

w KL(p || q) + (1 - w) KL(q || p), w the share of sum |p - q| that falls on the head: the teacher's
smallest set of most likely tokens whose mass reaches mu (arXiv 2404.02657). No shard knows by
itself where the head ends, and the head may hold half of the vocabulary. So

    1.  the normalisers of both models, and both divergences;
    2.  a histogram of the teacher's mass over distance from its maximum: it names the one bin in
        which the head ends;
    3.  that bin's tokens, each with its |p - q|, and the sums over the surer bins.

Every rank then sorts the few tokens of the bin (equal ones by their id) and finds the exact end.
How many those are depends on the data: some dozens for a bin of 1/10 nat, all of them where the
teacher's logits are all equal.

The variant of the authors' code needs the head's length before it can sum: one collective more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taid_megatron.losses.forms import (
    Form,
    Walk,
    cross_entropy_to_target,
    label_names,
    log_ratio,
    pick,
)
from taid_megatron.losses.shards import (
    Chunk,
    Columns,
    Request,
    exp,
    exp_of_difference,
    exponentials,
    load,
)

_NUM_BINS = 256
_BINS_PER_NAT = 10.0
"""The last bin holds all that is 25 nats and more below the maximum."""


class Adaptive(Form):
    """Forward and reverse KL, weighted by where teacher and student differ."""

    num_buffers = 4

    def __init__(self, mu: float, variant: str) -> None:
        self.mu, self.official = mu, variant == "official"
        self._first_id = 0

    def names(self, request: Request) -> tuple[str, ...]:
        names = ["max_s", "sum_s", "gap_s", "max_p", "sum_p", "gap_p"]
        if "cross_entropy_to_target" in request.stats:
            names += ["student_p"]
        return (*names, *label_names(request))

    def fill(self, chunk: Chunk, columns: Columns) -> None:
        s, z, work, _ = chunk.buffers
        load(chunk.student, s)
        load(chunk.teacher, z)
        if "label_s" in columns:
            pick(s, chunk.index, columns["label_s"])
        exponentials(z, columns["max_p"], columns["sum_p"], out=work)
        if "student_p" in columns:
            torch.sum(torch.mul(work, s, out=chunk.buffers[3]), -1, out=columns["student_p"])
        z.sub_(s)
        torch.sum(work.mul_(z), -1, out=columns["gap_p"])
        exponentials(s, columns["max_s"], columns["sum_s"], out=s)
        torch.sum(s.mul_(z.neg_()), -1, out=columns["gap_s"])

    # ---- where the head ends ---------------------------------------------------------------------

    def refine(self, walk: Walk, merged: Columns) -> None:
        numbers = [merged["max_s"], merged["sum_s"].log(), merged["max_p"], merged["sum_p"].log()]
        mass, count = walk.gather(walk.local((_NUM_BINS, _NUM_BINS), self._histogram, numbers))
        reached = mass.sum(0).cumsum(-1)
        last = (reached < self.mu).sum(-1, keepdim=True).clamp_max(_NUM_BINS - 1)
        before = (reached - mass.sum(0)).gather(-1, last)
        in_bin = count.gather(-1, last.expand(len(count), *last.shape))
        most = int(in_bin.max()) if in_bin.numel() else 0
        numbers.append(last.squeeze(-1).to(mass.dtype))
        widths = (most, most, 2)
        distance, gap, sums = walk.gather(walk.local(widths, self._candidates, numbers))
        empty = torch.arange(most, device=distance.device) >= in_bin
        distance.masked_fill_(empty, torch.inf)
        # [R, *, most] -> [*, R * most]: of equal distances the lower rank, so the lower id, first
        distance, gap = (x.movedim(0, -2).flatten(-2) for x in (distance, gap))
        distance, order = distance.sort(dim=-1, stable=True)
        masses = (-distance).exp() / merged["sum_p"].unsqueeze(-1)
        inside = before + masses.cumsum(-1) - masses < self.mu
        inside &= distance < torch.inf
        sure, whole = sums.sum(0).unbind(-1)
        merged["head"] = sure + (gap.gather(-1, order) * inside).sum(-1)
        merged["whole"] = whole
        if self.official:
            bins = torch.arange(_NUM_BINS, device=last.device) < last
            length = (count.sum(0) * bins).sum(-1) + inside.sum(-1)
            self._first_columns(walk, merged, [*numbers[:4], length])
        tiny = torch.finfo(whole.dtype).tiny
        merged["weight"] = merged["head"] / merged["whole"].clamp_min(tiny)

    def _histogram(self, chunk: Chunk, rows: Tensor, outs: Sequence[Tensor]) -> None:
        """Mass and count per bin of distance from the teacher's maximum."""
        _, distance, p, ones = chunk.buffers
        mass, count = outs
        bins = self._bins(chunk, rows, distance)
        exp(torch.add(distance, rows[:, 3:4], out=p).neg_(), out=p)
        mass.scatter_add_(1, bins, p)
        count.scatter_add_(1, bins, ones.fill_(1.0))

    def _bins(self, chunk: Chunk, rows: Tensor, distance: Tensor) -> Tensor:
        load(chunk.teacher, distance)
        torch.sub(rows[:, 2:3], distance, out=distance)
        return (distance * _BINS_PER_NAT).clamp_(0, _NUM_BINS - 1).long()

    def _candidates(self, chunk: Chunk, rows: Tensor, outs: Sequence[Tensor]) -> None:
        """The last bin's distances and gaps, then the gap's sum before it and over all."""
        gap, distance, p, _ = chunk.buffers
        distances, gaps, sums = outs
        bins = self._bins(chunk, rows, distance)
        _masses(chunk, rows, gap, p)
        gap.sub_(p).abs_()
        last = rows[:, 4:5].long()
        token, column = (bins == last).nonzero(as_tuple=True)
        start = torch.searchsorted(token, torch.arange(len(rows), device=token.device))
        slot = torch.arange(len(token), device=token.device) - start[token]
        distances[token, slot] = distance[token, column]
        gaps[token, slot] = gap[token, column]
        sums[:, 1] = gap.sum(-1)
        sums[:, 0] = gap.mul_(bins < last).sum(-1)

    def _first_columns(self, walk: Walk, merged: Columns, numbers: Sequence[Tensor]) -> None:
        """The authors' head: the first `length` columns; with the sums its gradient needs."""
        merged["length"] = numbers[4]
        names = ("head", "whole", "head_sign", "whole_sign")

        def fill(chunk: Chunk, rows: Tensor, columns: Columns) -> None:
            q, p, sign, first = chunk.buffers
            _masses(chunk, rows, q, p)
            self._mark_first(rows[:, 4:5], first)
            p.sub_(q).neg_()
            torch.sign(p, out=sign).mul_(q)
            torch.sum(p.abs_(), -1, out=columns["whole"])
            torch.sum(p.mul_(first), -1, out=columns["head"])
            torch.sum(sign, -1, out=columns["whole_sign"])
            torch.sum(sign.mul_(first), -1, out=columns["head_sign"])

        self._first_id = walk.first_id
        merged.update(walk.sums(names, fill, numbers))

    def _mark_first(self, length: Tensor, out: Tensor) -> None:
        """1 in the columns whose global id is below `length` [T, 1], else 0."""
        ids = torch.arange(out.shape[-1], device=out.device) + self._first_id
        out.copy_(ids < length)

    # ---- what it is worth ------------------------------------------------------------------------

    def values(self, merged: Columns, request: Request) -> Columns:
        forward = merged["gap_p"] / merged["sum_p"] + log_ratio(merged, "p")
        reverse = merged["gap_s"] / merged["sum_s"] - log_ratio(merged, "p")
        merged["advantage"] = forward - reverse
        weight = merged["weight"]
        values = {"objective": weight * forward + (1 - weight) * reverse, "kl": forward}
        if "student_p" in merged:
            values["cross_entropy_to_target"] = cross_entropy_to_target(merged)
        return values

    def saved(self) -> tuple[str, ...]:
        names = ("max_s", "sum_s", "gap_s", "max_p", "sum_p", "weight")
        if not self.official:
            return names
        return (*names, "length", "whole", "head_sign", "whole_sign", "advantage")

    def coefficients(self, merged: Columns, divergence: Tensor, surprise: Tensor) -> list[Tensor]:
        weight = merged["weight"]
        forward, reverse = divergence * weight, divergence * (1 - weight)
        constant = forward + surprise - reverse * merged["gap_s"] / merged["sum_s"]
        columns = [
            merged["max_s"],
            reverse / merged["sum_s"],
            merged["max_p"],
            forward / merged["sum_p"],
        ]
        if not self.official:
            return [*columns, constant / merged["sum_s"]]
        tiny = torch.finfo(weight.dtype).tiny
        turn = divergence * merged["advantage"] / merged["whole"].clamp_min(tiny)
        constant -= turn * (merged["head_sign"] - weight * merged["whole_sign"])
        log_normalisers = [merged["sum_s"].log(), merged["sum_p"].log()]
        scale = turn / merged["sum_s"]
        return [
            *columns,
            constant / merged["sum_s"],
            *log_normalisers,
            scale,
            weight,
            merged["length"],
        ]

    def gradient(self, chunk: Chunk, rows: Tensor, out: Tensor) -> None:
        s, z, factor, work = chunk.buffers
        if self.official:
            self._weight_slope(chunk, rows, factor)
        load(chunk.student, s)
        load(chunk.teacher, z)
        torch.sub(s, z, out=work).mul_(rows[:, 1:2]).add_(rows[:, 4:5])
        if self.official:
            work.add_(factor)
        q = exp_of_difference(s, rows[:, 0:1], out=s).mul_(work)
        p = exp_of_difference(z, rows[:, 2:3], out=z).mul_(rows[:, 3:4])
        torch.sub(q, p, out=out)

    def _weight_slope(self, chunk: Chunk, rows: Tensor, out: Tensor) -> None:
        """What the gradient through w adds to the factor of the student's exponential."""
        q, p, _, first = chunk.buffers
        normalisers = torch.stack([rows[:, 0], rows[:, 5], rows[:, 2], rows[:, 6]], -1)
        _masses(chunk, normalisers, q, p)
        self._mark_first(rows[:, 9:10], first)
        first.sub_(rows[:, 8:9])
        torch.sub(q, p, out=out).sign_().mul_(first).mul_(rows[:, 7:8])


def _masses(chunk: Chunk, rows: Tensor, q: Tensor, p: Tensor) -> None:
    """q and p of the chunk; rows: max_s, log sum_s, max_p, log sum_p."""
    for source, x, column in ((chunk.student, q, 0), (chunk.teacher, p, 2)):
        load(source, x)
        x.sub_(rows[:, column : column + 1]).sub_(rows[:, column + 1 : column + 2])
        exp(x, out=x)

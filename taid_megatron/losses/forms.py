"""The divergences of one collective: what each sums on a shard, what that is worth, its gradient.

Legend: see shards.py. Further: i = (1 - t) s + t z the target's logits, q = softmax(s),
p = softmax(i); u = 1 / temperature. Per token and shard, maxima m and sums apart:

    sum_s = sum e^(s - m_s)    sum_p = sum e^(i - m_p)    gap_p = sum e^(i - m_p) (z - s)

    KL(p || q) = t gap_p / sum_p + (m_s - m_p) + log sum_s - log sum_p
    gradient     g (e^(s - m_s) / sum_s - e^(i - m_p) / sum_p)

The others differ in what is summed and in the factors of the two exponentials.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from taid_megatron.losses.shards import (
    FLOOR,
    Chunk,
    Columns,
    Request,
    exp_of_difference,
    exponentials,
    load,
)

Interpolation = float | Tensor | None
"""t, and None where there is no divergence at all."""

Fill = Callable[[Chunk, Tensor, Columns], None]
FillWide = Callable[[Chunk, Tensor, Sequence[Tensor]], None]


class Walk(Protocol):
    """What a form may ask of the driver once the first collective is done."""

    @property
    def first_id(self) -> int:
        """Global vocabulary id of this rank's first column."""
        ...

    def sums(self, names: Sequence[str], fill: Fill, numbers: Sequence[Tensor]) -> Columns:
        """Statistics [*] of a further pass and collective; `numbers` [*] reach `fill` as rows."""
        ...

    def local(
        self, widths: Sequence[int], fill: FillWide, numbers: Sequence[Tensor]
    ) -> list[Tensor]:
        """As `sums`, tensors [*, width] per token, of this rank alone."""
        ...

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """[*, width] of this rank -> [R, *, width] of all, in one collective."""
        ...


class Form:
    """One divergence on vocabulary shards. The driver is vocab_parallel.py.

    Attributes:
        plain: max_s and sum_s are those of the student's own softmax, so that the cross-entropy to
            the labels needs nothing else, and `coefficients` takes its share of the gradient.
        num_buffers: buffers a chunk needs.
        parameter: a tensor besides the student's logits that gets a gradient; the merged statistic
            `slope` [*] is then the objective's derivative in it.
        extra_stats: statistics it can return besides STATS.
        wide: keep its statistics in float64.
    """

    plain = True
    num_buffers = 3
    parameter: Tensor | None = None
    extra_stats: tuple[str, ...] = ()
    wide = False

    def names(self, request: Request) -> tuple[str, ...]:
        """The statistics of the first collective."""
        raise NotImplementedError

    def fill(self, chunk: Chunk, columns: Columns) -> None:
        """Write the statistics of a chunk into `columns` [T]."""
        raise NotImplementedError

    def refine(self, walk: Walk, merged: Columns) -> None:
        """Add to the merged statistics [*] what takes further collectives; by default nothing."""

    def values(self, merged: Columns, request: Request) -> Columns:
        """`objective` and the asked statistics [*], the cross-entropy apart."""
        raise NotImplementedError

    def saved(self) -> tuple[str, ...]:
        """Which merged statistics the backward needs."""
        raise NotImplementedError

    def coefficients(self, merged: Columns, divergence: Tensor, surprise: Tensor) -> list[Tensor]:
        """Numbers per token [*] for `gradient`, from upstream gradients [*].

        `divergence` is that of the objective, `surprise` that of the cross-entropy, whose part
        that falls on the label alone is the driver's.
        """
        raise NotImplementedError

    def gradient(self, chunk: Chunk, rows: Tensor, out: Tensor) -> None:
        """Gradient of a chunk into `out` [T, V], maybe the student's storage; rows [T, C]."""
        raise NotImplementedError


class Interpolated(Form):
    """KL(p_t || q): taid; at t = 1 forward KL; at t = None nothing, for the cross-entropy alone."""

    def __init__(self, t: Interpolation) -> None:
        # A copy: whoever owns the tensor may change it before the backward.
        self.t = t.detach().clone() if isinstance(t, Tensor) else t

    def names(self, request: Request) -> tuple[str, ...]:
        names = ["max_s", "sum_s"]
        if self.t is not None:
            names += ["max_p", "sum_p", "gap_p"]
            if "cross_entropy_to_target" in request.stats:
                names += ["student_p"]
        if "kl" in request.stats and not is_teacher(self.t):
            names += ["max_z", "sum_z", "gap_z"]
        return (*names, *label_names(request))

    def fill(self, chunk: Chunk, columns: Columns) -> None:
        s, z, work = chunk.buffers
        load(chunk.student, s)
        if "label_s" in columns:
            pick(s, chunk.index, columns["label_s"])
        if "max_z" in columns:
            load(chunk.teacher, z)
            exponentials(z, columns["max_z"], columns["sum_z"], out=work)
            torch.sum(z.sub_(s).mul_(work), -1, out=columns["gap_z"])
        if self.t is not None:
            load(chunk.teacher, z)
            i = _target(s, z, self.t, work)
            exponentials(i, columns["max_p"], columns["sum_p"], out=work)
            if "gap_p" in columns:
                torch.sum(z.sub_(s).mul_(work), -1, out=columns["gap_p"])
            if "student_p" in columns:
                torch.sum(work.mul_(s), -1, out=columns["student_p"])
        exponentials(s, columns["max_s"], columns["sum_s"], out=s)

    def values(self, merged: Columns, request: Request) -> Columns:
        values = {}
        if self.t is not None:
            gap = self.t * (merged["gap_p"] / merged["sum_p"])
            values["objective"] = gap + log_ratio(merged, "p")
        if "student_p" in merged:
            values["cross_entropy_to_target"] = cross_entropy_to_target(merged)
        if "max_z" in merged:
            values["kl"] = merged["gap_z"] / merged["sum_z"] + log_ratio(merged, "z")
        elif is_teacher(self.t):
            values["kl"] = values["objective"]
        return values

    def saved(self) -> tuple[str, ...]:
        return ("max_s", "sum_s") if self.t is None else ("max_s", "sum_s", "max_p", "sum_p")

    def coefficients(self, merged: Columns, divergence: Tensor, surprise: Tensor) -> list[Tensor]:
        columns = [merged["max_s"], (divergence + surprise) / merged["sum_s"]]
        if self.t is not None:
            columns += [merged["max_p"], divergence / merged["sum_p"]]
        return columns

    def gradient(self, chunk: Chunk, rows: Tensor, out: Tensor) -> None:
        s, z, work = chunk.buffers
        load(chunk.student, s)
        if self.t is None:
            torch.mul(exp_of_difference(s, rows[:, 0:1], out=s), rows[:, 1:2], out=out)
            return
        load(chunk.teacher, z)
        i = _target(s, z, self.t, work)
        p = exp_of_difference(i, rows[:, 2:3], out=work).mul_(rows[:, 3:4])
        q = exp_of_difference(s, rows[:, 0:1], out=s).mul_(rows[:, 1:2])
        # Not one addcmul: its fused rounding would leave a residue where q and p are equal.
        torch.sub(q, p, out=out)


class Reverse(Form):
    """KL(q || p) = gap_s / sum_s + (m_p - m_s) + log sum_p - log sum_s, gap_s = sum q-part (s - z).

    Gradient: g q (s - z - gap_s / sum_s).
    """

    def names(self, request: Request) -> tuple[str, ...]:
        return ("max_s", "sum_s", "gap_s", *teacher_names(request), *label_names(request))

    def fill(self, chunk: Chunk, columns: Columns) -> None:
        s, z, work = chunk.buffers
        fill_teacher(chunk, columns)
        exponentials(s, columns["max_s"], columns["sum_s"], out=work)
        load(chunk.teacher, z)
        torch.sum(s.sub_(z).mul_(work), -1, out=columns["gap_s"])

    def values(self, merged: Columns, request: Request) -> Columns:
        values = teacher_values(merged)
        values["objective"] = merged["gap_s"] / merged["sum_s"] - log_ratio(merged, "p")
        return values

    def saved(self) -> tuple[str, ...]:
        return ("max_s", "sum_s", "gap_s")

    def coefficients(self, merged: Columns, divergence: Tensor, surprise: Tensor) -> list[Tensor]:
        scale = divergence / merged["sum_s"]
        mean_gap = merged["gap_s"] / merged["sum_s"]
        return [merged["max_s"], scale, surprise / merged["sum_s"] - scale * mean_gap]

    def gradient(self, chunk: Chunk, rows: Tensor, out: Tensor) -> None:
        s, z, work = chunk.buffers
        load(chunk.student, s)
        load(chunk.teacher, z)
        torch.sub(s, z, out=z).mul_(rows[:, 1:2]).add_(rows[:, 2:3])
        torch.mul(exp_of_difference(s, rows[:, 0:1], out=work), z, out=out)


class Decoupled(Form):
    """dkd: the KL of (label, anything else) and the KL among everything else, at a temperature.

    The label's column takes no part in the sums, so that the mass of everything else is never a
    difference of two numbers near 1; its logits travel on their own.
    """

    plain = False

    def __init__(self, alpha: float, beta: float, temperature: float) -> None:
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def names(self, request: Request) -> tuple[str, ...]:
        return ("max_s", "sum_s", "max_p", "sum_p", "gap_p", "label_s", "label_p")

    def fill(self, chunk: Chunk, columns: Columns) -> None:
        s, z, work = chunk.buffers
        self._load_others(chunk, columns)
        exponentials(z, columns["max_p"], columns["sum_p"], out=work)
        torch.sum(z.sub_(s).mul_(work), -1, out=columns["gap_p"])
        exponentials(s, columns["max_s"], columns["sum_s"], out=s)

    def _load_others(self, chunk: Chunk, columns: Columns | None = None) -> None:
        """Both models' logits over the temperature, the label's column out of the way."""
        for source, x, name in (
            (chunk.student, chunk.buffers[0], "label_s"),
            (chunk.teacher, chunk.buffers[1], "label_p"),
        ):
            load(source, x, 1.0 / self.temperature)
            if columns is not None:
                pick(x, chunk.index, columns[name])
            _overwrite(x, chunk.index, FLOOR)

    def values(self, merged: Columns, request: Request) -> Columns:
        _, _, log_q, log_p = self._two_way(merged)
        two_way = (log_p.exp() * (log_p - log_q)).sum(0)
        others = merged["gap_p"] / merged["sum_p"] + log_ratio(merged, "p")
        value = self.temperature**2 * (self.alpha * two_way + self.beta * others)
        assert request.labels is not None
        return {"objective": value.masked_fill_(request.labels < 0, 0.0)}

    def _two_way(self, merged: Columns) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Label against the rest: q and p of the label [*], their log-distributions [2, *]."""
        odds_s = (merged["label_s"] - merged["max_s"]) - merged["sum_s"].log()
        odds_p = (merged["label_p"] - merged["max_p"]) - merged["sum_p"].log()
        logs = [
            torch.stack([torch.nn.functional.logsigmoid(sign * odds) for sign in (1, -1)])
            for odds in (odds_s, odds_p)
        ]
        return odds_s.sigmoid(), odds_p.sigmoid(), logs[0], logs[1]

    def saved(self) -> tuple[str, ...]:
        return ("max_s", "sum_s", "max_p", "sum_p", "label_s", "label_p")

    def coefficients(self, merged: Columns, divergence: Tensor, surprise: Tensor) -> list[Tensor]:
        q, p, *_ = self._two_way(merged)
        # A token without a label: its logit is -inf, its loss 0.
        lost = merged["label_s"].isneginf()
        scale = (divergence * self.temperature).masked_fill(lost, 0.0)
        label = (scale * self.alpha * (q - p)).masked_fill(lost, 0.0)
        return [
            merged["max_s"],
            (scale * self.beta - label) / merged["sum_s"],
            merged["max_p"],
            scale * self.beta / merged["sum_p"],
            label,
        ]

    def gradient(self, chunk: Chunk, rows: Tensor, out: Tensor) -> None:
        s, z, work = chunk.buffers
        self._load_others(chunk)
        p = exp_of_difference(z, rows[:, 2:3], out=z).mul_(rows[:, 3:4])
        q = exp_of_difference(s, rows[:, 0:1], out=s).mul_(rows[:, 1:2])
        torch.sub(q, p, out=out)
        _overwrite(out, chunk.index, rows[:, 4:5])


class Tempered(Form):
    """ctkd: T^2 KL(p || q) at temperature T = 1 / u, with its exact gradient in T.

    With K the KL (or, official, the cross-entropy) at u, and x = z - s (or -s):

        dL/dT = 2 T K - dK/du      dK/du = E_q[s] - E_p[s] + u Cov_p(z, x)

    The covariance comes from moments about the maximum. T^2 K has a limit for large T, so that its
    derivative is a small difference of large terms: the sums over the row are taken in float64.
    """

    plain = False
    extra_stats = ("temperature_gradient",)
    wide = True

    def __init__(self, temperature: Tensor, variant: str) -> None:
        self.parameter = temperature
        # 0-d, so that fp32 logits stay fp32 beside it
        self.temperature = temperature.detach().to(torch.float64, copy=True).reshape(())
        self.official = variant == "official"

    def names(self, request: Request) -> tuple[str, ...]:
        names = ("max_s", "sum_s", "level_s", "max_p", "sum_p", "gap_p", "level_p", "cross_p")
        return (*names, "square_p") if self.official else names

    def fill(self, chunk: Chunk, columns: Columns) -> None:
        s, z, work = chunk.buffers
        u = self.temperature.reciprocal()
        load(chunk.student, s, u)
        load(chunk.teacher, z, u)
        top = z.amax(-1, keepdim=True)
        exp_of_difference(z, top, out=work)
        columns["max_p"].copy_(top.squeeze(-1))
        _wide_sum(work, columns["sum_p"])
        _wide_sum(torch.sub(z, s, out=s).mul_(work), columns["gap_p"])
        z.sub_(top)
        _wide_sum(s.mul_(z), columns["cross_p"])
        _wide_sum(work.mul_(z), columns["level_p"])
        if "square_p" in columns:
            _wide_sum(work.mul_(z), columns["square_p"])
        load(chunk.student, s, u)
        top = s.amax(-1, keepdim=True)
        exp_of_difference(s, top, out=work)
        columns["max_s"].copy_(top.squeeze(-1))
        _wide_sum(work, columns["sum_s"])
        _wide_sum(s.sub_(top).mul_(work), columns["level_s"])

    def values(self, merged: Columns, request: Request) -> Columns:
        temperature = self.temperature.to(merged["sum_s"].dtype)
        gap = merged["gap_p"] / merged["sum_p"]
        level_p = merged["level_p"] / merged["sum_p"]
        level_s = merged["level_s"] / merged["sum_s"]
        # u E_q[s] - u E_p[s]; both levels are about their own maxima
        drift = (level_s + merged["max_s"]) - (level_p + merged["max_p"]) + gap
        spread = merged["cross_p"] / merged["sum_p"] - level_p * gap
        divergence = gap + log_ratio(merged, "p")
        if self.official:
            mean_s = (level_p + merged["max_p"]) - gap
            divergence = (merged["max_s"] - mean_s) + merged["sum_s"].log()
            # Cov(z, -s) = Cov(z, z - s) - Var(z)
            spread = spread - (merged["square_p"] / merged["sum_p"] - level_p.square())
        # every sum above is in u z and u s, hence one factor T each: dK/du = T (drift + spread)
        slope = temperature * (2 * divergence - (drift + spread))
        merged["slope"] = slope
        return {"objective": temperature**2 * divergence, "temperature_gradient": slope}

    def saved(self) -> tuple[str, ...]:
        return ("max_s", "sum_s", "max_p", "sum_p", "slope")

    def coefficients(self, merged: Columns, divergence: Tensor, surprise: Tensor) -> list[Tensor]:
        scale = divergence * self.temperature.to(divergence.dtype)
        return [merged["max_s"], scale / merged["sum_s"], merged["max_p"], scale / merged["sum_p"]]

    def gradient(self, chunk: Chunk, rows: Tensor, out: Tensor) -> None:
        s, z, _ = chunk.buffers
        u = self.temperature.reciprocal()
        load(chunk.student, s, u)
        load(chunk.teacher, z, u)
        p = exp_of_difference(z, rows[:, 2:3], out=z).mul_(rows[:, 3:4])
        q = exp_of_difference(s, rows[:, 0:1], out=s).mul_(rows[:, 1:2])
        torch.sub(q, p, out=out)


# ---- parts that several share --------------------------------------------------------------------


def label_names(request: Request) -> tuple[str, ...]:
    """The label's logit, where labels were given."""
    return () if request.labels is None else ("label_s",)


def teacher_names(request: Request) -> tuple[str, ...]:
    """The teacher's normaliser, and what the asked statistics need besides."""
    names = ["max_p", "sum_p"]
    if "kl" in request.stats:
        names += ["gap_p"]
    if "cross_entropy_to_target" in request.stats:
        names += ["student_p"]
    return tuple(names)


def fill_teacher(chunk: Chunk, columns: Columns) -> None:
    """The label's logit and `teacher_names`; leaves the student's logits in the first buffer."""
    s, z, work = chunk.buffers[:3]
    load(chunk.student, s)
    if "label_s" in columns:
        pick(s, chunk.index, columns["label_s"])
    load(chunk.teacher, z)
    exponentials(z, columns["max_p"], columns["sum_p"], out=work)
    if "gap_p" in columns:
        torch.sum(z.sub_(s).mul_(work), -1, out=columns["gap_p"])
    if "student_p" in columns:
        torch.sum(work.mul_(s), -1, out=columns["student_p"])


def teacher_values(merged: Columns) -> Columns:
    """The statistics that `teacher_names` gathered."""
    values = {}
    if "gap_p" in merged:
        values["kl"] = merged["gap_p"] / merged["sum_p"] + log_ratio(merged, "p")
    if "student_p" in merged:
        values["cross_entropy_to_target"] = cross_entropy_to_target(merged)
    return values


def log_ratio(merged: Columns, target: str) -> Tensor:
    """Log-normaliser of the student less that of the target, [*]."""
    tops = merged["max_s"] - merged[f"max_{target}"]
    return tops + (merged["sum_s"].log() - merged[f"sum_{target}"].log())


def cross_entropy_to_target(merged: Columns) -> Tensor:
    """-sum p log q, [*]."""
    mean = merged["student_p"] / merged["sum_p"]
    return (merged["max_s"] - mean) + merged["sum_s"].log()


def pick(x: Tensor, index: Tensor, out: Tensor) -> None:
    """out = the label's logit, -inf where another rank has it."""
    found = x.gather(1, index.clamp(min=0))
    out.copy_(found.masked_fill_(index < 0, -torch.inf).squeeze(1))


def is_teacher(t: Interpolation) -> bool:
    """Whether the target is known, without a look at the device, to be the teacher itself."""
    return isinstance(t, float) and t == 1.0


def _target(s: Tensor, z: Tensor, t: float | Tensor, work: Tensor) -> Tensor:
    """The target's logits (1 - t) s + t z: in `work`, or z itself at t = 1."""
    if is_teacher(t):
        return z
    return torch.lerp(s, z, t.to(s.dtype) if isinstance(t, Tensor) else t, out=work)


def _wide_sum(x: Tensor, out: Tensor) -> None:
    out.copy_(x.sum(-1, dtype=torch.float64))


def _overwrite(x: Tensor, index: Tensor, value: float | Tensor) -> None:
    """x[token, index] = value where this rank has the label."""
    column = index.clamp(min=0)
    kept = x.gather(1, column)
    new = value if isinstance(value, Tensor) else torch.full_like(kept, value)
    x.scatter_(1, column, torch.where(index >= 0, new, kept))

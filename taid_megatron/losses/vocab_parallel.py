"""KL(p_t || q) and cross-entropy on vocabulary shards: one collective forward, none backward.

Legend
    s, z, i     student logits, teacher logits, the target's logits i = (1 - t) s + t z
    q, p        softmax(s), softmax(i)
    [T, V]      tokens of one chunk x the rank's real (not padding) vocabulary columns
    [*]         the logits' shape without the last axis: one number per token
    [K, *]      the K packed statistics of every token, [R, K, *] those of all R ranks

Forward, per token and shard, with maxima m and sums S taken separately for s and i:

    S_s = sum e^(s - m_s)     S_i = sum e^(i - m_i)     A = sum e^(i - m_i) (z - s)

One all-gather carries them; every rank merges them in rank order by rescaling to the global maxima,
so that all ranks hold the same bits:

    KL(p || q) = t A / S_i + (m_s - m_i) + log S_s - log S_i

m and log S stay apart: their sum, the log-sum-exp, would round away what the difference needs. The
logit of the label, and the sums of whatever else is asked for, travel in the same all-gather.

Backward, per element and local:  g (e^(s - m_s) / S_s - e^(i - m_i) / S_i).

Both directions walk over chunks of tokens in three fp32 buffers that stay in cache, so each reads
the logits of both models once, and nothing of the logits' size is allocated beside the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# t, and None where there is no divergence at all.
Interpolation = float | Tensor | None

STATS = ("objective", "cross_entropy_to_target", "kl", "cross_entropy")

_LOG2_E = 1.0 / math.log(2.0)

# Stands for -inf (a masked column), so that z - s and 0 * s stay finite. A sum of 10^8 of them
# still fits in fp32.
_FLOOR = -1e30

# Bytes of one of the three buffers. CPU: the fastest of 0.125 to 8 MiB with 1 MiB of L2 per core.
# Elsewhere a chunk must be large enough to hide the launches of some twenty kernels.
_CHUNK_BYTES = {"cpu": 2 << 20}
_CHUNK_BYTES_ELSEWHERE = 64 << 20

# What is rescaled together when the shards' maxima are merged.
_SUMS_OF = {
    "max_s": ("sum_s",),
    "max_p": ("sum_p", "gap_p", "student_p"),
    "max_z": ("sum_z", "gap_z"),
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a caller wants besides the loss itself; checked by `distillation_loss`.

    Attributes:
        labels: global vocabulary ids [*]; negative ids are ignored.
        group: the ranks that share the vocabulary; None for whole rows.
        ce_weight: share of the cross-entropy in the total.
        inplace: let the backward write the gradient over the student's logits.
        stats: names from STATS to return beside the loss.
        padding: trailing local columns that belong to no token.
        vocab_offset: global id of the first local column; None for rank * local width.
        chunk_tokens: tokens per chunk; None for what fits the cache.
    """

    labels: Tensor | None = None
    group: dist.ProcessGroup | None = None
    ce_weight: float = 0.0
    inplace: bool = False
    stats: tuple[str, ...] = ()
    padding: int = 0
    vocab_offset: int | None = None
    chunk_tokens: int | None = None

    def first_id(self, width: int) -> int:
        """Global vocabulary id of the first of `width` local columns."""
        if self.vocab_offset is not None:
            return self.vocab_offset
        return 0 if self.group is None else self.group.rank() * width


def taid(
    student: Tensor, teacher: Tensor, request: Request, *, t: float | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """KL(p_t || q) per token and the asked statistics. [*, V] x 2 -> [*], nats. TAID, eq. 2.

    t is a float, or a 0-d tensor on the logits' accelerator, which is then not synchronised with.
    """
    return _run(student, teacher, t, request)


def forward_kl(
    student: Tensor, teacher: Tensor, request: Request
) -> tuple[Tensor, dict[str, Tensor]]:
    """KL(teacher || student) per token and the asked statistics. [*, V] x 2 -> [*], nats."""
    return _run(student, teacher, 1.0, request)


def cross_entropy(
    student: Tensor, teacher: Tensor | None, request: Request
) -> tuple[Tensor, dict[str, Tensor]]:
    """-log q(label) per token and the asked statistics. [*, V] -> [*], nats.

    The teacher is read only where the statistic `kl` is asked for.
    """
    return _run(student, teacher, None, request)


def _run(
    student: Tensor, teacher: Tensor | None, t: Interpolation, request: Request
) -> tuple[Tensor, dict[str, Tensor]]:
    # Detached here, the teacher and t can neither ask for a gradient nor make the loss ask for one.
    teacher = None if teacher is None else teacher.detach()
    if isinstance(t, Tensor):
        # A copy: whoever owns t may change it before the backward.
        t = t.detach().to(_compute_dtype(student, teacher), copy=True)
    loss, *stats = _InterpolatedKL.apply(student, teacher, t, request)
    return loss, dict(zip(request.stats, stats, strict=True))


class _InterpolatedKL(torch.autograd.Function):
    """(1 - w) KL(p_t || q) + w CE, w the request's ce_weight; t = None is the cross-entropy alone.

    Returns the loss [*] and then the request's statistics [*], which carry no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        t: Interpolation,
        request: Request,
    ) -> tuple[Tensor, ...]:
        names = _packed_names(t, request)
        packed = _local_statistics(student, teacher, t, request, names)
        merged = _merge(_gather(packed, request.group), names)
        values = _values(merged, t, request)
        loss = _total(values, t, request.ce_weight)
        # Clones: autograd wants every output to be a tensor of its own.
        stats = tuple(values[name].clone() for name in request.stats)
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        if ctx.needs_input_grad[0]:
            used = ("max_s", "sum_s") if t is None else ("max_s", "sum_s", "max_p", "sum_p")
            normalisers = torch.stack([merged[name] for name in used])
            ctx.save_for_backward(student, teacher, normalisers, request.labels)
            ctx.t, ctx.request, ctx.overwritten = t, request, False
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_stats: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return None, None, None, None
        if ctx.overwritten:
            raise RuntimeError(
                "distillation_loss(inplace=True): the first backward has overwritten the student "
                "logits with their gradient; a second backward needs inplace=False"
            )
        # The labels are saved for autograd to notice a change; they are read from the request.
        student, teacher, normalisers, _ = ctx.saved_tensors
        ctx.overwritten = ctx.request.inplace
        coefficients = _coefficients(grad_loss, normalisers, ctx.t, ctx.request)
        return _gradient(student, teacher, coefficients, ctx.t, ctx.request), None, None, None


# ---- forward -------------------------------------------------------------------------------------


def _packed_names(t: Interpolation, request: Request) -> tuple[str, ...]:
    """The statistics that have to travel, in the order of the packed tensor's first axis."""
    names = ["max_s", "sum_s"]
    if t is not None:
        names += ["max_p", "sum_p", "gap_p"]
        if "cross_entropy_to_target" in request.stats:
            names += ["student_p"]
    if "kl" in request.stats and not _is_teacher(t):
        names += ["max_z", "sum_z", "gap_z"]
    if request.labels is not None:
        names += ["label_s"]
    return tuple(names)


def _local_statistics(
    student: Tensor,
    teacher: Tensor | None,
    t: Interpolation,
    request: Request,
    names: tuple[str, ...],
) -> Tensor:
    """One pass over this rank's shard. [*, V] x 2 -> [K, *]."""
    width = student.shape[-1] - request.padding
    dtype = _compute_dtype(student, teacher)
    packed = torch.zeros(len(names), *student.shape[:-1], dtype=dtype, device=student.device)
    for name, column in zip(names, packed.unbind(), strict=True):
        # What a shard without real columns contributes; all others overwrite it.
        if name in _SUMS_OF:
            column.fill_(_FLOOR)
        elif name == "label_s":
            column.fill_(-torch.inf)
    tensors = (
        student[..., :width],
        (student if teacher is None else teacher)[..., :width],
        _local_labels(student, request),
        packed.movedim(0, -1),
    )
    for (s, z, index, rows), scratch in _chunks(tensors, dtype, request.chunk_tokens):
        columns = dict(zip(names, rows.unbind(-1), strict=True))
        _chunk_statistics(s, z, t, index, columns, scratch)
    return packed


def _chunk_statistics(
    student: Tensor,
    teacher: Tensor,
    t: Interpolation,
    index: Tensor,
    columns: dict[str, Tensor],
    scratch: tuple[Tensor, ...],
) -> None:
    """Fill `columns` [T] from one chunk. [T, V] x 2; index [T, 1] is the local label or -1."""
    s, z, work = scratch
    _load(student, s)
    if "label_s" in columns:
        picked = s.gather(1, index.clamp(min=0))
        columns["label_s"].copy_(picked.masked_fill_(index < 0, -torch.inf).squeeze(1))
    if "max_z" in columns:
        _load(teacher, z)
        _exponentials(z, columns["max_z"], columns["sum_z"], out=work)
        torch.sum(z.sub_(s).mul_(work), -1, out=columns["gap_z"])
    if t is not None:
        _load(teacher, z)
        _exponentials(_target(s, z, t, work), columns["max_p"], columns["sum_p"], out=work)
        torch.sum(z.sub_(s).mul_(work), -1, out=columns["gap_p"])
        if "student_p" in columns:
            torch.sum(work.mul_(s), -1, out=columns["student_p"])
    _exponentials(s, columns["max_s"], columns["sum_s"], out=s)


def _exponentials(x: Tensor, top: Tensor, total: Tensor, *, out: Tensor) -> None:
    """top = max x, out = e^(x - top), total = sum out, over the last axis; `out` may be `x`."""
    torch.amax(x, -1, out=top)
    _exp_of_difference(x, top.unsqueeze(-1), out=out)
    torch.sum(out, -1, out=total)


def _exp_of_difference(x: Tensor, top: Tensor, *, out: Tensor) -> Tensor:
    """out = e^(x - top); `out` may be `x`.

    As a power of two: torch's exp takes three times exp2's time on CPUs (0.85 and 0.28 ns an
    element), and exp was half of the loss. Scaling after the subtraction keeps the error at the
    subtraction's own.
    """
    return torch.sub(x, top, out=out).mul_(_LOG2_E).exp2_()


def _gather(packed: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The packed statistics of every rank, in rank order. [K, *] -> [R, K, *]. The collective."""
    if group is None or group.size() == 1:
        return packed.unsqueeze(0)
    parts = packed.new_empty(group.size(), *packed.shape)
    dist.all_gather_into_tensor(parts.view(-1), packed.view(-1), group=group)
    return parts


def _merge(parts: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Statistics of the whole rows. [R, K, *] -> {name: [*]}."""
    column = dict(zip(names, parts.unbind(1), strict=True))
    merged = {}
    for top, sums in _SUMS_OF.items():
        if top not in column:
            continue
        merged[top] = column[top].amax(0)
        rescale = (column[top] - merged[top]).exp()
        for name in sums:
            if name in column:
                merged[name] = (column[name] * rescale).sum(0)
    if "label_s" in column:
        # -inf on every rank but the label's own.
        merged["label_s"] = column["label_s"].amax(0)
    return merged


def _values(merged: dict[str, Tensor], t: Interpolation, request: Request) -> dict[str, Tensor]:
    """Per-token objective and statistics [*] from the statistics of the whole rows."""
    values = {}
    max_s, log_sum_s = merged["max_s"], merged["sum_s"].log()
    if request.labels is not None:
        _refuse_lost_labels(request.labels, merged["label_s"])
        surprise = (max_s - merged["label_s"]) + log_sum_s
        values["cross_entropy"] = surprise.masked_fill_(request.labels < 0, 0.0)
    if t is None:
        values["objective"] = values["cross_entropy_to_target"] = values["cross_entropy"]
    else:
        gap = t * (merged["gap_p"] / merged["sum_p"])
        log_ratio = (max_s - merged["max_p"]) + (log_sum_s - merged["sum_p"].log())
        values["objective"] = gap + log_ratio
    if "student_p" in merged:
        mean = merged["student_p"] / merged["sum_p"]
        values["cross_entropy_to_target"] = (max_s - mean) + log_sum_s
    if "max_z" in merged:
        log_ratio = (max_s - merged["max_z"]) + (log_sum_s - merged["sum_z"].log())
        values["kl"] = merged["gap_z"] / merged["sum_z"] + log_ratio
    elif _is_teacher(t):
        values["kl"] = values["objective"]
    return values


def _total(values: dict[str, Tensor], t: Interpolation, ce_weight: float) -> Tensor:
    """The weighted sum of objective and cross-entropy [*]."""
    if t is None or ce_weight == 0.0:
        return values["objective"]
    return (1.0 - ce_weight) * values["objective"] + ce_weight * values["cross_entropy"]


def _refuse_lost_labels(labels: Tensor, label_logits: Tensor) -> None:
    """Raise where no rank had the label: on every rank alike, since all hold the merged values.

    On an accelerator the look would cost a synchronisation: there the cross-entropy is +inf.
    """
    if labels.device.type != "cpu":
        return
    lost = (labels >= 0) & label_logits.isneginf()
    if lost.any():
        raise ValueError(
            f"label {labels[lost][0].item()} is in no rank's real columns ({int(lost.sum())} such "
            "tokens): it lies beyond the vocabulary or in its padding, or vocab_offset is wrong"
        )


# ---- backward ------------------------------------------------------------------------------------


def _coefficients(
    grad_loss: Tensor, normalisers: Tensor, t: Interpolation, request: Request
) -> Tensor:
    """Per token: max_s, scale of e^(s - max_s), addend at the label[, max_p, scale of the target].

    [*], [2 or 4, *] -> [*, 3 or 5].
    """
    weight = 1.0 if t is None else request.ce_weight
    surprise = grad_loss * weight
    if request.labels is not None:
        surprise.masked_fill_(request.labels < 0, 0.0)
    divergence = grad_loss * (1.0 - weight)
    columns = [normalisers[0], (divergence + surprise) / normalisers[1], -surprise]
    if t is not None:
        columns += [normalisers[2], divergence / normalisers[3]]
    return torch.stack(columns, -1)


def _gradient(
    student: Tensor,
    teacher: Tensor | None,
    coefficients: Tensor,
    t: Interpolation,
    request: Request,
) -> Tensor:
    """Gradient of the loss in the student's logits [*, V]: their own storage if inplace."""
    width = student.shape[-1] - request.padding
    grad = student.detach() if request.inplace else torch.empty_like(student)
    grad[..., width:].zero_()
    tensors = (
        student[..., :width],
        (student if teacher is None else teacher)[..., :width],
        grad[..., :width],
        _local_labels(student, request),
        coefficients,
    )
    mixes_labels = request.labels is not None and (t is None or request.ce_weight > 0)
    dtype = coefficients.dtype
    for (s, z, out, index, rows), scratch in _chunks(tensors, dtype, request.chunk_tokens):
        result = out if out.dtype == dtype else scratch[2]
        _chunk_gradient(s, z, t, rows, scratch, out=result)
        if mixes_labels:
            result.scatter_add_(1, index.clamp(min=0), rows[:, 2:3].masked_fill(index < 0, 0.0))
        if result is not out:
            out.copy_(result)
    return grad


def _chunk_gradient(
    student: Tensor,
    teacher: Tensor,
    t: Interpolation,
    rows: Tensor,
    scratch: tuple[Tensor, ...],
    *,
    out: Tensor,
) -> None:
    """out = scaled q - scaled p of one chunk, without the label's addend. [T, V]; rows [T, 3 or 5].

    `out` may share the student's storage.
    """
    s, z, work = scratch
    max_s, scale_s = rows[:, 0:1], rows[:, 1:2]
    _load(student, s)
    if t is None:
        torch.mul(_exp_of_difference(s, max_s, out=s), scale_s, out=out)
        return
    _load(teacher, z)
    p = _exp_of_difference(_target(s, z, t, work), rows[:, 3:4], out=work).mul_(rows[:, 4:5])
    q = _exp_of_difference(s, max_s, out=s).mul_(scale_s)
    # Not one addcmul: its fused rounding would leave a residue where q and p are equal.
    torch.sub(q, p, out=out)


# ---- shared --------------------------------------------------------------------------------------


def _chunks(
    tensors: Sequence[Tensor], dtype: torch.dtype, chunk_tokens: int | None
) -> Iterator[tuple[list[Tensor], tuple[Tensor, ...]]]:
    """Walk over the tokens of [*, width of its own] tensors: their [T, ...] views, three buffers.

    The first tensor's last axis gives the buffers' width V. Buffers are [T, V], reused by the next
    chunk.
    """
    first = tensors[0]
    if first.numel() == 0:
        return
    width = first.shape[-1]
    tokens = first.numel() // width
    if chunk_tokens is None:
        budget = _CHUNK_BYTES.get(first.device.type, _CHUNK_BYTES_ELSEWHERE)
        chunk_tokens = max(1, budget // (width * dtype.itemsize))
    buffers = torch.empty(3, min(tokens, chunk_tokens), width, dtype=dtype, device=first.device)
    for rows in _rows(tensors):
        for start in range(0, rows[0].shape[0], chunk_tokens):
            chunk = [x[start : start + chunk_tokens] for x in rows]
            yield chunk, buffers[:, : chunk[0].shape[0]].unbind()


def _rows(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Views [T, ...] that together cover [*, ...] tensors, whatever their strides; never a copy."""
    leading = tensors[0].shape[:-1]
    try:
        flat = [x.view(leading.numel(), x.shape[-1]) for x in tensors]
    except RuntimeError:
        # The leading axes of some tensor do not merge into one (a transposed view).
        axis = min(range(len(leading)), key=leading.__getitem__)
        for parts in zip(*(x.unbind(axis) for x in tensors), strict=True):
            yield from _rows(parts)
    else:
        yield flat


def _load(source: Tensor, out: Tensor) -> None:
    """Copy logits into a buffer of the computing type, -inf made finite."""
    if source.dtype == out.dtype:
        torch.clamp_min(source, _FLOOR, out=out)
    else:
        out.copy_(source).clamp_min_(_FLOOR)


def _target(s: Tensor, z: Tensor, t: float | Tensor, work: Tensor) -> Tensor:
    """The target's logits (1 - t) s + t z: in `work`, or z itself at t = 1."""
    return z if _is_teacher(t) else torch.lerp(s, z, t, out=work)


def _is_teacher(t: Interpolation) -> bool:
    """Whether the target is known, without a look at the device, to be the teacher itself."""
    return isinstance(t, float) and t == 1.0


def _local_labels(student: Tensor, request: Request) -> Tensor:
    """Column of each token's label in this shard, -1 where another rank has it. [*, 1], int64."""
    if request.labels is None:
        return torch.full((*student.shape[:-1], 1), -1, device=student.device)
    width = student.shape[-1]
    local = request.labels.long() - request.first_id(width)
    here = (local >= 0) & (local < width - request.padding)
    return torch.where(here, local, -1).unsqueeze(-1)


def _compute_dtype(student: Tensor, teacher: Tensor | None) -> torch.dtype:
    """float64 if an input is, else float32."""
    kinds = {student.dtype} if teacher is None else {student.dtype, teacher.dtype}
    return torch.float64 if torch.float64 in kinds else torch.float32

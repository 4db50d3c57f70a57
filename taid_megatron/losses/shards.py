"""What the losses on vocabulary shards share: the request, the walk in chunks, the collectives.

Legend
    s, z        student logits, teacher logits
    [T, V]      tokens of one chunk x the rank's real (not padding) vocabulary columns
    [*]         the logits' shape without the last axis: one number per token
    [K, *]      the K packed statistics of every token, [R, K, *] those of all R ranks

A statistic is a number per token that each rank computes from its own columns. Sums of exponentials
are taken relative to the rank's own maximum; where ranks meet they are rescaled to the maximum over
all of them. A maximum m and the logarithm of its sum S stay apart: their sum, the log-sum-exp,
would round away what a difference of two needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

STATS = ("objective", "cross_entropy_to_target", "kl", "cross_entropy")

Collective = Literal["gather", "all_reduce"]

# Stands for -inf (a masked column), so that z - s and 0 * s stay finite. A sum of 10^8 of them
# still fits in fp32.
FLOOR = -1e30

_LOG2_E = 1.0 / math.log(2.0)

# Bytes of one of the buffers. CPU: the fastest of 0.125 to 8 MiB with 1 MiB of L2 per core.
# Elsewhere a chunk must be large enough to hide the launches of some twenty kernels.
_CHUNK_BYTES = {"cpu": 2 << 20}
_CHUNK_BYTES_ELSEWHERE = 64 << 20

# What is relative to which maximum.
_SUMS_OF = {
    "max_s": ("sum_s", "gap_s", "level_s"),
    "max_p": ("sum_p", "gap_p", "student_p", "level_p", "cross_p", "square_p"),
    "max_z": ("sum_z", "gap_z"),
}
# (x - m)-weighted sums also move with the maximum: name -> (its first moment, its second).
_MOMENTS = {
    "level_s": ("sum_s", None),
    "level_p": ("sum_p", None),
    "cross_p": ("gap_p", None),
    "square_p": ("level_p", "sum_p"),
}
# e^-200 is 0 in fp32 and invisible in float64; its square must not overflow.
_FARTHEST = -200.0

Columns = dict[str, Tensor]
"""Statistics by name, [T] or [*] each."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a caller wants besides the loss itself; checked by `distillation_loss`.

    Attributes:
        labels: global vocabulary ids [*]; negative ids are ignored.
        group: the ranks that share the vocabulary; None for whole rows.
        ce_weight: share of the cross-entropy in the total.
        inplace: let the backward write the gradient over the student's logits.
        stats: names of what to return beside the loss.
        padding: trailing local columns that belong to no token.
        vocab_offset: global id of the first local column; None for rank * local width.
        chunk_tokens: tokens per chunk; None for what fits the cache.
        collective: one all-gather of the statistics, or an all-reduce of the maxima and one of the
            sums.
        check_finite: raise ValueError where logits are NaN or +inf.
    """

    labels: Tensor | None = None
    group: dist.ProcessGroup | None = None
    ce_weight: float = 0.0
    inplace: bool = False
    stats: tuple[str, ...] = ()
    padding: int = 0
    vocab_offset: int | None = None
    chunk_tokens: int | None = None
    collective: Collective = "gather"
    check_finite: bool = False

    @property
    def num_ranks(self) -> int:
        """Ranks that share the vocabulary."""
        return 1 if self.group is None else self.group.size()

    def first_id(self, width: int) -> int:
        """Global vocabulary id of the first of `width` local columns."""
        if self.vocab_offset is not None:
            return self.vocab_offset
        return 0 if self.group is None else self.group.rank() * width


# ---- the walk over tokens ------------------------------------------------------------------------


@dataclass
class Chunk:
    """Some tokens' logits and the buffers to work in; the next chunk reuses them.

    Attributes:
        student, teacher: [T, V] views of the logits, in their own dtype.
        index: [T, 1] local column of each label, -1 where another rank has it.
        buffers: [T, V] each, in the computing dtype, contents undefined.
    """

    student: Tensor
    teacher: Tensor
    index: Tensor
    buffers: tuple[Tensor, ...]


def chunks(
    tensors: Sequence[Tensor], dtype: torch.dtype, chunk_tokens: int | None, num_buffers: int = 3
) -> Iterator[tuple[list[Tensor], tuple[Tensor, ...]]]:
    """Walk over the tokens of [*, width of its own] tensors: their [T, ...] views, the buffers.

    The first tensor's last axis gives the buffers' width V.
    """
    first = tensors[0]
    if first.numel() == 0:
        return
    width = first.shape[-1]
    tokens = first.numel() // width
    if chunk_tokens is None:
        budget = _CHUNK_BYTES.get(first.device.type, _CHUNK_BYTES_ELSEWHERE)
        chunk_tokens = max(1, budget // (width * dtype.itemsize))
    size = (num_buffers, min(tokens, chunk_tokens), width)
    buffers = torch.empty(size, dtype=dtype, device=first.device)
    for views in rows(tensors):
        for start in range(0, views[0].shape[0], chunk_tokens):
            chunk = [x[start : start + chunk_tokens] for x in views]
            yield chunk, buffers[:, : chunk[0].shape[0]].unbind()


def rows(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Views [T, ...] that together cover [*, ...] tensors, whatever their strides; never a copy."""
    leading = tensors[0].shape[:-1]
    try:
        flat = [x.view(leading.numel(), x.shape[-1]) for x in tensors]
    except RuntimeError:
        # The leading axes of some tensor do not merge into one (a transposed view).
        axis = min(range(len(leading)), key=leading.__getitem__)
        for parts in zip(*(x.unbind(axis) for x in tensors), strict=True):
            yield from rows(parts)
    else:
        yield flat


def local_labels(student: Tensor, request: Request) -> Tensor:
    """Column of each token's label in this shard, -1 where another rank has it. [*, 1], int64."""
    if request.labels is None:
        return torch.full((*student.shape[:-1], 1), -1, device=student.device)
    width = student.shape[-1]
    local = request.labels.long() - request.first_id(width)
    here = (local >= 0) & (local < width - request.padding)
    # Not torch.where: it copies its scalar to the device, and waits for that.
    return local.masked_fill_(~here, -1).unsqueeze(-1)


def compute_dtype(student: Tensor, teacher: Tensor | None) -> torch.dtype:
    """float64 if an input is, else float32."""
    kinds = {student.dtype} if teacher is None else {student.dtype, teacher.dtype}
    return torch.float64 if torch.float64 in kinds else torch.float32


# ---- arithmetic on a chunk -----------------------------------------------------------------------


def load(source: Tensor, out: Tensor, scale: float | Tensor = 1.0) -> None:
    """Copy logits into a buffer of the computing type, times `scale`, -inf made finite."""
    if source.dtype == out.dtype:
        torch.clamp_min(source, FLOOR, out=out)
    else:
        out.copy_(source).clamp_min_(FLOOR)
    if isinstance(scale, Tensor) or scale != 1.0:
        out.mul_(scale)


def exponentials(x: Tensor, top: Tensor, total: Tensor, *, out: Tensor) -> None:
    """top = max x, out = e^(x - top), total = sum out, over the last axis; `out` may be `x`."""
    torch.amax(x, -1, out=top)
    exp_of_difference(x, top.unsqueeze(-1), out=out)
    torch.sum(out, -1, out=total)


def exp_of_difference(x: Tensor, top: Tensor, *, out: Tensor) -> Tensor:
    """out = e^(x - top); `out` may be `x`.

    Scaling after the subtraction keeps the error at the subtraction's own.
    """
    return torch.sub(x, top, out=out).mul_(_LOG2_E).exp2_()


def exp(x: Tensor, *, out: Tensor) -> Tensor:
    """out = e^x, as a power of two; `out` may be `x`.

    torch's exp takes three times exp2's time on CPUs (0.85 and 0.28 ns an element), and exp was
    half of the loss.
    """
    return torch.mul(x, _LOG2_E, out=out).exp2_()


# ---- where ranks meet ----------------------------------------------------------------------------


def empty_statistics(names: Sequence[str], like: Tensor, dtype: torch.dtype) -> Tensor:
    """What a shard without real columns contributes, [K, *]; all others overwrite it."""
    packed = torch.zeros(len(names), *like.shape[:-1], dtype=dtype, device=like.device)
    for name, column in zip(names, packed.unbind(), strict=True):
        if name in _SUMS_OF:
            column.fill_(FLOOR)
        elif name.startswith("label_"):
            column.fill_(-torch.inf)
    return packed


def join(parts: Sequence[Columns], request: Request) -> list[Columns]:
    """Statistics of the whole rows from this rank's own, every rank the same bits.

    The only communication of the losses: one all-gather, merged in rank order, or an all-reduce of
    the maxima (where there are any) and one of the sums.
    """
    if request.num_ranks == 1:
        return [dict(part) for part in parts]
    keys = [(number, name) for number, part in enumerate(parts) for name in part]
    own = _packed(parts, keys)
    if request.collective == "gather":
        everyone = own.new_empty(request.num_ranks, *own.shape)
        dist.all_gather_into_tensor(everyone.view(-1), own.view(-1), group=request.group)
        joined = _by_part(len(parts), keys, everyone.unbind(1))
        return [_summed(part, {n: x.amax(0) for n, x in _maxima(part).items()}) for part in joined]
    tops = _all_reduced([_maxima(part) for part in parts], dist.ReduceOp.MAX, request.group)
    sums = [_relative_to(part, top) for part, top in zip(parts, tops, strict=True)]
    sums = _all_reduced(sums, dist.ReduceOp.SUM, request.group)
    return [{**top, **part} for top, part in zip(tops, sums, strict=True)]


def _packed(parts: Sequence[Columns], keys: Sequence[tuple[int, str]]) -> Tensor:
    """[K, *] in the widest type among them."""
    columns = [parts[number][name] for number, name in keys]
    wide = any(column.dtype == torch.float64 for column in columns)
    return torch.stack([column.double() if wide else column for column in columns])


def _by_part(
    count: int, keys: Sequence[tuple[int, str]], values: Sequence[Tensor]
) -> list[Columns]:
    parts: list[Columns] = [{} for _ in range(count)]
    for (number, name), value in zip(keys, values, strict=True):
        parts[number][name] = value
    return parts


def _all_reduced(
    parts: Sequence[Columns], operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None
) -> list[Columns]:
    keys = [(number, name) for number, part in enumerate(parts) for name in part]
    if not keys:
        return [{} for _ in parts]
    packed = _packed(parts, keys)
    dist.all_reduce(packed, operation, group=group)
    return _by_part(len(parts), keys, packed.unbind())


def _summed(ranks: Columns, tops: Columns) -> Columns:
    """Columns [R, *] of all ranks and their maxima [*] -> [*]."""
    return {**tops, **{name: x.sum(0) for name, x in _relative_to(ranks, tops).items()}}


def _maxima(columns: Columns) -> Columns:
    return {name: column for name, column in columns.items() if _is_maximum(name)}


def _is_maximum(name: str) -> bool:
    # A label's logit is -inf on every rank but the label's own.
    return name in _SUMS_OF or name.startswith("label_")


def _relative_to(columns: Columns, tops: Columns) -> Columns:
    """The sums of one rank as if taken relative to `tops`; a sum without a maximum as it is."""
    moved = {name: column for name, column in columns.items() if not _is_maximum(name)}
    for top, names in _SUMS_OF.items():
        if top not in columns:
            continue
        shift = (columns[top] - tops[top]).clamp_min(_FARTHEST)
        factor = shift.exp()
        for name in names:
            if name in columns:
                moved[name] = _shifted(name, columns, shift) * factor
    return moved


def _shifted(name: str, columns: Columns, shift: Tensor) -> Tensor:
    """A sum weighted by x - m, m moved by -shift: sum w (x - m + shift)^n, binomially."""
    value = columns[name]
    if name not in _MOMENTS:
        return value
    first, second = _MOMENTS[name]
    if second is None:
        return value + shift * columns[first]
    return value + 2 * shift * columns[first] + shift.square() * columns[second]

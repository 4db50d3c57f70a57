"""Divergences on vocabulary shards: a few floats a token travel forward, nothing backward.

Forward: each rank sums statistics of its own columns (a `Form` says which, forms.py and
mixtures.py), ranks meet once, twice or three times (shards.py), and every rank computes the same
per-token values from the statistics of the whole rows.

Backward: local, from a few floats per token and the logits themselves.

Both directions walk over chunks of tokens in a few fp32 buffers that stay in cache, so each reads
the logits of both models once, and nothing of the logits' size is allocated beside the gradient;
with `inplace` the gradient takes the student's own storage. A fused kernel (kernels.py) may take
the place of either walk.

Shapes: [*] tokens, [*, V] this rank's columns; see shards.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from taid_megatron.losses.forms import Fill, FillWide, Form, Interpolated
from taid_megatron.losses.kernels import Kernel
from taid_megatron.losses.shards import (
    Chunk,
    Columns,
    Request,
    chunks,
    compute_dtype,
    empty_statistics,
    join,
    local_labels,
    rows,
)


def run(
    form: Form,
    student: Tensor,
    teacher: Tensor | None,
    request: Request,
    kernel: Kernel | None = None,
) -> tuple[Tensor, Columns]:
    """Loss per token and the asked statistics. [*, V] x 2 -> [*], nats, fp32 (float64 if given)."""
    # Detached here, the teacher can neither ask for a gradient nor make the loss ask for one.
    teacher = None if teacher is None else teacher.detach()
    loss, *stats = _Divergence.apply(student, teacher, form.parameter, form, request, kernel)
    return loss, dict(zip(request.stats, stats, strict=True))


class _Divergence(torch.autograd.Function):
    """(1 - w) objective + w cross-entropy, w the request's ce_weight.

    Returns the loss [*] and then the request's statistics [*], which carry no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        parameter: Tensor | None,
        form: Form,
        request: Request,
        kernel: Kernel | None,
    ) -> tuple[Tensor, ...]:
        shard = _Shard(student, teacher, request, kernel)
        forms, merged, values = _measure(form, shard)
        # Clones: autograd wants every output to be a tensor of its own.
        stats = tuple(values[name].clone() for name in request.stats)
        loss, dtype = values["loss"], values["loss"].dtype
        ctx.mark_non_differentiable(*stats)
        ctx.set_materialize_grads(False)
        if any(ctx.needs_input_grad):
            kept = [
                part[name].to(dtype)
                for each, part in zip(forms, merged, strict=True)
                for name in each.saved()
            ]
            ctx.save_for_backward(student, teacher, torch.stack(kept), request.labels)
            ctx.forms, ctx.request, ctx.kernel, ctx.overwritten = forms, request, kernel, False
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_stats: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return None, None, None, None, None, None
        if ctx.overwritten:
            raise RuntimeError(
                "distillation_loss(inplace=True): the first backward has overwritten the student "
                "logits with their gradient; a second backward needs inplace=False"
            )
        # The labels are saved for autograd to notice a change; they are read from the request.
        student, teacher, kept, _ = ctx.saved_tensors
        form, request = ctx.forms[0], ctx.request
        values = iter(kept.unbind())
        merged = [{name: next(values) for name in part.saved()} for part in ctx.forms]
        divergence, surprise = _upstream(grad_loss, form, request)
        grad_parameter = None
        if ctx.needs_input_grad[2]:
            slope = (divergence * merged[0]["slope"]).sum()
            grad_parameter = slope.to(form.parameter.dtype).reshape(form.parameter.shape)
        grad = None
        if ctx.needs_input_grad[0]:
            ctx.overwritten = request.inplace
            shard = _Shard(student, teacher, request, ctx.kernel)
            grad = shard.gradient(ctx.forms, merged, divergence, surprise)
        return grad, None, grad_parameter, None, None, None


def value_and_gradient(
    form: Form,
    student: Tensor,
    teacher: Tensor | None,
    request: Request,
    kernel: Kernel | None,
    upstream: Tensor | None,
) -> Columns:
    """As `run`, without autograd, `loss` among the values; then the gradient, if `upstream` [*] is
    given: it takes the student's storage. For a caller to whom the upstream gradient is known.
    """
    shard = _Shard(student, teacher, replace(request, inplace=True), kernel)
    forms, merged, values = _measure(form, shard)
    if upstream is not None:
        shard.gradient(forms, merged, *_upstream(upstream, form, request))
    return values


def _measure(form: Form, shard: _Shard) -> tuple[list[Form], list[Columns], Columns]:
    """The forward: the forms in use, their merged statistics, and the values [*] with the loss."""
    request = shard.request
    forms = _forms(form, request)
    merged = join([shard.statistics(part) for part in forms], request)
    if request.check_finite:
        _refuse_non_finite(merged)
    form.refine(_Walk(shard, form), merged[0])
    dtype = compute_dtype(shard.student, shard.teacher)
    values = {name: x.to(dtype) for name, x in _values(forms, merged, request).items()}
    return forms, merged, {**values, "loss": _total(values, form, request)}


def _forms(form: Form, request: Request) -> list[Form]:
    """The form, and where it lacks the plain softmax that the request needs, one that has it."""
    plain_stats = {"kl", "cross_entropy_to_target", "cross_entropy"}
    if form.plain or not (request.ce_weight > 0 or plain_stats & set(request.stats)):
        return [form]
    return [form, Interpolated(1.0)]


def _values(forms: list[Form], merged: list[Columns], request: Request) -> Columns:
    """Per-token objective and statistics [*] from the statistics of the whole rows."""
    values: Columns = {}
    for form, part in reversed(list(zip(forms, merged, strict=True))):
        values |= form.values(part, request)
    plain = merged[-1]
    if request.labels is not None:
        _refuse_lost_labels(request.labels, plain["label_s"])
    if request.labels is not None and forms[-1].plain:
        surprise = (plain["max_s"] - plain["label_s"]) + plain["sum_s"].log()
        values["cross_entropy"] = surprise.masked_fill_(request.labels < 0, 0.0)
    if "objective" not in values:
        values["objective"] = values["cross_entropy_to_target"] = values["cross_entropy"]
    return values


def _total(values: Columns, form: Form, request: Request) -> Tensor:
    """The weighted sum of objective and cross-entropy [*]."""
    weight = request.ce_weight
    if weight == 0.0 or _is_cross_entropy(form):
        return values["objective"]
    return (1.0 - weight) * values["objective"] + weight * values["cross_entropy"]


def _is_cross_entropy(form: Form) -> bool:
    return isinstance(form, Interpolated) and form.t is None


def _upstream(grad_loss: Tensor, form: Form, request: Request) -> tuple[Tensor, Tensor]:
    """The gradient [*] that reaches the objective, and the one that reaches the cross-entropy."""
    weight = 1.0 if _is_cross_entropy(form) else request.ce_weight
    surprise = grad_loss * weight
    if request.labels is not None:
        surprise.masked_fill_(request.labels < 0, 0.0)
    return grad_loss * (1.0 - weight), surprise


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


def _refuse_non_finite(merged: list[Columns]) -> None:
    """Raise where a softmax has no value; all ranks hold the same sums and do so alike."""
    for model, name in (("student", "sum_s"), ("teacher", "sum_p"), ("teacher", "sum_z")):
        for part in merged:
            if name in part and not (finite := part[name].isfinite()).all():
                bad = (~finite).nonzero()
                raise ValueError(
                    f"{model} logits are NaN or +inf in {len(bad)} of {finite.numel()} tokens, the "
                    f"first at index {tuple(bad[0].tolist())}"
                )


# ---- this rank's columns -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shard:
    """One rank's logits and the walks over them."""

    student: Tensor
    teacher: Tensor | None
    request: Request
    kernel: Kernel | None

    @property
    def _dtype(self) -> torch.dtype:
        return compute_dtype(self.student, self.teacher)

    def _logits(self) -> tuple[Tensor, Tensor, Tensor]:
        """Student, teacher (or anything of its shape) and label columns, padding cut off."""
        width = self.student.shape[-1] - self.request.padding
        teacher = self.student if self.teacher is None else self.teacher
        return (
            self.student[..., :width],
            teacher[..., :width],
            local_labels(self.student, self.request),
        )

    def _fused(self, form: Form) -> Kernel | None:
        """The kernel, where it can do this form."""
        if self.kernel is None or self.kernel.refusal(form, self.student, self.teacher):
            return None
        return self.kernel

    def _pieces(
        self, tensors: Sequence[Tensor], num_buffers: int, fused: object
    ) -> Iterator[tuple[list[Tensor], tuple[Tensor, ...]]]:
        """Chunks and buffers for torch's operations, all tokens and no buffers for a kernel."""
        if fused is None:
            yield from chunks(tensors, self._dtype, self.request.chunk_tokens, num_buffers)
        elif tensors[0].numel() > 0:
            for views in rows(tensors):
                yield views, ()

    def statistics(self, form: Form) -> Columns:
        """The statistics of the form's first collective, of this rank's columns alone. [*]."""
        names = form.names(self.request)
        packed = empty_statistics(names, self.student, torch.float64 if form.wide else self._dtype)
        kernel = self._fused(form)
        fill = form.fill if kernel is None else partial(kernel.fill, form)
        tensors = (*self._logits(), packed.movedim(0, -1))
        for (s, z, index, row), buffers in self._pieces(tensors, form.num_buffers, kernel):
            fill(Chunk(s, z, index, buffers), dict(zip(names, row.unbind(-1), strict=True)))
        return dict(zip(names, packed.unbind(), strict=True))

    def sums(
        self, form: Form, names: Sequence[str], fill: Fill, numbers: Sequence[Tensor]
    ) -> Columns:
        """Statistics of a further pass, of this rank's columns alone. [*]."""
        packed = torch.stack([torch.zeros_like(numbers[0]) for _ in names])
        kernel = self._fused(form)
        if kernel is not None:
            fill = partial(kernel.fill_sums, form)

        def fill_columns(chunk: Chunk, row: Tensor, outs: Sequence[Tensor]) -> None:
            fill(chunk, row, dict(zip(names, outs[0].unbind(-1), strict=True)))

        self.fill(form, fill_columns, numbers, [packed.movedim(0, -1)], kernel)
        return dict(zip(names, packed.unbind(), strict=True))

    def fill(
        self,
        form: Form,
        fill: FillWide,
        numbers: Sequence[Tensor],
        outs: Sequence[Tensor],
        kernel: Kernel | None = None,
    ) -> None:
        """A further pass: `fill` writes into `outs` [*, width]."""
        tensors = (*self._logits(), torch.stack(list(numbers), -1), *outs)
        for (s, z, index, row, *parts), buffers in self._pieces(tensors, form.num_buffers, kernel):
            fill(Chunk(s, z, index, buffers), row, parts)

    def gradient(
        self, forms: list[Form], merged: list[Columns], divergence: Tensor, surprise: Tensor
    ) -> Tensor:
        """Gradient of the loss in the student's logits [*, V]: their own storage if inplace."""
        request, student = self.request, self.student
        width = student.shape[-1] - request.padding
        grad = student.detach() if request.inplace else torch.empty_like(student)
        grad[..., width:].zero_()
        numbers = _all_coefficients(forms, merged, divergence, surprise)
        numbers_of_all = torch.stack(
            [*(number for part in numbers for number in part), -surprise], -1
        )
        mixes_labels = request.labels is not None and (
            _is_cross_entropy(forms[0]) or request.ce_weight > 0
        )
        kernel = self._fused(forms[0]) if len(forms) == 1 else None
        # The sum of two forms needs a buffer of its own.
        num_buffers = max(form.num_buffers for form in forms) + len(forms) - 1
        tensors = (*self._logits(), grad[..., :width], numbers_of_all)
        for (s, z, index, out, row), buffers in self._pieces(tensors, num_buffers, kernel):
            chunk, addend = Chunk(s, z, index, buffers), row[:, -1] if mixes_labels else None
            if kernel is not None:
                kernel.gradient(forms[0], chunk, row, addend, out)
            else:
                _chunk_gradient(forms, chunk, row.split(_widths(numbers), -1), addend, out)
        return grad


def _widths(numbers: list[list[Tensor]]) -> list[int]:
    """Columns of each form, and the addend's."""
    return [*(len(part) for part in numbers), 1]


def _chunk_gradient(
    forms: list[Form], chunk: Chunk, rows: Sequence[Tensor], addend: Tensor | None, out: Tensor
) -> None:
    """The sum of the forms' gradients, and the addend in the label's column, into `out` [T, V]."""
    buffers = chunk.buffers
    # `out` may be the storage that a second form still has to read
    result = out if out.dtype == rows[0].dtype and len(forms) == 1 else buffers[2]
    forms[0].gradient(_with(chunk, forms[0]), rows[0], result)
    for form, row in zip(forms[1:], rows[1:], strict=False):
        total = buffers[-1].copy_(result)
        form.gradient(_with(chunk, form), row, result)
        result.add_(total)
    if addend is not None:
        value = addend.unsqueeze(-1).masked_fill(chunk.index < 0, 0.0)
        result.scatter_add_(1, chunk.index.clamp(min=0), value)
    if result is not out:
        out.copy_(result)


def _with(chunk: Chunk, form: Form) -> Chunk:
    """The chunk with as many buffers as the form asks for."""
    return replace(chunk, buffers=chunk.buffers[: form.num_buffers])


def _all_coefficients(
    forms: list[Form], merged: list[Columns], divergence: Tensor, surprise: Tensor
) -> list[list[Tensor]]:
    """Of each form. The cross-entropy's share is the plain one's, the others take none of it."""
    nothing = torch.zeros_like(surprise)
    return [
        form.coefficients(part, divergence if form is forms[0] else nothing, surprise)
        for form, part in zip(forms, merged, strict=True)
    ]


@dataclass(frozen=True)
class _Walk:
    """Further passes and collectives for a form."""

    shard: _Shard
    form: Form

    @property
    def first_id(self) -> int:
        return self.shard.request.first_id(self.shard.student.shape[-1])

    def sums(self, names: Sequence[str], fill: Fill, numbers: Sequence[Tensor]) -> Columns:
        own = self.shard.sums(self.form, names, fill, numbers)
        return join([own], self.shard.request)[0]

    def local(
        self, widths: Sequence[int], fill: FillWide, numbers: Sequence[Tensor]
    ) -> list[Tensor]:
        outs = [numbers[0].new_zeros(*numbers[0].shape, width) for width in widths]
        self.shard.fill(self.form, fill, numbers, outs)
        return outs

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        request, own = self.shard.request, torch.cat(list(parts), -1)
        everyone = own.unsqueeze(0)
        if request.num_ranks > 1:
            everyone = own.new_empty(request.num_ranks, *own.shape)
            dist.all_gather_into_tensor(everyone.view(-1), own.view(-1), group=request.group)
        return list(everyone.split([part.shape[-1] for part in parts], -1))

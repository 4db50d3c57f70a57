"""The LM head and the loss together: no [tokens, vocabulary] tensor of either model exists.

Over chunks of tokens: logits of both heads, loss, gradient in the student's logits (in their own
buffer), and from it at once the chunk's share of the two gradients of the head,

    dH = G W        dW += G^T H

so that each chunk's logits are computed once and thrown away: the four matrix products of an
unfused step and no more. For that the gradient that will reach the loss must be known in the
forward: it is the loss mask, and the result is the masked sum.

dW goes where the weight's owner wants it: into `weight.main_grad` in fp32 where there is one
(Megatron's contract; `grad_added_to_main_grad` is set), else into weight.grad by autograd. Products
of bf16 are accumulated and kept in fp32: logits rounded to bf16 were seen to cost 4 to 23% of the
gradient.

Legend: [*] tokens, h hidden size, [V/tp] this rank's vocabulary shard, C tokens of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from taid_megatron.losses import vocab_parallel
from taid_megatron.losses.forms import Form
from taid_megatron.losses.kernels import choose
from taid_megatron.losses.registry import prepare
from taid_megatron.losses.shards import Columns, Request


def fused_distillation_loss(
    name: str,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    *,
    loss_mask: Tensor,
    labels: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    ce_weight: float = 0.0,
    kernel: str = "auto",
    return_stats: tuple[str, ...] = (),
    padding: int = 0,
    vocab_offset: int | None = None,
    head_chunk_tokens: int = 256,
    collective: str = "gather",
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Masked sum of `distillation_loss` over heads W H, and per-token values.

    Returns (sum of loss * loss_mask, 0-d fp32, differentiable in student_hidden and
    student_weight; {"loss": [*], and each of return_stats: [*]}, detached). A group's ranks each
    hold a shard of the weights and the same hidden states, or, with `sequence_parallel`, their part
    of the first axis. The gradient in the hidden states is then summed over the group, or summed
    and scattered, in the backward: as megatron-core's output layer does.

    Args:
        name: as of distillation_loss; so are all arguments that are not named here.
        student_hidden: [*, h] (with sequence_parallel, [s / tp, ..., h]).
        student_weight: [V/tp, h], the output layer's, perhaps tied to the embedding.
        teacher_hidden: [*, h of the teacher]; None where the loss needs no teacher.
        teacher_weight: [V/tp, h of the teacher].
        loss_mask: [*], what each token's loss is multiplied with in the sum.
        head_chunk_tokens: tokens per chunk; two fp32 buffers of [C, V/tp] is all the memory.

    Raises:
        ValueError: as of distillation_loss; hidden states and weights that do not fit.
        RuntimeError: in the backward, where the gradient that reaches the sum is not 1 and the
            weight has a main_grad, which has its share already (seen on the CPU; elsewhere a device
            assertion).
    """
    _check_head("student", student_hidden, student_weight)
    if teacher_hidden is not None and teacher_weight is not None:
        _check_head("teacher", teacher_hidden, teacher_weight)
    if head_chunk_tokens < 1:
        raise ValueError(f"head_chunk_tokens={head_chunk_tokens} is not at least 1")
    # Logits as the checks want to see them: they take no memory, and do not exist.
    parts = group.size() if group is not None and sequence_parallel else 1
    logits = _imagined(student_hidden, student_weight, parts)
    teacher_logits = None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher_logits = _imagined(teacher_hidden, teacher_weight, parts)
    form, request = prepare(
        *(name, logits, teacher_logits, return_stats, kernel, options),
        labels=labels,
        group=group,
        ce_weight=ce_weight,
        padding=padding,
        vocab_offset=vocab_offset,
        collective=collective,
    )
    if form.parameter is not None and form.parameter.requires_grad:
        raise ValueError(
            "the fused head gives no gradient to a tensor temperature: train it by the statistic "
            "temperature_gradient"
        )
    if loss_mask.shape != logits.shape[:-1]:
        raise ValueError(
            f"loss_mask {tuple(loss_mask.shape)} does not fit {tuple(logits.shape[:-1])} tokens"
        )
    wants_grad = torch.is_grad_enabled() and (
        student_hidden.requires_grad or student_weight.requires_grad
    )
    call = _Call(form, request, kernel, head_chunk_tokens, sequence_parallel, wants_grad)
    teacher = (None, None) if teacher_logits is None else (teacher_hidden, teacher_weight)
    total, loss, *stats = _FusedHead.apply(
        student_hidden, student_weight, *teacher, loss_mask, call
    )
    return total, {"loss": loss, **dict(zip(request.stats, stats, strict=True))}


def head_logits(
    hidden: Tensor, weight: Tensor, chunk_tokens: int = 256
) -> Iterator[tuple[slice, Tensor]]:
    """Token ranges of flattened [*, h] hidden states and their logits [C, V/tp], no gradient.

    For whoever wants figures of the logits and no loss; the next chunk reuses the storage.
    """
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    buffer = _buffer(flat, weight, chunk_tokens)
    for start in range(0, len(flat), chunk_tokens):
        part = slice(start, min(start + chunk_tokens, len(flat)))
        yield part, _product(flat[part], weight.detach().t(), buffer[: part.stop - start])


# torch.mm(bf16, bf16, out_dtype=fp32) on CUDA; before it the operands are widened.
_WIDENING_MM = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)


@dataclass(frozen=True)
class _Call:
    form: Form
    request: Request
    kernel: str
    chunk_tokens: int
    sequence_parallel: bool
    wants_grad: bool


class _FusedHead(torch.autograd.Function):
    """Forward: everything. Backward: hands the gradients out, reduced over the group."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        loss_mask: Tensor,
        call: _Call,
    ) -> tuple[Tensor, ...]:
        request = call.request
        shape = loss_mask.shape
        flat = _whole_sequence(hidden, call).reshape(-1, hidden.shape[-1])
        teacher = None
        if teacher_hidden is not None:
            teacher = _whole_sequence(teacher_hidden, call).reshape(-1, teacher_hidden.shape[-1])
        grads = _Gradients(flat, weight) if call.wants_grad else None
        values = _over_chunks(flat, weight, teacher, teacher_weight, loss_mask, call, grads)
        loss = values["loss"].view(shape)
        outputs = [loss, *(values[name].view(shape) for name in request.stats)]
        ctx.mark_non_differentiable(*outputs)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.grads, ctx.weight, ctx.shape = call, grads, weight, hidden.shape
        return (loss * loss_mask).sum(), *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_rest: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("the fused head's gradients were handed out by the first backward")
        grad_hidden = _reduced(grads.hidden.mul_(grad), ctx.call, ctx.shape)
        return grad_hidden, grads.of_weight(grad), None, None, None, None


class _Gradients:
    """dH [T, h], and dW [V/tp, h] in fp32 where it belongs."""

    def __init__(self, flat: Tensor, weight: Tensor) -> None:
        self.hidden = torch.empty_like(flat)
        self._weight = weight
        self._in_main = weight.requires_grad and getattr(weight, "main_grad", None) is not None
        self.sum: Tensor | None = None
        if self._in_main:
            self.sum = weight.main_grad  # type: ignore[attr-defined]
        elif weight.requires_grad:
            self.sum = torch.zeros_like(weight, dtype=_wide(weight.dtype))

    def add(self, part: slice, grad: Tensor, hidden: Tensor) -> None:
        """Of one chunk: grad [C, V/tp] in the student's logits, hidden [C, h]."""
        narrow = grad.to(self._weight.dtype)
        self.hidden[part] = narrow @ self._weight
        if self.sum is None:
            return
        if self.sum.dtype == narrow.dtype:
            self.sum.addmm_(narrow.t(), hidden)
        else:
            self.sum.add_(_product(narrow.t(), hidden))

    def of_weight(self, upstream: Tensor) -> Tensor | None:
        """What autograd gets for the weight."""
        if self.sum is None:
            return None
        if not self._in_main:
            return self.sum.mul_(upstream).to(self._weight.dtype)
        _require_one(upstream)
        weight: Any = self._weight
        weight.grad_added_to_main_grad = True
        # Megatron's hooks must still run. A weight that is also the embedding has more to come in
        # by autograd, and asks for zeros.
        zeros = getattr(weight, "zero_out_wgrad", False)
        return torch.zeros_like(weight) if zeros else torch.empty_like(weight)


def _over_chunks(
    flat: Tensor,
    weight: Tensor,
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    loss_mask: Tensor,
    call: _Call,
    grads: _Gradients | None,
) -> Columns:
    """Loss and statistics [T]; the gradients go into `grads`."""
    request, size = call.request, call.chunk_tokens
    mask = loss_mask.reshape(-1)
    labels = None if request.labels is None else request.labels.reshape(-1)
    parts: list[Columns] = []
    student_buffer = _buffer(flat, weight, size)
    teacher_buffer = None
    if teacher is not None and teacher_weight is not None:
        teacher_buffer = _buffer(teacher, teacher_weight, size)
    kernel = choose(call.kernel, call.form, student_buffer, teacher_buffer)
    for start in range(0, len(flat), size) or [0]:
        part = slice(start, min(start + size, len(flat)))
        rows = part.stop - start
        s = _product(flat[part], weight.t(), student_buffer[:rows])
        z = None
        if teacher is not None and teacher_weight is not None and teacher_buffer is not None:
            z = _product(teacher[part], teacher_weight.t(), teacher_buffer[:rows])
        chunk = replace(request, labels=None if labels is None else labels[part])
        upstream = None if grads is None else mask[part].to(s.dtype)
        values = vocab_parallel.value_and_gradient(call.form, s, z, chunk, kernel, upstream)
        parts.append({name: values[name] for name in ("loss", *request.stats)})
        if grads is not None:
            grads.add(part, s, flat[part])
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, accumulated and kept in fp32 (float64 where they are)."""
    wide = _wide(a.dtype)
    if a.dtype != wide and a.is_cuda and _WIDENING_MM:
        product = torch.mm(a, b, out_dtype=wide)  # type: ignore[call-overload]
        return product if out is None else out.copy_(product)
    if out is None:
        return torch.mm(a.to(wide), b.to(wide))
    return torch.mm(a.to(wide), b.to(wide), out=out)


def _buffer(flat: Tensor, weight: Tensor, chunk_tokens: int) -> Tensor:
    size = (min(len(flat), chunk_tokens), weight.shape[0])
    return torch.empty(size, dtype=_wide(flat.dtype), device=flat.device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _imagined(hidden: Tensor, weight: Tensor, parts: int) -> Tensor:
    first, *rest = hidden.shape[:-1] or (1,)
    shape = (first * parts, *rest) if hidden.dim() > 1 else ()
    return torch.empty(1, dtype=_wide(hidden.dtype), device=hidden.device).expand(
        *shape, len(weight)
    )


def _whole_sequence(hidden: Tensor, call: _Call) -> Tensor:
    """Hidden states of all ranks' parts of the sequence, where each has a part."""
    hidden, request = hidden.detach(), call.request
    if not call.sequence_parallel or request.num_ranks == 1:
        return hidden
    whole = hidden.new_empty(hidden.shape[0] * request.num_ranks, *hidden.shape[1:])
    dist.all_gather_into_tensor(whole, hidden.contiguous(), group=request.group)
    return whole


def _reduced(grad: Tensor, call: _Call, shape: torch.Size) -> Tensor:
    """dH of this rank's columns -> of all columns; [T, h] -> the shape of the hidden states."""
    request = call.request
    if request.num_ranks == 1:
        return grad.view(shape)
    if not call.sequence_parallel:
        dist.all_reduce(grad, group=request.group)
        return grad.view(shape)
    own = grad.new_empty(shape)
    whole = grad.view(shape[0] * request.num_ranks, *shape[1:])
    dist.reduce_scatter_tensor(own, whole, group=request.group)
    return own


def _require_one(upstream: Tensor) -> None:
    """main_grad has its share already, for an upstream gradient of 1."""
    if upstream.device.type != "cpu":
        torch._assert_async(upstream == 1)
    elif upstream.item() != 1.0:
        raise RuntimeError(
            f"the fused head's sum got the gradient {upstream.item()}: with main_grad it must be 1 "
            "(scale the loss mask instead)"
        )


def _check_head(model: str, hidden: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{model}_hidden {tuple(hidden.shape)} and {model}_weight {tuple(weight.shape)} do not "
            "fit: [..., h] and [V/tp, h]"
        )
    if hidden.dtype != weight.dtype or hidden.device != weight.device:
        raise ValueError(
            f"{model}_hidden is {hidden.dtype} on {hidden.device}, {model}_weight {weight.dtype} "
            f"on {weight.device}"
        )

"""The losses by name, and the one function that checks its arguments and runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from taid_megatron.losses import reference, vocab_parallel
from taid_megatron.losses.vocab_parallel import STATS, Request

KERNELS = ("auto", "torch")


@dataclass(frozen=True)
class Loss:
    """One entry of the registry.

    Attributes:
        reference: the definition, on whole rows.
        vocab_parallel: (student, teacher, Request, **options) -> (loss, statistics), on shards.
        options: name -> a check that returns the value to pass on or raises ValueError. All are
            required.
        needs_labels: whether it cannot do without labels.
        needs_teacher: whether it cannot do without teacher logits.
    """

    reference: Callable[..., Tensor]
    vocab_parallel: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    options: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    needs_labels: bool = False
    needs_teacher: bool = True


def _interpolation(t: Any) -> float | Tensor:
    """Check t; a CPU tensor becomes a float, one on an accelerator is not looked into."""
    if isinstance(t, Tensor):
        if t.dim() != 0 or not t.is_floating_point():
            raise ValueError(
                f"t must be a float or a 0-d floating tensor, not {t.dtype} of {tuple(t.shape)}"
            )
        if t.device.type != "cpu":
            return t
        t = t.item()
    if isinstance(t, bool) or not isinstance(t, (int, float)) or not 0.0 <= t <= 1.0:
        raise ValueError(f"t={t!r} is not a number in [0, 1]")
    return float(t)


LOSSES: dict[str, Loss] = {
    "taid": Loss(
        reference=reference.taid,
        vocab_parallel=vocab_parallel.taid,
        options={"t": _interpolation},
    ),
    "forward_kl": Loss(
        reference=reference.forward_kl,
        vocab_parallel=vocab_parallel.forward_kl,
    ),
    "cross_entropy": Loss(
        reference=reference.cross_entropy,
        vocab_parallel=vocab_parallel.cross_entropy,
        needs_labels=True,
        needs_teacher=False,
    ),
}


@overload
def distillation_loss(
    name: str,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    *,
    return_stats: Literal[False] = False,
    **arguments: Any,
) -> Tensor: ...


@overload
def distillation_loss(
    name: str,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    *,
    return_stats: Literal[True] | tuple[str, ...],
    **arguments: Any,
) -> tuple[Tensor, dict[str, Tensor]]: ...


def distillation_loss(
    name: str,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    *,
    labels: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    ce_weight: float = 0.0,
    kernel: str = "auto",
    inplace: bool = False,
    return_stats: bool | tuple[str, ...] = False,
    padding: int = 0,
    vocab_offset: int | None = None,
    chunk_tokens: int | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Per-token loss (1 - ce_weight) * objective + ce_weight * cross_entropy. [*, V/tp] x 2 -> [*].

    In nats, fp32 whatever the logits' dtype (float64 where they are), differentiable in
    `student_logits` alone. With a group: one collective, in the forward; every rank of the group
    makes the call with the same tokens and options and gets the same bits.

    Args:
        name: a key of LOSSES.
        student_logits: [*, V/tp], this rank's shard of the vocabulary, any strides.
        teacher_logits: the same shape, any float dtype; None where the loss needs no teacher.
        labels: global vocabulary ids [*]. Where negative, the cross-entropy is 0.
        group: the ranks that share the vocabulary; None where the logits are whole rows.
        ce_weight: share of the cross-entropy to the labels in the total, in [0, 1].
        kernel: "torch", or "auto" for the fastest there is.
        inplace: the backward overwrites the student logits' storage with their gradient. Only for a
            caller that is done with them: nothing of their size is then allocated.
        return_stats: also return a dict of detached per-token values [*]; True for all there are,
            or the names wanted: objective, cross_entropy_to_target (-sum p_t log q), kl
            (KL(teacher || student), a further pass for taid), cross_entropy (needs labels).
        padding: trailing local columns that belong to no token: no probability, no gradient. It may
            differ between ranks and take up a whole shard.
        vocab_offset: global id of the first local column; needed with labels where the ranks'
            shards differ in width. None means rank * local width.
        chunk_tokens: tokens per chunk; None for what fits the cache.
        **options: the loss's own; taid: `t` in [0, 1], a float or a 0-d tensor.

    Raises:
        ValueError: an argument is unknown, missing or out of range, or shapes differ. Values of
            tensors are looked at only on the CPU: elsewhere a label that no rank has gives an
            infinite cross-entropy, and a t outside [0, 1] goes unnoticed.
    """
    loss = _find(name, kernel)
    options = _checked_options(name, loss, options)
    _check_logits(name, student_logits, teacher_logits, needs_teacher=loss.needs_teacher)
    stats = _wanted_stats(return_stats, teacher_logits is not None, labels is not None)
    needs_labels = loss.needs_labels or ce_weight > 0
    _check_labels(name, labels, student_logits, needed=needs_labels)
    request = Request(
        # Labels that nothing asks for would only make the collective larger.
        labels=labels if needs_labels or "cross_entropy" in stats else None,
        group=group,
        ce_weight=ce_weight,
        inplace=inplace,
        stats=stats,
        padding=padding,
        vocab_offset=vocab_offset,
        chunk_tokens=chunk_tokens,
    )
    _check_request(request, student_logits)
    value, values = loss.vocab_parallel(student_logits, teacher_logits, request, **options)
    return value if return_stats is False else (value, values)


def _find(name: str, kernel: str) -> Loss:
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; there are: {', '.join(LOSSES)}")
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}; there are: {', '.join(KERNELS)}")
    return LOSSES[name]


def _checked_options(name: str, loss: Loss, options: Mapping[str, Any]) -> dict[str, Any]:
    """The loss's own options, each passed through its check."""
    known = ", ".join(loss.options) or "none"
    unknown = sorted(set(options) - set(loss.options))
    missing = [option for option in loss.options if option not in options]
    if unknown:
        raise ValueError(f"loss {name!r} has no option {', '.join(unknown)}; its options: {known}")
    if missing:
        raise ValueError(f"loss {name!r} needs the option {', '.join(missing)}")
    return {option: check(options[option]) for option, check in loss.options.items()}


def _check_logits(
    name: str, student: Tensor, teacher: Tensor | None, *, needs_teacher: bool
) -> None:
    if student.dim() == 0 or not student.is_floating_point():
        raise ValueError(
            f"student_logits must be floating [..., V], not {student.dtype} {tuple(student.shape)}"
        )
    if teacher is None:
        if needs_teacher:
            raise ValueError(f"loss {name!r} needs teacher_logits, got None")
        return
    if teacher.shape != student.shape:
        raise ValueError(
            f"student_logits {tuple(student.shape)} and teacher_logits {tuple(teacher.shape)} "
            "differ in shape: both must be the same shard of one vocabulary"
        )
    if not teacher.is_floating_point() or teacher.device != student.device:
        raise ValueError(
            f"teacher_logits are {teacher.dtype} on {teacher.device}: they must be floating and on "
            f"{student.device} as the student's"
        )


def _check_labels(name: str, labels: Tensor | None, logits: Tensor, *, needed: bool) -> None:
    if labels is None:
        if needed:
            raise ValueError(f"labels are missing: loss {name!r} or ce_weight > 0 needs them")
        return
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}: one id per "
            f"token, {tuple(logits.shape[:-1])}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
        raise ValueError(f"labels are {labels.dtype}: they must be integer vocabulary ids")
    if labels.device != logits.device:
        raise ValueError(f"labels are on {labels.device}, the logits on {logits.device}")


def _check_request(request: Request, logits: Tensor) -> None:
    width, padding, group = logits.shape[-1], request.padding, request.group
    if not 0.0 <= request.ce_weight <= 1.0:
        raise ValueError(f"ce_weight={request.ce_weight} is not in [0, 1]")
    _check_whole("vocab_offset", request.vocab_offset, at_least=0)
    _check_whole("chunk_tokens", request.chunk_tokens, at_least=1)
    _check_whole("padding", padding, at_least=0)
    if padding > width:
        raise ValueError(f"padding={padding} exceeds the {width} local columns")
    if padding == width and (group is None or group.size() == 1):
        raise ValueError(f"padding={padding} leaves none of the {width} columns to the vocabulary")
    shares = any(n > 1 and step == 0 for n, step in zip(logits.shape, logits.stride(), strict=True))
    if request.inplace and shares:
        raise ValueError(
            f"inplace=True needs logits with storage of their own; strides {logits.stride()} of "
            f"{tuple(logits.shape)} are an expanded view"
        )


def _check_whole(name: str, value: int | None, *, at_least: int) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name}={value!r} is not a whole number of at least {at_least}")


def _wanted_stats(
    return_stats: bool | tuple[str, ...], has_teacher: bool, has_labels: bool
) -> tuple[str, ...]:
    """Names of the statistics to return, each possible with what was given."""
    impossible = {"kl": not has_teacher, "cross_entropy": not has_labels}
    if return_stats is False:
        return ()
    if return_stats is True:
        return tuple(name for name in STATS if not impossible.get(name, False))
    unknown = [name for name in return_stats if name not in STATS]
    if unknown:
        raise ValueError(f"return_stats: unknown {unknown}; there are: {', '.join(STATS)}")
    for name in return_stats:
        if impossible.get(name, False):
            missing = "teacher_logits" if name == "kl" else "labels"
            raise ValueError(f"return_stats: {name!r} needs {missing}, got None")
    return tuple(return_stats)

"""The losses by name, and the one function that checks its arguments and runs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from taid_megatron.losses import reference, vocab_parallel
from taid_megatron.losses.adaptive import Adaptive
from taid_megatron.losses.forms import Decoupled, Form, Interpolated, Reverse, Tempered
from taid_megatron.losses.kernels import KERNELS, choose
from taid_megatron.losses.mixtures import Mixture
from taid_megatron.losses.shards import STATS, Collective, Request

COLLECTIVES = ("gather", "all_reduce")
VARIANTS = ("paper", "official")


@dataclass(frozen=True)
class Option:
    """An option of a loss.

    Attributes:
        check: returns the value to pass on, or raises ValueError.
        default: taken where the caller gives none; None where there is no default.
    """

    check: Callable[[str, Any], Any]
    default: Any = None


@dataclass(frozen=True)
class Loss:
    """One entry of the registry.

    Attributes:
        reference: the definition, on whole rows.
        form: (**options) -> what it sums on vocabulary shards.
        options: by name.
        needs_labels: whether it cannot do without labels.
        needs_teacher: whether it cannot do without teacher logits.
    """

    reference: Callable[..., Tensor]
    form: Callable[..., Form]
    options: Mapping[str, Option] = field(default_factory=dict)
    needs_labels: bool = False
    needs_teacher: bool = True


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r} is not a number")
    return float(value)


def _interpolation(name: str, t: Any) -> float | Tensor:
    """Check t; a CPU tensor becomes a float, one on an accelerator is not looked into."""
    if isinstance(t, Tensor):
        if t.dim() != 0 or not t.is_floating_point():
            raise ValueError(
                f"{name} must be a float or a 0-d floating tensor, not {t.dtype} of "
                f"{tuple(t.shape)}"
            )
        if t.device.type != "cpu":
            return t
        t = t.item()
    if isinstance(t, bool) or not isinstance(t, (int, float)) or not 0.0 <= t <= 1.0:
        raise ValueError(f"{name}={t!r} is not a number in [0, 1]")
    return float(t)


def _open_share(name: str, value: Any) -> float:
    """Strictly between 0 and 1, where the mixture is neither model's own distribution."""
    share = _number(name, value)
    if not 0.0 < share < 1.0:
        raise ValueError(
            f"{name}={share} is not between 0 and 1 (at the ends the loss is forward_kl, "
            "reverse_kl or nothing: name those instead)"
        )
    return share


def _mass(name: str, value: Any) -> float:
    mass = _number(name, value)
    if not 0.0 < mass <= 1.0:
        raise ValueError(f"{name}={mass} is not in (0, 1]")
    return mass


def _weight(name: str, value: Any) -> float:
    weight = _number(name, value)
    if not 0.0 <= weight < math.inf:
        raise ValueError(f"{name}={weight} is not a finite number of at least 0")
    return weight


def _positive(name: str, value: Any) -> float:
    number = _number(name, value)
    if not 0.0 < number < math.inf:
        raise ValueError(f"{name}={number} is not a finite number above 0")
    return number


def _learnable(name: str, value: Any) -> Tensor:
    """A temperature of one element; values are looked at on the CPU only."""
    if not isinstance(value, Tensor):
        return torch.tensor(_positive(name, value))
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(
            f"{name} must be a float or a floating tensor of one element, not {value.dtype} of "
            f"{tuple(value.shape)}"
        )
    if value.device.type == "cpu":
        _positive(name, value.item())
    return value


def _variant(name: str, value: Any) -> str:
    if value not in VARIANTS:
        raise ValueError(f"{name}={value!r}: there are {', '.join(VARIANTS)}")
    return value


LOSSES: dict[str, Loss] = {
    "taid": Loss(reference.taid, Interpolated, {"t": Option(_interpolation)}),
    "forward_kl": Loss(reference.forward_kl, lambda: Interpolated(1.0)),
    "reverse_kl": Loss(reference.reverse_kl, Reverse),
    "tvd": Loss(reference.tvd, lambda: Mixture("tvd")),
    "gjs": Loss(
        reference.gjs,
        lambda beta: Mixture("gjs", beta),
        {"beta": Option(_open_share, 0.1)},
    ),
    "skew_kl": Loss(
        reference.skew_kl,
        lambda lam: Mixture("skew_kl", lam),
        {"lam": Option(_open_share, 0.1)},
    ),
    "skew_reverse_kl": Loss(
        reference.skew_reverse_kl,
        lambda lam: Mixture("skew_reverse_kl", 1.0 - lam),
        {"lam": Option(_open_share, 0.1)},
    ),
    "adaptive_kl": Loss(
        reference.adaptive_kl,
        Adaptive,
        {"mu": Option(_mass, 0.5), "variant": Option(_variant, "paper")},
    ),
    "dkd": Loss(
        reference.dkd,
        Decoupled,
        {
            "alpha": Option(_weight, 1.0),
            "beta": Option(_weight, 8.0),
            "temperature": Option(_positive, 4.0),
        },
        needs_labels=True,
    ),
    "ctkd": Loss(
        reference.ctkd,
        Tempered,
        {"temperature": Option(_learnable), "variant": Option(_variant, "paper")},
    ),
    "cross_entropy": Loss(
        reference.cross_entropy,
        lambda: Interpolated(None),
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
    collective: Collective = "gather",
    check_finite: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Per-token loss (1 - ce_weight) * objective + ce_weight * cross_entropy. [*, V/tp] x 2 -> [*].

    In nats, fp32 whatever the logits' dtype (float64 where they are), differentiable in
    `student_logits` and, for ctkd, in `temperature`. With a group: one collective in the forward
    (two for tvd, gjs, skew_kl and skew_reverse_kl, three for adaptive_kl), none in the backward;
    every rank of the group makes the call with the same tokens and options and gets the same bits.

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
            (KL(teacher || student), a further pass for taid), cross_entropy (needs labels). The
            target of every loss but taid is the teacher. ctkd also has temperature_gradient, the
            derivative of the objective in the temperature.
        padding: trailing local columns that belong to no token: no probability, no gradient. It may
            differ between ranks and take up a whole shard.
        vocab_offset: global id of the first local column; needed with labels where the ranks'
            shards differ in width. None means rank * local width.
        chunk_tokens: tokens per chunk; None for what fits the cache.
        collective: "gather" exchanges statistics by an all-gather, "all_reduce" by an all-reduce of
            the maxima and one of the sums: two small messages for one that grows with the group.
        check_finite: look at the values (on an accelerator this waits for it) and refuse logits
            that are NaN or +inf.
        **options: the loss's own. taid: `t` in [0, 1], a float or a 0-d tensor. gjs: `beta` = 0.1.
            skew_kl, skew_reverse_kl: `lam` = 0.1. adaptive_kl: `mu` = 0.5, `variant`. dkd: `alpha`
            = 1, `beta` = 8, `temperature` = 4. ctkd: `temperature`, `variant`.

    Raises:
        ValueError: an argument is unknown, missing or out of range, or shapes differ. Values of
            tensors are looked at only on the CPU: elsewhere a label that no rank has gives an
            infinite cross-entropy, and a t outside [0, 1] goes unnoticed.
    """
    form, request = prepare(
        *(name, student_logits, teacher_logits, return_stats, kernel, options),
        labels=labels,
        group=group,
        ce_weight=ce_weight,
        inplace=inplace,
        padding=padding,
        vocab_offset=vocab_offset,
        chunk_tokens=chunk_tokens,
        collective=collective,
        check_finite=check_finite,
    )
    chosen = choose(kernel, form, student_logits, teacher_logits)
    value, values = vocab_parallel.run(form, student_logits, teacher_logits, request, chosen)
    return value if return_stats is False else (value, values)


def prepare(
    name: str,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    return_stats: bool | tuple[str, ...],
    kernel: str,
    options: Mapping[str, Any],
    **arguments: Any,
) -> tuple[Form, Request]:
    """The checked arguments of `distillation_loss`. Of the logits shape, type and place count."""
    loss = _find(name, kernel)
    form = loss.form(**_checked_options(name, loss, options))
    _check_logits(name, student_logits, teacher_logits, needs_teacher=loss.needs_teacher)
    known, labels = (*STATS, *form.extra_stats), arguments["labels"]
    stats = _wanted_stats(return_stats, known, teacher_logits is not None, labels is not None)
    needs_labels = loss.needs_labels or arguments["ce_weight"] > 0
    _check_labels(name, labels, student_logits, needed=needs_labels)
    if not needs_labels and "cross_entropy" not in stats:
        arguments["labels"] = None  # they would only make the collective larger
    request = Request(stats=stats, **arguments)
    _check_request(request, student_logits)
    return form, request


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
    given = {name: option.default for name, option in loss.options.items()} | dict(options)
    missing = [option for option, value in given.items() if value is None]
    if unknown:
        raise ValueError(f"loss {name!r} has no option {', '.join(unknown)}; its options: {known}")
    if missing:
        raise ValueError(f"loss {name!r} needs the option {', '.join(missing)}")
    return {key: option.check(key, given[key]) for key, option in loss.options.items()}


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
    if request.collective not in COLLECTIVES:
        raise ValueError(
            f"unknown collective {request.collective!r}; there are: {', '.join(COLLECTIVES)}"
        )
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
    return_stats: bool | tuple[str, ...],
    known: tuple[str, ...],
    has_teacher: bool,
    has_labels: bool,
) -> tuple[str, ...]:
    """Names of the statistics to return, each possible with what was given."""
    impossible = {"kl": not has_teacher, "cross_entropy": not has_labels}
    if return_stats is False:
        return ()
    if return_stats is True:
        return tuple(name for name in known if not impossible.get(name, False))
    unknown = [name for name in return_stats if name not in known]
    if unknown:
        raise ValueError(f"return_stats: unknown {unknown}; there are: {', '.join(known)}")
    for name in return_stats:
        if impossible.get(name, False):
            missing = "teacher_logits" if name == "kl" else "labels"
            raise ValueError(f"return_stats: {name!r} needs {missing}, got None")
    return tuple(return_stats)

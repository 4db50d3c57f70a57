"""The CUDA kernels of the losses, in Triton: the same three passes as native.cpp.

Imported by kernels.py alone, where logits are on a CUDA device or kernel="triton" asks for it.

Maths. What each pass computes is defined by forms.py and mixtures.py; arithmetic is fp32 whatever
the storage. The statistics of a softmax need its maximum, which is known only at the row's end. So
each thread keeps a maximum m of its own for every group of columns that it loads as one vector, and
rescales what it has summed when m rises (online softmax):

    m' = max(m, max x)    S' = S e^(m - m') + sum e^(x - m')    G' = G e^(m - m') + sum g e^(x - m')

Threads meet once, at the row's end, where each S is brought to the row's maximum in the same way.
Inside the loop there is no barrier and no exchange between threads, so loads of later blocks need
not wait for earlier sums, and a rescaling costs one exponential for a whole group.

Traffic, bytes per logit in bf16, both models, of one loss forward and backward:

    statistics   2 reads             4    one program per row walks over blocks of 4096 columns
    sums         2 reads             4    mixtures alone (tvd, gjs, skew), likewise
    gradient     2 reads, 1 write    6    one program per row and block; nothing to exchange
    together                        10    14 for the mixtures

Beside that a row moves a few floats. Nothing of the logits' size is allocated but the gradient, and
with `inplace` it goes to where the student's logits were.

A single pass that keeps a row on chip would need 6 bytes instead of 10, for rows that fit. It is
left out: the upstream gradient is not known before the backward, and a gradient written earlier
would either take a tensor of the logits' size or overwrite logits that the caller, who was promised
them until the backward, may still read.

Legend
    s, z, i           student, teacher and target logits of a block, [LANES, GROUP]
    top, total        maximum and sum of exponentials of each lane, [LANES]
    q, p              the student's and the target's (or teacher's) masses
    h                 dD/dq of a divergence D, up to a constant, see mixtures.py

NaN must reach the sums: `propagate_nan` where a maximum would drop it. Equal p and q must give a
gradient of exactly 0: the gradient is compiled without contraction of a b - c d.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra import libdevice

from taid_megatron.losses.forms import Form, Interpolated, Reverse, is_teacher
from taid_megatron.losses.mixtures import Mixture
from taid_megatron.losses.shards import FLOOR, Chunk, Columns

BLOCK = 4096
NUM_WARPS = 8
_VECTOR_BYTES = 16  # the widest load of a thread

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_COLUMNS = (
    *("max_s", "sum_s", "gap_s", "max_p", "sum_p", "gap_p", "student_p"),
    *("max_z", "sum_z", "gap_z", "label_s"),
)
_FLOOR = tl.constexpr(FLOOR)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


# ---- parts ---------------------------------------------------------------------------------------


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _log2(x):
    """Of a number in (0, 1], in one instruction for twenty; off by 2.4e-7, relatively below 1/2.

    The interpreter does not know it.
    """
    return tl.log2(x) if _INTERPRETED else libdevice.fast_log2f(x)


@triton.jit
def _load(row, columns, width, WHOLE: tl.constexpr):
    """Logits in fp32; -inf (a masked column, or none at all) becomes the floor, whose mass is 0.

    WHOLE: all columns are there. A mask whose end is no multiple of a vector would break it up.
    """
    if WHOLE:
        x = tl.load(row + columns)
    else:
        x = tl.load(row + columns, mask=columns < width, other=float("-inf"))
    return tl.maximum(x.to(tl.float32), _FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _number(t, TARGET: tl.constexpr):
    """t itself, or what it points to: a value on the device is never looked at by the host."""
    return tl.load(t).to(tl.float32) if TARGET == "tensor" else t


@triton.jit
def _interpolate(s, z, t):
    """(1 - t) s + t z from the nearer end, as torch.lerp: exact at 0, at 1 and where equal."""
    near = t < 0.5
    return tl.fma(tl.where(near, t, t - 1.0), z - s, tl.where(near, s, z))


@triton.jit
def _advance(x, top):
    """e^(x - m'), the risen maxima m', and e^(m - m') for what was summed so far."""
    risen = tl.maximum(top, tl.max(x, 1))
    return _exp(x - risen[:, None]), risen, _exp(top - risen)


@triton.jit
def _meet(top):
    """A row's maximum, and what brings each lane's sums to it."""
    highest = tl.max(top, 0)
    return highest, _exp(top - highest)


@triton.jit
def _add(wanted, total, scale, terms):
    return total if wanted is None else tl.fma(total, scale, tl.sum(terms, 1))


@triton.jit
def _put(out, at, total, scale):
    if out is not None:
        tl.store(out + at, tl.sum(total * scale, 0))


@triton.jit
def _columns(LANES: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr):
    """Of the first block, [LANES, GROUP]; a group is one thread's.

    Aligned, it is one vector. Else threads load single logits, neighbours side by side.
    """
    lane, place = tl.arange(0, LANES)[:, None], tl.arange(0, GROUP)[None, :]
    return lane * GROUP + place if ALIGNED else place * LANES + lane


@triton.jit
def _masses(s, z, row):
    """q, p, and of the smaller of the two: its ratio to the larger, and that ratio's logarithm.

    `row` has each model's maximum and log-sum. Two exponentials, and no ratio over- or underflows.
    """
    log_q = (s - tl.load(row)) - tl.load(row + 1)
    log_p = (z - tl.load(row + 2)) - tl.load(row + 3)
    gap = log_p - log_q
    ratio = _exp(-tl.abs(gap))
    large = _exp(tl.maximum(log_q, log_p))
    small = large * ratio
    return tl.where(gap > 0, small, large), tl.where(gap > 0, large, small), ratio, gap


# ---- what a mixture sums, and its slope h --------------------------------------------------------


@triton.jit
def _tvd(q, p, ratio, gap, share):
    rise = q - p
    return 0.5 * tl.abs(rise), 0.5 * ((rise > 0).to(tl.float32) - (rise < 0).to(tl.float32))


@triton.jit
def _mixture(ratio, gap, share):
    """r over the larger of q and p, log(q / r), log(p / r)."""
    share = tl.where(gap > 0, share, 1.0 - share)  # of the larger
    mixture = tl.fma(1.0 - share, ratio, share)
    log_mixture = _LN_2 * _log2(mixture)
    return mixture, -tl.maximum(gap, 0.0) - log_mixture, tl.minimum(gap, 0.0) - log_mixture


@triton.jit
def _gjs(q, p, ratio, gap, share):
    _, log_q, log_p = _mixture(ratio, gap, share)
    h = (1.0 - share) * log_q
    return share * p * log_p + q * h, h


@triton.jit
def _skew_kl(q, p, ratio, gap, share):
    mixture, _, log_p = _mixture(ratio, gap, share)
    return p * log_p, (share - 1.0) * (tl.where(gap > 0, 1.0, ratio) / mixture)


@triton.jit
def _skew_reverse_kl(q, p, ratio, gap, share):
    mixture, log_q, _ = _mixture(ratio, gap, share)
    return q * log_q, log_q + (share - 1.0) * (tl.where(gap > 0, ratio, 1.0) / mixture)


_MIXTURES = {
    "tvd": _tvd,
    "gjs": _gjs,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
}


# ---- passes --------------------------------------------------------------------------------------


# Where the number of tokens puts an output must not decide how many variants are compiled.
@triton.jit(do_not_specialize_on_alignment=list(_COLUMNS))
def _statistics(
    student,
    student_stride,
    teacher,
    teacher_stride,
    width,
    t,
    index,
    index_stride,
    max_s,
    sum_s,
    gap_s,
    max_p,
    sum_p,
    gap_p,
    student_p,
    max_z,
    sum_z,
    gap_z,
    label_s,
    step,
    TARGET: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One token: the statistics whose pointer is not None; `step` elements between tokens."""
    READS_TEACHER: tl.constexpr = (max_p is not None) or (max_z is not None) or (gap_s is not None)
    token = tl.program_id(0).to(tl.int64)
    student += token * student_stride
    teacher += token * teacher_stride
    at = token * step
    lowest = tl.full([LANES], _FLOOR, tl.float32)
    zero = tl.zeros([LANES], tl.float32)
    top_s, total_s, moment_s = lowest, zero, zero
    top_p, total_p, moment_p, level_p = lowest, zero, zero, zero
    top_z, total_z, moment_z = lowest, zero, zero
    first = _columns(LANES, GROUP, ALIGNED)
    whole = width // (LANES * GROUP) * (LANES * GROUP)
    for rest in tl.static_range(2):
        for start in range(whole * rest, width if rest else whole, LANES * GROUP):
            s = _load(student, start + first, width, rest == 0)
            z = _load(teacher, start + first, width, rest == 0) if READS_TEACHER else s
            e, top_s, scale = _advance(s, top_s)
            total_s = _add(sum_s, total_s, scale, e)
            moment_s = _add(gap_s, moment_s, scale, e * (s - z))
            if max_p is not None:
                i = z if TARGET == "teacher" else _interpolate(s, z, _number(t, TARGET))
                e, top_p, scale = _advance(i, top_p)
                total_p = _add(sum_p, total_p, scale, e)
                moment_p = _add(gap_p, moment_p, scale, e * (z - s))
                level_p = _add(student_p, level_p, scale, e * s)
            if max_z is not None:
                e, top_z, scale = _advance(z, top_z)
                total_z = _add(sum_z, total_z, scale, e)
                moment_z = _add(gap_z, moment_z, scale, e * (z - s))

    top, scale = _meet(top_s)
    tl.store(max_s + at, top)
    _put(sum_s, at, total_s, scale)
    _put(gap_s, at, moment_s, scale)
    if max_p is not None:
        top, scale = _meet(top_p)
        tl.store(max_p + at, top)
        _put(sum_p, at, total_p, scale)
        _put(gap_p, at, moment_p, scale)
        _put(student_p, at, level_p, scale)
    if max_z is not None:
        top, scale = _meet(top_z)
        tl.store(max_z + at, top)
        _put(sum_z, at, total_z, scale)
        _put(gap_z, at, moment_z, scale)
    if label_s is not None:
        label = tl.load(index + token * index_stride)
        # -inf says that another rank has the label; a masked label's own -inf becomes the floor
        logit = tl.where(
            label < 0, float("-inf"), _load(student, tl.maximum(label, 0), width, True)
        )
        tl.store(label_s + at, logit)


@triton.jit(do_not_specialize_on_alignment=["rows", "value", "slope"])
def _sums(
    student,
    student_stride,
    teacher,
    teacher_stride,
    width,
    share,
    rows,
    row_stride,
    value,
    slope,
    step,
    MIXTURE: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One token: sum D and sum q h over the columns."""
    token = tl.program_id(0).to(tl.int64)
    student += token * student_stride
    teacher += token * teacher_stride
    rows += token * row_stride
    total_d = tl.zeros([LANES], tl.float32)
    total_h = tl.zeros([LANES], tl.float32)
    first = _columns(LANES, GROUP, ALIGNED)
    whole = width // (LANES * GROUP) * (LANES * GROUP)
    for rest in tl.static_range(2):
        for start in range(whole * rest, width if rest else whole, LANES * GROUP):
            s = _load(student, start + first, width, rest == 0)
            z = _load(teacher, start + first, width, rest == 0)
            q, p, ratio, gap = _masses(s, z, rows)
            d, h = MIXTURE(q, p, ratio, gap, share)
            total_d += tl.sum(d, 1)
            total_h += tl.sum(q * h, 1)
    tl.store(value + token * step, tl.sum(total_d, 0))
    tl.store(slope + token * step, tl.sum(total_h, 0))


@triton.jit
def _slope(s, z, t, rows, FORM: tl.constexpr, TARGET: tl.constexpr, MIXTURE: tl.constexpr):
    """Gradient of a block, the label's column apart; `rows` are one token's coefficients."""
    if FORM == "mixture":
        q, p, ratio, gap = _masses(s, z, rows)
        _, h = MIXTURE(q, p, ratio, gap, t)
        gradient = q * (h * tl.load(rows + 4) + tl.load(rows + 5))
    elif FORM == "reverse":
        gradient = _exp(s - tl.load(rows)) * ((s - z) * tl.load(rows + 1) + tl.load(rows + 2))
    else:
        gradient = _exp(s - tl.load(rows)) * tl.load(rows + 1)
    if FORM == "interpolated":
        i = z if TARGET == "teacher" else _interpolate(s, z, _number(t, TARGET))
        gradient -= _exp(i - tl.load(rows + 2)) * tl.load(rows + 3)
    return gradient


@triton.jit(do_not_specialize=["block"], do_not_specialize_on_alignment=["rows", "addend"])
def _gradient(
    student,
    student_stride,
    teacher,
    teacher_stride,
    width,
    t,
    rows,
    row_stride,
    index,
    index_stride,
    addend,
    addend_stride,
    out,
    out_stride,
    block,
    WHOLE: tl.constexpr,
    FORM: tl.constexpr,
    TARGET: tl.constexpr,
    MIXTURE: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One block of one token, from `block` on; `out` may be the student's storage.

    `rows` is what form.coefficients gives, t the share of a mixture. WHOLE: see _load.
    """
    token = tl.program_id(0).to(tl.int64)
    block += tl.program_id(1)
    columns = block * (LANES * GROUP) + _columns(LANES, GROUP, ALIGNED)
    student += token * student_stride
    teacher += token * teacher_stride
    rows += token * row_stride
    out += token * out_stride
    s = _load(student, columns, width, WHOLE)
    z = s if FORM == "cross_entropy" else _load(teacher, columns, width, WHOLE)
    gradient = _slope(s, z, t, rows, FORM, TARGET, MIXTURE)
    if addend is not None:
        label = tl.load(index + token * index_stride)
        surplus = tl.load(addend + token * addend_stride)
        gradient = tl.where(columns == label, gradient + surplus, gradient)
    if WHOLE:
        tl.store(out + columns, gradient)
    else:
        tl.store(out + columns, gradient, mask=columns < width)


# ---- the kernel as the driver sees it ------------------------------------------------------------


class TritonKernel:
    """The three passes; see kernels.Kernel."""

    def refusal(self, form: Form, student: Tensor, teacher: Tensor | None) -> str | None:
        """See kernels.Kernel."""
        if type(form) not in (Interpolated, Reverse, Mixture):
            return "does not have this loss"
        if student.device.type != "cuda" and not knobs.runtime.interpret:
            return f"works on CUDA, not on {student.device} (TRITON_INTERPRET=1 runs it there)"
        t = form.t if isinstance(form, Interpolated) else None
        if isinstance(t, Tensor) and t.device != student.device:
            return f"needs t on the logits' {student.device}, not on {t.device}"
        for logits in (student, student if teacher is None else teacher):
            if logits.dtype not in _TYPES:
                return f"works on float32, bfloat16 and float16 logits, not on {logits.dtype}"
            if logits.dim() == 0 or (logits.shape[-1] > 1 and logits.stride(-1) != 1):
                return f"needs logits whose vocabulary axis has stride 1, not {logits.stride()}"
        return None

    def fill(self, form: Form, chunk: Chunk, columns: Columns) -> None:
        """See kernels.Kernel."""
        with torch.cuda.device_of(chunk.student):
            _statistics[(chunk.student.shape[0],)](
                *_logits(chunk),
                _share(form),
                *(chunk.index, chunk.index.stride(0)),
                *(columns.get(name) for name in _COLUMNS),
                columns["max_s"].stride(0),
                TARGET=_target(form),
                **_tile(chunk.student, chunk.teacher),
            )

    def fill_sums(self, form: Form, chunk: Chunk, rows: Tensor, columns: Columns) -> None:
        """See kernels.Kernel."""
        assert isinstance(form, Mixture)
        with torch.cuda.device_of(chunk.student):
            _sums[(chunk.student.shape[0],)](
                *_logits(chunk),
                form.share,
                *(rows, rows.stride(0)),
                *(columns["value"], columns["slope"], columns["value"].stride(0)),
                MIXTURE=_MIXTURES[form.kind],
                **_tile(chunk.student, chunk.teacher),
            )

    def gradient(
        self, form: Form, chunk: Chunk, rows: Tensor, addend: Tensor | None, out: Tensor
    ) -> None:
        """See kernels.Kernel."""
        tokens, width = chunk.student.shape
        # A mask that breaks up vectors is for the last block alone.
        whole = width // BLOCK if width % _VECTOR_BYTES else 0
        for block, blocks in ((0, whole), (whole, triton.cdiv(width, BLOCK) - whole)):
            if blocks == 0:
                continue
            with torch.cuda.device_of(chunk.student):
                _gradient[(tokens, blocks)](
                    *_logits(chunk),
                    _share(form),
                    *(rows, rows.stride(0)),
                    *(chunk.index, chunk.index.stride(0)),
                    *(addend, 0 if addend is None else addend.stride(0)),
                    *(out, out.stride(0)),
                    block,
                    WHOLE=block < whole,
                    FORM=_name(form),
                    TARGET=_target(form),
                    MIXTURE=_MIXTURES[form.kind] if isinstance(form, Mixture) else None,
                    **_tile(chunk.student, chunk.teacher, out),
                    # p and q may be equal: see the head of this file
                    enable_fp_fusion=False,
                )


def _logits(chunk: Chunk) -> tuple[Tensor, int, Tensor, int, int]:
    student, teacher = chunk.student, chunk.teacher
    return student, student.stride(0), teacher, teacher.stride(0), student.shape[1]


def _tile(*logits: Tensor) -> dict[str, Any]:
    """A block's shape: a group is what one thread loads at once, of the widest type."""
    group = _VECTOR_BYTES // max(x.element_size() for x in logits)
    # In elements: triton itself takes a stride for aligned where 16 divides it.
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 for x in logits)
    tile = {"LANES": BLOCK // group, "GROUP": group, "ALIGNED": aligned}
    return {**tile, "num_warps": NUM_WARPS}


def _name(form: Form) -> str:
    if isinstance(form, Mixture):
        return "mixture"
    if isinstance(form, Reverse):
        return "reverse"
    return "cross_entropy" if isinstance(form, Interpolated) and form.t is None else "interpolated"


def _share(form: Form) -> float | Tensor:
    """The teacher's share of a mixture, else the target's t: a tensor is read by the device."""
    if isinstance(form, Mixture):
        return form.share
    t = form.t if isinstance(form, Interpolated) else 1.0
    return 1.0 if t is None else t


def _target(form: Form) -> str:
    """How the target's logits are made."""
    t = form.t if isinstance(form, Interpolated) else 1.0
    if t is None or is_teacher(t):
        return "teacher"
    return "tensor" if isinstance(t, Tensor) else "number"

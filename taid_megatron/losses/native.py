"""The native CPU kernel: native.cpp, compiled once per machine kind and cached, called by ctypes.

It does taid, forward KL, reverse KL, cross-entropy and the mixtures in fp32 arithmetic on fp32 and
bf16 logits. Threads: torch's own number.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from taid_megatron.losses.forms import Form, Interpolated, Reverse
from taid_megatron.losses.mixtures import Mixture
from taid_megatron.losses.shards import Chunk, Columns

_SOURCE = Path(__file__).with_name("native.cpp")
# -ffp-contract=off: where p and q are equal the gradient must be 0, not a rounding's residue.
_FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fopenmp-simd"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
)
# By what torch says this CPU can do: a cache folder may be shared by several kinds of machines.
_CPU_FLAGS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
        "-mprefer-vector-width=512",
    ),
}
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_KINDS = {"tvd": 3, "gjs": 4, "skew_kl": 5, "skew_reverse_kl": 6}
_COLUMNS = (
    *("max_s", "sum_s", "gap_s", "max_p", "sum_p", "gap_p", "student_p"),
    *("max_z", "sum_z", "gap_z", "label_s"),
)
_COMPILE_SECONDS = 120

_log = logging.getLogger("taid_megatron")


class _Logits(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("type", ctypes.c_int)]


class _Columns(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in _COLUMNS] + [("step", ctypes.c_int64)]


class NativeKernel:
    """The compiled passes; see kernels.Kernel."""

    def __init__(self, library: ctypes.CDLL) -> None:
        integer, real, pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
        logits: tuple[Any, ...] = (_Logits, _Logits, integer, integer)
        kind, threads = ctypes.c_int, ctypes.c_int
        rows: tuple[Any, ...] = (pointer, integer)
        index = label = rows
        self._fill, self._sums, self._gradient = (
            library.taid_fill,
            library.taid_sums,
            library.taid_gradient,
        )
        self._fill.argtypes = [*logits, real, *index, _Columns, threads]
        self._sums.argtypes = [*logits, kind, real, *rows, pointer, pointer, integer, threads]
        out = (pointer, integer, ctypes.c_int)
        self._gradient.argtypes = [*logits, kind, real, *rows, *index, *label, *out, threads]
        for function in (self._fill, self._sums, self._gradient):
            function.restype = None

    def refusal(self, form: Form, student: Tensor, teacher: Tensor | None) -> str | None:
        """See kernels.Kernel."""
        if type(form) not in (Interpolated, Reverse, Mixture):
            return "does not have this loss"
        for logits in (student, student if teacher is None else teacher):
            if logits.device.type != "cpu":
                return f"works on the CPU, not on {logits.device}"
            if logits.dtype not in _TYPES:
                return f"works on float32 and bfloat16 logits, not on {logits.dtype}"
            if logits.dim() == 0 or (logits.shape[-1] > 1 and logits.stride(-1) != 1):
                return f"needs logits whose vocabulary axis has stride 1, not {logits.stride()}"
        return None

    def fill(self, form: Form, chunk: Chunk, columns: Columns) -> None:
        """See kernels.Kernel."""
        pointers = {name: columns[name].data_ptr() for name in _COLUMNS if name in columns}
        self._fill(
            *_logits(chunk),
            _target(form),
            *(chunk.index.data_ptr(), chunk.index.stride(0)),
            _Columns(**pointers, step=columns["max_s"].stride(0)),
            torch.get_num_threads(),
        )

    def fill_sums(self, form: Form, chunk: Chunk, rows: Tensor, columns: Columns) -> None:
        """See kernels.Kernel."""
        value, slope = columns["value"], columns["slope"]
        self._sums(
            *_logits(chunk),
            _kind(form),
            _share(form),
            *(rows.data_ptr(), rows.stride(0)),
            *(value.data_ptr(), slope.data_ptr(), value.stride(0)),
            torch.get_num_threads(),
        )

    def gradient(
        self, form: Form, chunk: Chunk, rows: Tensor, addend: Tensor | None, out: Tensor
    ) -> None:
        """See kernels.Kernel."""
        label = (None, 0) if addend is None else (addend.data_ptr(), addend.stride(0))
        self._gradient(
            *_logits(chunk),
            _kind(form),
            _share(form),
            *(rows.data_ptr(), rows.stride(0)),
            *(chunk.index.data_ptr(), chunk.index.stride(0), *label),
            *(out.data_ptr(), out.stride(0), _TYPES[out.dtype]),
            torch.get_num_threads(),
        )


def _logits(chunk: Chunk) -> tuple[_Logits, _Logits, int, int]:
    student, teacher = (
        _Logits(x.data_ptr(), x.stride(0), _TYPES[x.dtype]) for x in (chunk.student, chunk.teacher)
    )
    return student, teacher, *chunk.student.shape


def _kind(form: Form) -> int:
    if isinstance(form, Mixture):
        return _KINDS[form.kind]
    if isinstance(form, Reverse):
        return 2
    return 0 if isinstance(form, Interpolated) and form.t is None else 1


def _target(form: Form) -> float:
    """The target's t; 1 is the teacher itself."""
    t = form.t if isinstance(form, Interpolated) else 1.0
    return 1.0 if t is None else float(t)


def _share(form: Form) -> float:
    """The teacher's share of a mixture, else the target's t."""
    return form.share if isinstance(form, Mixture) else _target(form)


@functools.cache
def load(required: bool) -> NativeKernel | None:
    """The kernel, compiled if need be; where it cannot be, None (said once) or, required, an error.

    Raises:
        ValueError: required, and there is no compiler or it failed.
    """
    try:
        return NativeKernel(ctypes.CDLL(str(_compiled())))
    except (OSError, subprocess.SubprocessError) as error:
        why = " ".join(str(error).split())
        if required:
            raise ValueError(f"kernel='native' cannot be built: {why}") from error
        _log.warning("losses take torch's operations, the native kernel cannot be built: %s", why)
        return None


def _compiled() -> Path:
    """The library in the cache, after compiling it if it is not there."""
    compiler = _compiler()
    flags = (*_FLAGS, *_cpu_flags())
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    key = xxhash.xxh3_128_hexdigest(
        _SOURCE.read_bytes() + repr((flags, version, platform.machine())).encode()
    )
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "taid_megatron"
    target = folder / f"native-{key}.so"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Several ranks may compile at once: each to a name of its own, the last one stays.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / target.name
            line = [compiler, *flags, str(_SOURCE), "-o", str(built)]
            done = subprocess.run(
                line, capture_output=True, text=True, check=False, timeout=_COMPILE_SECONDS
            )
            if done.returncode != 0:
                first = next((x for x in done.stderr.splitlines() if "error" in x), done.stderr)
                raise OSError(f"{compiler} failed: {first}")
            os.replace(built, target)
    return target


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise OSError("no C++ compiler found (g++, c++, clang++, or CXX)")


def _cpu_flags() -> tuple[str, ...]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return ()
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in _CPU_FLAGS:
        raise OSError(f"it needs AVX2, this CPU has {capability}")
    return _CPU_FLAGS[capability]

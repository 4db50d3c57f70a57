"""Which code walks over the logits: torch's own operations in chunks, or one fused kernel.

A kernel does what a form's methods on a chunk do, on all tokens at once and without buffers. It is
held to them by tests; which of the two runs changes time and nothing else.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from taid_megatron.losses.forms import Form
from taid_megatron.losses.shards import Chunk, Columns

KERNELS = ("auto", "triton", "native", "torch")

_log = logging.getLogger("taid_megatron")


class Kernel(Protocol):
    """Fused passes over [T, V] logits of any strides whose last is 1; `chunk.buffers` is empty."""

    def refusal(self, form: Form, student: Tensor, teacher: Tensor | None) -> str | None:
        """Why it cannot do this, in a few words; None where it can."""
        ...

    def fill(self, form: Form, chunk: Chunk, columns: Columns) -> None:
        """As form.fill."""
        ...

    def fill_sums(self, form: Form, chunk: Chunk, rows: Tensor, columns: Columns) -> None:
        """As the pass that form.refine asks for by `walk.sums`."""
        ...

    def gradient(
        self, form: Form, chunk: Chunk, rows: Tensor, addend: Tensor | None, out: Tensor
    ) -> None:
        """As form.gradient, plus `addend` [T] in the label's column; `out` in any float type."""
        ...


def choose(kernel: str, form: Form, student: Tensor, teacher: Tensor | None) -> Kernel | None:
    """The kernel to use, None for torch's operations. Raises ValueError where one cannot."""
    if kernel == "torch":
        return None
    found = _load(kernel, student)
    if found is None:
        return None
    refusal = found.refusal(form, student, teacher)
    if refusal is None:
        return found
    if kernel == "auto":
        return None
    raise ValueError(f"kernel={kernel!r} {refusal}; kernel='auto' takes what can")


def _load(kernel: str, student: Tensor) -> Kernel | None:
    """The kernel of that name, or under 'auto' the one for the logits' device, if there is one."""
    name = _BY_DEVICE.get(student.device.type) if kernel == "auto" else kernel
    return None if name is None else _LOADERS[name](kernel != "auto")


def _native(required: bool) -> Kernel | None:
    from taid_megatron.losses import native

    return native.load(required)


@functools.cache
def _triton(required: bool) -> Kernel | None:
    try:
        from taid_megatron.losses import triton_kernels
    except ImportError as error:
        why = f"triton cannot be imported ({error}); pip install 'taid-megatron[triton]'"
        if required:
            raise ValueError(f"kernel='triton' is not available: {why}") from error
        _log.warning("losses take torch's operations: %s", why)
        return None
    return triton_kernels.TritonKernel()


_LOADERS: dict[str, Callable[[bool], Kernel | None]] = {"native": _native, "triton": _triton}
_BY_DEVICE = {"cpu": "native", "cuda": "triton"}

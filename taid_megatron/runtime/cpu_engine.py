"""megatron-core without CUDA: its tensors on the CPU, its collectives over gloo.

megatron-core names the device "cuda" in its factory calls and asks torch.cuda for the current
device and random state. One TorchFunctionMode redirects the factories; the functions of torch.cuda
that a CPU build cannot answer are replaced; gloo's scatter, which silently sends the wrong bytes of
a non-contiguous chunk, gets contiguous ones. One thing is for speed alone: freed memory is kept for
the next tensor. Nothing of megatron-core itself is rewritten, nothing else in this package knows of
this module, and where CUDA is present it does nothing.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_mode: TorchFunctionMode | None = None


def prepare_import() -> None:
    """Import megatron-core without its torch.compile decorations; to be called before others do.

    On a CPU they would want a compiler at the first call, and they load torch's inductor: two
    seconds for every process. With CUDA, or once megatron-core is imported, this does nothing.
    """
    if torch.cuda.is_available() or "megatron.core" in sys.modules:
        return
    compile_function = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        import megatron.core.jit  # noqa: F401, its jit_fuser is torch.compile as it is now
    finally:
        torch.compile = compile_function


def _as_it_is(model: Any = None, **options: Any) -> Any:
    """In place of torch.compile, as decorator with and without options."""
    return (lambda function: function) if model is None else model


def install() -> bool:
    """Make megatron-core run on this machine's CPU; True where that was needed.

    Call it before the first import of megatron.core. Calling it again does nothing. Acts on the
    calling thread (torch's function modes are per thread), the one that runs the model.
    """
    global _mode
    if torch.cuda.is_available():
        return False
    if _mode is None:
        _mode = _CudaMeansCpu()
        _mode.__enter__()
        _replace_torch_cuda()
        _replace_megatron_rng()
        _contiguous_scatter()
        _keep_freed_memory()
    return True


def _names_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _CudaMeansCpu(TorchFunctionMode):
    """Every tensor that asks for a CUDA device is made on the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # megatron-core's optimizers sort parameters by the name 'torch.cuda.FloatTensor'
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        if kwargs and _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        return func(*args, **(kwargs or {}))


def _replace_torch_cuda() -> None:
    # one function object each: torch.compile refuses the same one under two names
    replacements: dict[str, Any] = {
        "current_device": lambda: CPU,
        "set_device": lambda *args: None,
        "synchronize": lambda *args, **kwargs: None,
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: False,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    # tied embeddings under pipeline parallelism move the shared weight with .cuda()
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]


def _replace_megatron_rng() -> None:
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _contiguous_scatter() -> None:
    scatter = torch.distributed.scatter

    @functools.wraps(scatter)
    def contiguous_scatter(
        tensor: torch.Tensor, scatter_list: list | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if scatter_list is not None:
            scatter_list = [chunk.contiguous() for chunk in scatter_list]
        return scatter(tensor, scatter_list, *args, **kwargs)

    torch.distributed.scatter = contiguous_scatter


def _keep_freed_memory() -> None:
    """Let glibc keep what tensors free for the next ones, up to 2 GiB.

    By default each tensor of 32 MiB and more is mapped anew and handed back: the system clears its
    pages again at every step, which took 6% of a small pair's step.
    """
    most, mmap_max, trim_threshold = 2**31 - 1, -4, -1
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # another C library than glibc: only slower
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, most)

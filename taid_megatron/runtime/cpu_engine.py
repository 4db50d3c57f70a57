"""megatron-core without CUDA: its tensors on the CPU, its collectives over gloo.

megatron-core names the device "cuda" in its factory calls and asks torch.cuda for the current
device and random state. torch's factories are wrapped to make such tensors on the CPU (a
TorchFunctionMode would do it too, but sees every call: a quarter of a small model's step); the
functions of torch.cuda that a CPU build cannot answer are replaced; gloo's scatter, which silently
sends the wrong bytes of a non-contiguous chunk, gets contiguous ones. One thing is for speed alone:
freed memory is kept for the next tensor. Nothing of megatron-core itself is rewritten, nothing else
in this package knows of this module, and where CUDA is present it does nothing.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from taid_megatron.runtime import transformer_engine

CPU = torch.device("cpu")
# Those that megatron-core gives a device, and their likes. One left out fails loudly.
_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like",
    "linspace", "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like",
    "randperm", "tensor", "zeros", "zeros_like",
)  # fmt: skip
_installed = False


def prepare_import() -> None:
    """Import megatron-core without its torch.compile decorations; to be called before others do.

    On a CPU they would want a compiler at the first call, and they load torch's inductor: two
    seconds for every process. With CUDA, or once megatron-core is imported, that is left alone.
    Transformer Engine is probed in any case.
    """
    transformer_engine.probe()
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
    whole process.
    """
    global _installed
    transformer_engine.probe()
    if torch.cuda.is_available():
        return False
    if not _installed:
        _installed = True
        _make_tensors_on_cpu()
        _replace_torch_cuda()
        _replace_megatron_rng()
        _contiguous_scatter()
        _keep_freed_memory()
    return True


def _names_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _make_tensors_on_cpu() -> None:
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    to, type_name = torch.Tensor.to, torch.Tensor.type

    @functools.wraps(to)
    def to_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _names_cuda(args[0]):
            args = (CPU, *args[1:])
        return to(self, *args, **_device_on_cpu(kwargs))

    @functools.wraps(type_name)
    def cuda_type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # megatron-core's optimizers sort parameters by the name 'torch.cuda.FloatTensor'
        if args or kwargs:
            return type_name(self, *args, **kwargs)
        return type_name(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.to = to_cpu  # type: ignore[assignment]
    torch.Tensor.type = cuda_type_name  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        return factory(*args, **_device_on_cpu(kwargs))

    return make


def _device_on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    if kwargs.get("pin_memory"):  # for a copy to the GPU: torch refuses it where there is none
        kwargs = {**kwargs, "pin_memory": False}
    return {**kwargs, "device": CPU} if _names_cuda(kwargs.get("device")) else kwargs


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

"""The Triton kernels without a GPU: in the interpreter, compiled for sm_90, asked for in vain.

tests/gpu/test_losses.py runs them on a device.
"""

import logging
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from taid_megatron import losses
from taid_megatron.losses import distillation_loss, kernels
from taid_megatron.losses.forms import Interpolated, Reverse
from taid_megatron.losses.mixtures import Mixture
from taid_megatron.losses.shards import STATS, Chunk, Request

TESTS = Path(__file__).parent
has_wheels = platform.system() == "Linux" and platform.machine() == "x86_64"
needs_triton = pytest.mark.skipif(not has_wheels, reason="triton's wheels are for Linux on x86_64")

MIXTURES = ("tvd", "gjs", "skew_kl", "skew_reverse_kl")
FORMS = {
    "taid": Interpolated(0.4),
    "taid, t on the device": Interpolated(torch.tensor(0.4)),
    "forward_kl": Interpolated(1.0),
    "cross_entropy": Interpolated(None),
    "reverse_kl": Reverse(),
    **{kind: Mixture(kind, 0.1) for kind in MIXTURES},
}


@needs_triton
def test_in_the_interpreter():
    """Every test in interpreted.py, in a process where triton is imported for it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    done = subprocess.run(
        [*command, str(TESTS / "interpreted.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=TESTS.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


class Hopper:
    """Stands for the driver of an H100 or H200 that is not there."""

    def get_current_device(self):
        return -1  # no device has this number: nothing compiled here is ever run

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Names and binaries of all that is launched: compiled as for an H200, and not run."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.append((self.fn.__name__, kernel.asm["cubin"]))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", Hopper())
    monkeypatch.setattr(JITFunction, "run", compile_only)
    return found


def launch_all(form, dtype, width, stride):
    """The passes of a form: with nothing and with all that can be asked for beside the loss."""
    from taid_megatron.losses.triton_kernels import TritonKernel

    kernel = TritonKernel()
    student, teacher = torch.zeros(2, 4, stride, dtype=dtype)[..., :width]
    chunk = Chunk(student, teacher, torch.zeros(4, 1, dtype=torch.int64), ())
    rows = torch.zeros(4, 7)
    for request in (Request(), Request(labels=torch.zeros(4, dtype=torch.int64), stats=STATS)):
        names = form.names(request)
        kernel.fill(form, chunk, dict(zip(names, torch.zeros(len(names), 4), strict=True)))
        addend = None if request.labels is None else rows[:, -1]
        kernel.gradient(form, chunk, rows, addend, student)
    if isinstance(form, Mixture):
        columns = {"value": torch.zeros(4), "slope": torch.zeros(4)}
        kernel.fill_sums(form, chunk, rows[:, :4], columns)


def cuobjdump(option, cubin, folder):
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout


def resources(cubin, folder):
    """Registers per thread, and bytes of memory that stands in for registers."""
    text = cuobjdump("--dump-resource-usage", cubin, folder)
    usage = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


LAYOUTS = {
    "bf16": (torch.bfloat16, 32000, 32000),
    "fp32": (torch.float32, 32000, 32000),
    "bf16 padded": (torch.bfloat16, 50257, 50304),
    "fp16 unaligned": (torch.float16, 50257, 50257),
}


@needs_triton
@pytest.mark.parametrize(
    ("form", "layout"),
    [
        *((form, "bf16") for form in FORMS),
        *(("taid", layout) for layout in LAYOUTS if layout != "bf16"),
        ("gjs", "fp32"),
        ("gjs", "fp16 unaligned"),
    ],
)
def test_compiled_for_sm_90_nothing_is_spilled(form, layout, compiled, tmp_path):
    """256 threads a program: at 128 registers, two of them share a multiprocessor."""
    form = FORMS[form]
    launch_all(form, *LAYOUTS[layout])
    passes = {"_statistics", "_gradient"} | ({"_sums"} if isinstance(form, Mixture) else set())
    assert {name for name, _ in compiled} == passes
    for name, cubin in compiled:
        registers, spilled = resources(cubin, tmp_path)
        assert spilled == 0, name
        assert 16 <= registers <= 128, name


@needs_triton
def test_a_spill_would_be_seen(compiled, tmp_path, monkeypatch):
    from taid_megatron.losses import triton_kernels

    tile = triton_kernels._tile
    monkeypatch.setattr(triton_kernels, "_tile", lambda *x: {**tile(*x), "maxnreg": 32})
    launch_all(FORMS["taid"], *LAYOUTS["bf16"])
    assert any(resources(cubin, tmp_path)[1] > 0 for _, cubin in compiled)


@needs_triton
def test_what_the_interpreter_cannot_show(compiled, tmp_path):
    """NaN survives the clamp of masked logits; equal masses cancel exactly.

    numpy's maximum hands NaN on in any case, and it rounds every product: q a - p b with one
    product unrounded would leave its rounding where q a and p b are equal.
    """
    launch_all(FORMS["forward_kl"], *LAYOUTS["bf16"])
    for name, cubin in compiled:
        text = cuobjdump("--dump-sass", cubin, tmp_path)
        assert "FMNMX.NAN" in text
        if name == "_gradient":
            assert "FMUL" in text
            assert "FFMA" not in text


@needs_triton
def test_asked_for_on_the_cpu():
    logits = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"kernel='triton' works on CUDA, not on cpu \(TRITON_INT"):
        distillation_loss("forward_kl", logits, logits, kernel="triton")


@pytest.fixture
def _without_triton(monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == "triton":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, f"{losses.__name__}.triton_kernels", raising=False)
    monkeypatch.delattr(losses, "triton_kernels", raising=False)
    kernels._triton.cache_clear()
    yield
    kernels._triton.cache_clear()


@pytest.mark.usefixtures("_without_triton")
def test_asked_for_where_triton_is_missing():
    logits = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"not available: .*pip install 'taid-megatron\[triton\]'"):
        distillation_loss("forward_kl", logits, logits, kernel="triton")


@pytest.mark.usefixtures("_without_triton")
def test_without_triton_torch_takes_over_and_says_so_once(caplog):
    """As on a CUDA device, where kernel='auto' loads by the device's name."""
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        assert kernels._LOADERS[kernels._BY_DEVICE["cuda"]](False) is None
    assert caplog.text.count("losses take torch's operations: triton cannot be imported") == 1

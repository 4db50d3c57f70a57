"""The native kernel beside torch's operations: when it is taken, what it says when it cannot."""

import shutil
import subprocess
import sys

import pytest
import torch

from taid_megatron.losses import distillation_loss, kernels, native
from taid_megatron.losses.forms import Decoupled, Interpolated, Reverse
from taid_megatron.losses.mixtures import Mixture
from tests.unit.losses.divergences import CASES, assert_as_torchs_operations

COVERED = ("taid", "forward_kl", "reverse_kl", "tvd", "gjs", "skew_kl", "skew_reverse_kl")
COVERED += ("cross_entropy",)
has_compiler = any(map(shutil.which, ("g++", "c++", "clang++")))
needs_compiler = pytest.mark.skipif(not has_compiler, reason="no C++ compiler on this machine")


@needs_compiler
def test_auto_takes_it_where_it_can_and_torch_elsewhere():
    logits = torch.zeros(2, 8)
    for form in (Interpolated(0.4), Interpolated(None), Reverse(), Mixture("gjs", 0.1)):
        assert isinstance(kernels.choose("auto", form, logits, logits), native.NativeKernel)
        assert kernels.choose("torch", form, logits, logits) is None
        for dtype in (torch.float16, torch.float64):
            half = logits.to(dtype)
            assert kernels.choose("auto", form, half, half) is None
    assert kernels.choose("auto", Decoupled(1.0, 8.0, 4.0), logits, logits) is None


@needs_compiler
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("adaptive_kl", {}, "kernel='native' does not have this loss; kernel='auto' takes"),
        ("forward_kl", {"dtype": torch.float16}, "not on torch.float16"),
        ("forward_kl", {"strided": True}, r"vocabulary axis has stride 1, not \(16, 2\)"),
    ],
)
def test_asked_for_and_impossible(name, change, message):
    logits = torch.zeros(4, 16, dtype=change.get("dtype", torch.float32))
    logits = logits[:, ::2] if "strided" in change else logits
    with pytest.raises(ValueError, match=message):
        distillation_loss(name, logits, logits, kernel="native")


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", COVERED)
def test_rows_of_many_blocks_any_token_stride_and_threads(name, threads):
    """A vocabulary of no multiple of a block, logits inside wider rows, labels at the borders."""
    case = next(case for case in CASES.values() if case.name == name)
    generator = torch.Generator().manual_seed(1)
    wide = 5 * torch.randn(2, 3, 7, 2600, generator=generator)
    student, teacher = wide[..., 1:2600].transpose(1, 2)
    labels = torch.tensor([0, 511, 512, 1023, 1024, 2598, -100]).unsqueeze(1).expand(7, 3)
    upstream = torch.rand(7, 3, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_as_torchs_operations(case, "native", student, teacher, labels, upstream)
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_equal_models_give_a_gradient_of_exactly_zero():
    logits = 5 * torch.randn(6, 3000, generator=torch.Generator().manual_seed(0))
    for name, options in (("forward_kl", {}), ("taid", {"t": 0.0}), ("tvd", {})):
        leaf = logits.clone().requires_grad_()
        loss = distillation_loss(name, leaf, logits, kernel="native", **options)
        loss.sum().backward()
        assert not loss.any()
        assert not leaf.grad.any()


CODE = """
import logging, sys, torch
logging.basicConfig(format="%(message)s")
from taid_megatron.losses import distillation_loss
logits = torch.zeros(2, 8)
for _ in range(2):
    distillation_loss("forward_kl", logits, logits)
try:
    distillation_loss("forward_kl", logits, logits, kernel="native")
except ValueError as error:
    print(error)
"""


def _run_without(tmp_path, **environment):
    environment = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), **environment}
    return subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True
    )


def test_without_a_compiler_torch_takes_over_and_says_so_once(tmp_path):
    done = _run_without(tmp_path, PATH=str(tmp_path))
    assert done.stderr.count("losses take torch's operations") == 1
    assert "no C++ compiler found (g++, c++, clang++, or CXX)" in done.stderr
    assert "kernel='native' cannot be built: no C++ compiler found" in done.stdout


@needs_compiler
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo 1; exit 0; }\n'
        "echo 'x.cpp:1: error: no such flag' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    done = _run_without(tmp_path, PATH="/usr/bin:/bin", CXX=str(compiler))
    assert "failed: x.cpp:1: error: no such flag" in done.stdout
    assert list((tmp_path / "cache" / "taid_megatron").iterdir()) == []

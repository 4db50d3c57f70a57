"""The Triton kernels in Triton's interpreter, on the CPU: test_triton.py runs this file.

A process of its own, because triton must be imported with TRITON_INTERPRET=1. A block of columns
takes some milliseconds here, whatever its size: blocks and shapes are small, and still several.
"""

import math

import pytest
import torch

from taid_megatron.losses import (
    distillation_loss,
    kernels,
    reference,
    triton_kernels,
    vocab_parallel,
)
from taid_megatron.losses.forms import Interpolated
from taid_megatron.losses.shards import Request
from tests.unit.losses.divergences import (
    CASES,
    assert_accurate,
    assert_as_torchs_operations,
    exact,
)
from tests.unit.losses.test_divergences import make, run

WITHOUT = ("adaptive_kl", "dkd", "ctkd")
COVERED = {key: case for key, case in CASES.items() if case.name not in WITHOUT}
ONE_EACH = {key: case for key, case in COVERED.items() if key == case.name}
every_case = pytest.mark.parametrize("case", ONE_EACH.values(), ids=ONE_EACH)

BLOCK = 1024
# Two blocks, the second ends within a thread's group.
WIDTH = 1239


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(triton_kernels, "BLOCK", BLOCK)


def stored(x, dtype):
    """As the interpreter stores fp32 in `dtype`: to bf16, unlike a GPU, it cuts the bits off."""
    if dtype == torch.bfloat16:
        x = (x.view(torch.int32) & -0x10000).view(x.dtype)
    return x.to(dtype)


@pytest.mark.parametrize("case", COVERED.values(), ids=COVERED)
def test_value_and_gradient_within_the_promised_error(case):
    for ce_weight in (0.0, 0.25):
        inputs = make(3, 1009)
        found = run(case, *inputs, ce_weight, kernel="triton")
        assert_accurate(case, *found, *exact(case, *inputs, ce_weight))


@every_case
def test_several_blocks_any_token_stride_labels_at_the_borders(case):
    """Logits inside wider, unaligned rows, tokens that do not lie one after the other."""
    generator = torch.Generator().manual_seed(1)
    wide = 5 * torch.randn(2, 2, 3, WIDTH + 3, generator=generator)
    student, teacher = wide[..., 1 : WIDTH + 1].transpose(1, 2)
    labels = torch.tensor([[0, -100], [1023, 1024], [WIDTH - 1, 1232]])
    upstream = torch.rand(3, 2, generator=generator)
    assert_as_torchs_operations(case, "triton", student, teacher, labels, upstream)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_storage_is_computed_in_fp32_and_inplace_takes_the_storage(case, dtype):
    student, teacher, labels, upstream = make(2, WIDTH, dtype=dtype)
    wide = (student.float(), teacher.float(), labels, upstream)
    expected = run(case, *wide, 0.25, kernel="triton")
    leaf = student.clone().requires_grad_()
    loss = distillation_loss(
        *(case.name, leaf, teacher),
        labels=labels,
        ce_weight=0.25,
        inplace=True,
        kernel="triton",
        **case.options,
    )
    loss.backward(upstream)
    assert leaf.grad.data_ptr() == leaf.data_ptr()
    assert loss.dtype == torch.float32
    # another width of the loads is another order of the sums
    torch.testing.assert_close(loss.detach(), expected[0], atol=4e-6, rtol=1e-6)
    distance = (leaf.grad - stored(expected[1], dtype)).abs()
    assert (distance > 2e-6 * case.error).float().mean() < 0.01
    rounding = torch.finfo(dtype).eps * expected[1].abs()
    assert (distance <= rounding + 2e-6 * case.error).all()


def test_models_of_two_types():
    student, teacher, labels, upstream = make(2, WIDTH)
    case = CASES["taid"]
    for s, z in ((student, teacher.bfloat16()), (student.bfloat16(), teacher)):
        loss, grad = run(case, s, z, labels, upstream, kernel="triton")
        assert grad.dtype == s.dtype
        expected = run(case, s.float(), z.float(), labels, upstream, kernel="triton")
        assert torch.equal(loss, expected[0])
        assert torch.equal(grad, stored(expected[1], s.dtype))


@every_case
def test_statistics_are_those_of_torchs_operations(case):
    student, teacher, labels, _ = make(2, WIDTH)
    both = [
        distillation_loss(
            *(case.name, student, teacher),
            labels=labels,
            return_stats=True,
            kernel=kernel,
            **case.options,
        )
        for kernel in ("torch", "triton")
    ]
    (loss, stats), (triton_loss, triton_stats) = both
    torch.testing.assert_close(triton_loss, loss, atol=8e-6, rtol=2e-6)
    torch.testing.assert_close(triton_stats, stats, atol=8e-6, rtol=2e-6)


@every_case
def test_logits_of_scale_30(case):
    """Masses underflow in fp32 all over the row."""
    inputs = make(3, 211, scale=30.0)
    loss, grad = run(case, *inputs, kernel="triton")
    expected_loss, expected_grad = exact(case, *inputs, 0.0)
    torch.testing.assert_close(loss.double(), expected_loss, atol=3e-5, rtol=3e-6)
    torch.testing.assert_close(grad.double(), expected_grad, atol=3e-5 * case.error, rtol=3e-5)


@every_case
@pytest.mark.parametrize("filling", [-torch.inf, torch.nan], ids=str)
def test_padding_has_no_mass_and_no_gradient(case, filling):
    """Declared padding, whatever it holds; -inf columns need no declaration."""
    student, teacher, labels, upstream = make(2, 61)
    wide = [torch.cat([x, torch.full((2, 6), filling)], -1) for x in (student, teacher)]
    expected = exact(case, student, teacher, labels, upstream, 0.25)
    for padding in (6, 0) if filling == -torch.inf else (6,):
        loss, grad = run(case, *wide, labels, upstream, 0.25, padding=padding, kernel="triton")
        assert_accurate(case, loss, grad[:, :61], *expected)
        assert not grad[:, 61:].any()


@every_case
@pytest.mark.parametrize("masked", ["student", "teacher"])
def test_a_column_that_one_model_masks(case, masked):
    """Value and gradient are torch's, also where a divergence then has no finite value."""
    inputs = make(2, 61)
    inputs[("student", "teacher").index(masked)][:, 3] = -torch.inf
    inputs[2].fill_(5)
    expected = run(case, *inputs, 0.25, kernel="torch")
    found = run(case, *inputs, 0.25, kernel="triton")
    torch.testing.assert_close(found, expected, atol=8e-6, rtol=1e-5)


@every_case
@pytest.mark.parametrize("model", ["student", "teacher"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_check_finite_names_the_token(case, bad, model):
    if case.name == "cross_entropy" and model == "teacher":
        return  # it does not look at the teacher
    student, teacher, labels, _ = make(2, 1, 30)
    {"student": student, "teacher": teacher}[model][1, 0, 7] = bad
    arguments = {"labels": labels, "kernel": "triton", **case.options}
    with pytest.raises(ValueError, match=r"logits are NaN or \+inf in 1 of 2 .* \(1, 0\)"):
        distillation_loss(case.name, student, teacher, check_finite=True, **arguments)
    if math.isnan(bad):
        loss = distillation_loss(case.name, student, teacher, **arguments)
        broken = torch.tensor([[False], [True]])
        assert torch.equal(loss.isnan(), broken & ((labels >= 0) | (case.name != "cross_entropy")))


def test_a_block_of_the_size_that_gpus_get(monkeypatch):
    monkeypatch.undo()
    inputs = make(2, 4999)
    for name in ("taid", "gjs"):
        found = run(CASES[name], *inputs, 0.25, kernel="triton")
        assert_accurate(CASES[name], *found, *exact(CASES[name], *inputs, 0.25))


def test_equal_models_give_a_gradient_of_exactly_zero():
    logits = 5 * torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    other = torch.randn(2, WIDTH)
    for name, teacher, options in (
        ("forward_kl", logits, {}),
        ("taid", other, {"t": 0.0}),
        ("taid", logits, {"t": 0.3}),
        ("reverse_kl", logits, {}),
        ("tvd", logits, {}),
        ("gjs", logits, {"beta": 0.3}),
    ):
        leaf = logits.clone().requires_grad_()
        loss = distillation_loss(name, leaf, teacher, kernel="triton", **options)
        loss.sum().backward()
        assert loss.abs().max() < 1e-7, name
        assert not leaf.grad.any(), name


@every_case
def test_no_tokens_and_one_token(case):
    student, teacher, labels, upstream = make(3, 0, 50)
    loss, grad = run(case, student, teacher, labels, upstream, 0.25, kernel="triton")
    assert loss.shape == (3, 0)
    assert grad.shape == (3, 0, 50)
    student, teacher, _, upstream = make(50)
    labels = torch.tensor(7)
    found = run(case, student, teacher, labels, upstream, 0.25, kernel="triton")
    assert_accurate(case, *found, *exact(case, student, teacher, labels, upstream, 0.25))


@pytest.mark.parametrize(
    ("t", "dtype"),
    [(0.0, torch.float32), (0.375, torch.bfloat16), (0.75, torch.float64), (1.0, torch.float32)],
)
def test_a_t_that_only_the_device_knows(t, dtype):
    """What `distillation_loss` does with t on an accelerator; its owner may then move on."""
    student, teacher, _, upstream = make(2, 300)
    leaf, held = student.clone().requires_grad_(), torch.tensor(t, dtype=dtype)
    kernel = kernels.choose("triton", Interpolated(held), leaf, teacher)
    loss, _ = vocab_parallel.run(Interpolated(held), leaf, teacher, Request(), kernel)
    held.fill_(0.9)
    loss.backward(upstream)
    exact_leaf = student.double().requires_grad_()
    expected = reference.taid(exact_leaf, teacher.double(), t)
    expected.backward(upstream.double())
    assert_accurate(CASES["taid"], loss.detach(), leaf.grad, expected.detach(), exact_leaf.grad)


def test_what_it_refuses():
    logits = torch.zeros(4, 16)
    for name, student, message in (
        ("adaptive_kl", logits, "kernel='triton' does not have this loss; kernel='auto' takes"),
        ("forward_kl", logits.double(), "float16 logits, not on torch.float64"),
        ("forward_kl", logits[:, ::2], r"vocabulary axis has stride 1, not \(16, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            distillation_loss(name, student, student, kernel="triton")
    elsewhere = Interpolated(torch.empty((), device="meta"))
    with pytest.raises(ValueError, match="needs t on the logits' cpu, not on meta"):
        kernels.choose("triton", elsewhere, logits, logits)

"""The losses on a CUDA device: Triton's kernels, and torch's operations where there is none.

Run where there is a device: `python -m pytest -m gpu tests/gpu`.
"""

import pytest
import torch

from taid_megatron.losses import distillation_loss, kernels, reference
from taid_megatron.losses.forms import Decoupled, Interpolated, Reverse
from taid_megatron.losses.mixtures import Mixture
from tests.unit.losses.divergences import CASES, assert_accurate, exact
from tests.unit.losses.test_divergences import make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

WITHOUT = ("adaptive_kl", "dkd", "ctkd")
COVERED = {key: case for key, case in CASES.items() if case.name not in WITHOUT}
every_case = pytest.mark.parametrize("case", COVERED.values(), ids=COVERED)
# Whole blocks; an end within a thread's vector, rows out of line; a large real vocabulary.
WIDTHS = (8192, 10001, 152064)


def on_device(*tensors):
    return [x.cuda() for x in tensors]


def run(case, student, teacher, labels, upstream, ce_weight=0.0, **arguments):
    leaf = student.clone().requires_grad_()
    loss = distillation_loss(
        case.name, leaf, teacher, labels=labels, ce_weight=ce_weight, **case.options, **arguments
    )
    loss.backward(upstream)
    return loss.detach().cpu(), leaf.grad.cpu()


def test_auto_takes_triton_where_it_can_and_torch_elsewhere():
    from taid_megatron.losses.triton_kernels import TritonKernel

    logits = torch.zeros(2, 8, device="cuda")
    for form in (Interpolated(0.4), Interpolated(None), Reverse(), Mixture("gjs", 0.1)):
        assert isinstance(kernels.choose("auto", form, logits, logits), TritonKernel)
        assert kernels.choose("torch", form, logits, logits) is None
        assert kernels.choose("auto", form, logits.double(), logits.double()) is None
    assert kernels.choose("auto", Decoupled(1.0, 8.0, 4.0), logits, logits) is None
    with pytest.raises(ValueError, match="kernel='native' works on the CPU, not on cuda:0"):
        kernels.choose("native", Reverse(), logits, logits)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("ce_weight", [0.0, 0.25])
@every_case
def test_value_and_gradient_within_the_promised_error(case, ce_weight, width):
    inputs = make(6, width)
    inputs[2][:4] = torch.tensor([0, 4095, 4096, width - 1])
    found = run(case, *on_device(*inputs), ce_weight)
    # The values are sums over up to 150,000 columns of a scale of 5: torch's own are as far off.
    expected = exact(case, *inputs, ce_weight)
    torch.testing.assert_close(found[0].double(), expected[0], atol=8e-6, rtol=2e-6)
    torch.testing.assert_close(found[1].double(), expected[1], atol=4e-6 * case.error, rtol=0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_loss_on_small_rows(case):
    """Those without a kernel too."""
    inputs = make(37, 101)
    assert_accurate(case, *run(case, *on_device(*inputs), 0.25), *exact(case, *inputs, 0.25))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_case
def test_half_storage_is_computed_in_fp32_and_rounded_once(case, dtype):
    student, teacher, labels, upstream = on_device(*make(6, 10001, dtype=dtype))
    wide = run(case, student.float(), teacher.float(), labels, upstream, 0.25)
    loss, grad = run(case, student, teacher, labels, upstream, 0.25, inplace=True)
    torch.testing.assert_close(loss, wide[0], atol=1e-5, rtol=0)
    half_a_unit = 0.51 * torch.finfo(dtype).eps
    torch.testing.assert_close(grad.float(), wide[1], atol=4e-6 * case.error, rtol=half_a_unit)


@every_case
def test_statistics(case):
    student, teacher, labels, _ = on_device(*make(6, 10001))
    results = [
        distillation_loss(
            *(case.name, student, teacher),
            labels=labels,
            return_stats=True,
            kernel=kernel,
            **case.options,
        )[1]
        for kernel in ("torch", "triton")
    ]
    torch.testing.assert_close(results[1], results[0], atol=8e-6, rtol=2e-6)


@every_case
def test_masked_columns_and_nan(case):
    student, teacher, labels, upstream = make(4, 5000)
    student[:, 7] = teacher[:, 7] = -torch.inf
    labels.fill_(9)
    inputs = on_device(student, teacher, labels, upstream)
    expected = run(case, *inputs, 0.25, kernel="torch")
    found = run(case, *inputs, 0.25)
    torch.testing.assert_close(found, expected, atol=8e-6, rtol=2e-6)
    inputs[0][2, 4999] = torch.nan
    loss = distillation_loss(case.name, *inputs[:2], labels=inputs[2], **case.options)
    assert loss.isnan().tolist() == [False, False, True, False]


def test_equal_models_give_a_gradient_of_exactly_zero():
    logits = 5 * torch.randn(6, 10001, device="cuda")
    other = torch.randn(6, 10001, device="cuda")
    for name, teacher, options in (
        ("forward_kl", logits, {}),
        ("taid", other, {"t": 0.0}),
        ("taid", logits, {"t": 0.3}),
        ("reverse_kl", logits, {}),
        ("tvd", logits, {}),
    ):
        leaf = logits.clone().requires_grad_()
        loss = distillation_loss(name, leaf, teacher, kernel="triton", **options)
        loss.sum().backward()
        assert loss.abs().max() < 1e-7, name
        assert not leaf.grad.any(), name


@pytest.mark.parametrize("t", [0.0, 0.375, 1.0])
def test_t_on_the_device_is_used_as_it_was_at_the_call(t):
    student, teacher, _, upstream = make(6, 10001)
    leaf = student.cuda().requires_grad_()
    held = torch.tensor(t, device="cuda")
    loss = distillation_loss("taid", leaf, teacher.cuda(), t=held, kernel="triton")
    held.fill_(0.9)
    loss.backward(upstream.cuda())
    wide = student.double().requires_grad_()
    expected = reference.taid(wide, teacher.double(), t)
    expected.backward(upstream.double())
    torch.testing.assert_close(loss.cpu().double(), expected.detach(), atol=8e-6, rtol=2e-6)
    torch.testing.assert_close(leaf.grad.cpu().double(), wide.grad, atol=4e-6, rtol=0)


def test_more_elements_than_32_bits_count():
    """16,384 tokens of 152,064 columns: the last row begins beyond 2^31."""
    shape = (16384, 152064)
    student = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    teacher = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    student[-1], teacher[-1] = (x.bfloat16().cuda() for x in make(shape[1])[:2])
    case = CASES["taid"]
    no_labels, ones = torch.full((1,), -1), torch.ones(1)
    rows = student[-1:].float().cpu(), teacher[-1:].float().cpu()
    expected_loss, expected_grad = exact(case, *rows, no_labels, ones, 0.0)
    leaf = student.requires_grad_()
    loss = distillation_loss("taid", leaf, teacher, inplace=True, kernel="triton", **case.options)
    loss.sum().backward()
    torch.testing.assert_close(loss[-1:].cpu().double(), expected_loss, atol=8e-6, rtol=2e-6)
    found = leaf.grad[-1:].cpu().double()
    torch.testing.assert_close(found, expected_grad, atol=4e-6, rtol=0.51 * 2**-7)
    assert not leaf.grad[:-1].any()


@every_case
def test_the_host_never_waits_for_the_device(case):
    student, teacher, labels, upstream = on_device(*make(64, 10001, dtype=torch.bfloat16))
    options = dict(case.options)
    if case.name == "taid":
        options["t"] = torch.tensor(0.4, device="cuda")

    def step():
        leaf = student.clone().requires_grad_()
        loss, _ = distillation_loss(
            *(case.name, leaf, teacher),
            labels=labels,
            ce_weight=0.25,
            inplace=True,
            return_stats=True,
            kernel="triton",
            **options,
        )
        loss.backward(upstream)

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_case
def test_in_place_nothing_of_the_logits_size_is_allocated(case):
    student = torch.randn(2048, 32000, dtype=torch.bfloat16, device="cuda").requires_grad_()
    teacher = torch.randn(2048, 32000, dtype=torch.bfloat16, device="cuda")
    labels = torch.zeros(2048, dtype=torch.int64, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = distillation_loss(
        *(case.name, student, teacher),
        labels=labels,
        ce_weight=0.25,
        inplace=True,
        kernel="triton",
        **case.options,
    )
    loss.sum().backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 0.02 * student.numel() * student.element_size()
    assert student.grad.data_ptr() == student.data_ptr()

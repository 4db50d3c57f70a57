"""Every divergence on whole rows: equal to its definition, gradients included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taid_megatron.losses import distillation_loss, reference
from taid_megatron.losses.registry import LOSSES
from tests.unit.losses.divergences import CASES, assert_accurate, exact

SCALE = 5.0
# 'auto' is the native kernel for those it has, in fp32 and bf16
KERNELS = ("torch", "auto")


def make(*shape, seed=0, scale=SCALE, dtype=torch.float32):
    """Student, teacher, labels (one in four ignored) and upstream gradients in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        (scale * torch.randn(shape, generator=generator)).to(dtype) for _ in range(2)
    )
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    labels = labels.masked_fill(torch.rand(shape[:-1], generator=generator) < 0.25, -100)
    return student, teacher, labels, 2 * torch.rand(shape[:-1], generator=generator) - 1


def run(case, student, teacher, labels, upstream, ce_weight=0.0, **arguments):
    leaf = student.detach().clone().requires_grad_()
    loss = distillation_loss(
        case.name, leaf, teacher, labels=labels, ce_weight=ce_weight, **case.options, **arguments
    )
    loss.backward(upstream.to(loss.dtype))
    return loss.detach(), leaf.grad


def test_every_loss_has_a_case():
    assert {case.name for case in CASES.values()} == set(LOSSES)


@pytest.mark.parametrize("ce_weight", [0.0, 0.25])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_and_gradient_within_the_promised_error(kernel, case, ce_weight):
    for shape in ((37, 101), (3, 5, 1009)):
        inputs = make(*shape)
        found = run(case, *inputs, ce_weight, kernel=kernel)
        assert_accurate(case, *found, *exact(case, *inputs, ce_weight))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_float64_in_chunks_is_exact(case):
    """Any chunk size, non-contiguous logits; near the limits of float64."""
    student, teacher, labels, upstream = make(6, 5, 83, dtype=torch.float64)
    expected = exact(case, student, teacher, labels, upstream, 0.25)
    student = student.transpose(0, 1).contiguous().transpose(0, 1)
    for chunk_tokens in (None, 1, 4):
        for inplace in (False, True):
            loss, grad = run(
                case,
                *(student, teacher, labels, upstream, 0.25),
                chunk_tokens=chunk_tokens,
                inplace=inplace,
            )
            torch.testing.assert_close(loss, expected[0], atol=1e-12, rtol=1e-12)
            torch.testing.assert_close(grad, expected[1], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bf16_is_computed_in_fp32_and_inplace_takes_the_storage(kernel, case):
    student, teacher, labels, upstream = make(13, 999, dtype=torch.bfloat16)
    wide = (student.float(), teacher.float(), labels, upstream)
    expected = run(case, *wide, 0.25, kernel=kernel)
    for inplace in (False, True):
        arguments = {"inplace": inplace, "kernel": kernel}
        loss, grad = run(case, student, teacher, labels, upstream, 0.25, **arguments)
        torch.testing.assert_close(loss, expected[0], atol=1e-5, rtol=0)
        assert torch.equal(grad, expected[1].bfloat16())
    leaf = student.clone().requires_grad_()
    distillation_loss(
        case.name, leaf, teacher, labels=labels, inplace=True, **case.options
    ).sum().backward()
    assert leaf.grad.data_ptr() == leaf.data_ptr()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_logits_of_scale_30(kernel, case):
    """Masses underflow in fp32 all over the row."""
    inputs = make(64, 211, scale=30.0)
    loss, grad = run(case, *inputs, kernel=kernel)
    expected_loss, expected_grad = exact(case, *inputs, 0.0)
    torch.testing.assert_close(loss.double(), expected_loss, atol=3e-5, rtol=3e-6)
    torch.testing.assert_close(grad.double(), expected_grad, atol=3e-5 * case.error, rtol=3e-5)


@pytest.mark.parametrize("filling", [-torch.inf, 50.0, torch.nan], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_padding_has_no_mass_and_no_gradient(kernel, case, filling):
    """Declared padding, whatever it holds; -inf columns need no declaration."""
    student, teacher, labels, upstream = make(8, 61)
    wide = [torch.cat([x, torch.full((8, 6), filling)], -1) for x in (student, teacher)]
    expected = exact(case, student, teacher, labels, upstream, 0.25)
    for padding in (6, 0) if filling == -torch.inf else (6,):
        loss, grad = run(case, *wide, labels, upstream, 0.25, padding=padding, kernel=kernel)
        assert_accurate(case, loss, grad[:, :61], *expected)
        assert not grad[:, 61:].any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_statistics_of_every_loss(kernel, case):
    student, teacher, labels, _ = make(20, 501)
    s, z = student.double(), teacher.double()
    target = z if case.name != "taid" else (0.6 * s + 0.4 * z)
    expected = {
        "objective": case.define(s, z, labels),
        "cross_entropy_to_target": -(target.softmax(-1) * s.log_softmax(-1)).sum(-1),
        "kl": reference.forward_kl(s, z),
        "cross_entropy": reference.cross_entropy(s, labels),
    }
    if case.name == "cross_entropy":
        expected["cross_entropy_to_target"] = expected["cross_entropy"]
    loss, stats = distillation_loss(
        *(case.name, student, teacher),
        labels=labels,
        return_stats=True,
        kernel=kernel,
        **case.options,
    )
    assert set(expected) <= set(stats)
    for name, value in expected.items():
        torch.testing.assert_close(
            stats[name].double(), value, atol=2e-6 * case.error, rtol=1e-6, msg=name
        )
    assert torch.equal(stats["objective"], loss)
    for name in expected:
        _, one = distillation_loss(
            *(case.name, student, teacher),
            labels=labels,
            return_stats=(name,),
            kernel=kernel,
            **case.options,
        )
        torch.testing.assert_close(one[name], stats[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_tokens_and_one_token(case):
    student, teacher, labels, upstream = make(3, 0, 50)
    loss, grad = run(case, student, teacher, labels, upstream, 0.25)
    assert loss.shape == (3, 0)
    assert grad.shape == (3, 0, 50)
    student, teacher, _, upstream = make(50)
    labels = torch.tensor(7)
    found = run(case, student, teacher, labels, upstream, 0.25)
    assert_accurate(case, *found, *exact(case, student, teacher, labels, upstream, 0.25))


@pytest.mark.parametrize("model", ["student", "teacher"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_check_finite_names_the_first_token(kernel, case, bad, model):
    student, teacher, labels, _ = make(4, 5, 30)
    {"student": student, "teacher": teacher}[model][2, 3, 7] = bad
    if case.name == "cross_entropy" and model == "teacher":
        return  # it does not look at the teacher
    with pytest.raises(ValueError, match=r"logits are NaN or \+inf in 1 of 20 .* \(2, 3\)"):
        distillation_loss(
            *(case.name, student, teacher),
            labels=labels,
            check_finite=True,
            kernel=kernel,
            **case.options,
        )


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.5])
def test_the_temperature_of_ctkd_gets_its_exact_gradient(temperature, variant):
    student, teacher, _, upstream = make(16, 300)
    tau = torch.tensor([temperature], requires_grad=True)
    exact_tau = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    expected = reference.ctkd(student.double(), teacher.double(), exact_tau, variant)
    expected.backward(upstream.double())
    arguments = {"temperature": tau, "variant": variant, "return_stats": ("temperature_gradient",)}
    loss, stats = distillation_loss("ctkd", student, teacher, **arguments)
    loss.backward(upstream)
    assert tau.grad.shape == (1,)
    torch.testing.assert_close(tau.grad[0].double(), exact_tau.grad, atol=1e-5, rtol=1e-6)
    per_token = (stats["temperature_gradient"] * upstream).sum()
    torch.testing.assert_close(per_token.double(), exact_tau.grad, atol=1e-5, rtol=1e-6)
    mixed = torch.tensor(temperature, requires_grad=True)
    labels = torch.zeros(16, dtype=torch.int64)
    distillation_loss(
        *("ctkd", student, teacher),
        temperature=mixed,
        variant=variant,
        labels=labels,
        ce_weight=0.25,
    ).backward(upstream)
    torch.testing.assert_close(mixed.grad.double(), 0.75 * exact_tau.grad, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("mu", [0.02, 0.5, 0.99, 1.0])
def test_the_head_is_exact_among_equal_logits(mu):
    """bf16 teachers are full of ties: the lower id belongs to the head first."""
    student, teacher, labels, upstream = make(40, 700, scale=2.0)
    teacher = teacher.bfloat16().double().mul(2).round().div(2)
    student = student.double()
    loss = distillation_loss("adaptive_kl", student, teacher, mu=mu)
    expected = reference.adaptive_kl(student, teacher, mu)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)


def test_a_teacher_that_knows_nothing_and_one_that_knows_all():
    """All logits equal: every token is in the bin where the head ends. One-hot: one token is."""
    student, teacher, _, _ = make(5, 64, dtype=torch.float64)
    for flat in (torch.zeros_like(teacher), 300.0 * torch.eye(64, dtype=torch.float64)[:5]):
        loss = distillation_loss("adaptive_kl", student, flat, mu=0.5)
        torch.testing.assert_close(loss, reference.adaptive_kl(student, flat, 0.5))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from([key for key in CASES if key != "cross_entropy"]),
    tokens=st.integers(1, 9),
    vocabulary=st.integers(2, 70),
    scale=st.floats(0.01, 12.0),
    seed=st.integers(0, 2**20),
    chunk_tokens=st.integers(1, 5),
)
def test_any_shape_and_scale_in_float64(name, tokens, vocabulary, scale, seed, chunk_tokens):
    case = CASES[name]
    inputs = make(tokens, vocabulary, seed=seed, scale=scale, dtype=torch.float64)
    loss, grad = run(case, *inputs, 0.3, chunk_tokens=chunk_tokens)
    expected_loss, expected_grad = exact(case, *inputs, 0.3)
    torch.testing.assert_close(loss, expected_loss, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(grad, expected_grad, atol=1e-10, rtol=1e-10)
    assert (loss >= -1e-12).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gjs", {"beta": 0.0}, "beta=0.0 is not between 0 and 1"),
        ("gjs", {"beta": 1.5}, "beta=1.5 is not between 0 and 1"),
        ("skew_kl", {"lam": 1.0}, "lam=1.0 is not between"),
        ("skew_reverse_kl", {"lam": float("nan")}, "lam=nan"),
        ("adaptive_kl", {"mu": 0.0}, r"mu=0.0 is not in \(0, 1\]"),
        ("adaptive_kl", {"variant": "text"}, "variant='text': there are paper, official"),
        ("dkd", {"alpha": -1.0, "labels": torch.zeros(2, dtype=torch.int64)}, "alpha=-1.0"),
        ("dkd", {"temperature": 0.0, "labels": torch.zeros(2, dtype=torch.int64)}, "temperature=0"),
        ("dkd", {}, "labels are missing"),
        ("ctkd", {}, "'ctkd' needs the option temperature"),
        ("ctkd", {"temperature": torch.ones(2)}, r"one element, not torch.float32 of \(2,\)"),
        ("ctkd", {"temperature": torch.tensor(-1.0)}, "temperature=-1.0"),
        ("tvd", {"beta": 0.1}, "'tvd' has no option beta; its options: none"),
        ("tvd", {"collective": "broadcast"}, "unknown collective 'broadcast'"),
        ("forward_kl", {"return_stats": ("temperature_gradient",)}, "unknown"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        distillation_loss(name, torch.zeros(2, 5), torch.zeros(2, 5), **options)

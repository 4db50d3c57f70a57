"""The fast form on whole rows: equal to the reference, gradients included, on any layout."""

import pytest
import torch
from torch.autograd import gradcheck

from taid_megatron.losses import distillation_loss, reference, vocab_parallel
from taid_megatron.losses.forms import Interpolated
from taid_megatron.losses.shards import Request

SCALE = 5.0


def make_logits(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [SCALE * torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]


def make_upstream(*shape, seed=7):
    """Gradients of the loss per token in [-1, 1], so that tolerances keep their meaning."""
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


def make_labels(*shape, vocabulary, seed=3):
    """Ids, about one in four of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocabulary, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < 0.25, -100)


def value_and_grad(name, student, teacher, upstream, **arguments):
    student = student.detach().clone().requires_grad_()
    loss = distillation_loss(name, student, teacher, **arguments)
    loss.backward(upstream.to(loss.dtype))
    return loss.detach(), student.grad


def exact(student, teacher, t, upstream, labels=None, ce_weight=0.0):
    """Loss and gradient of taid by the reference, in float64."""
    student = student.detach().double().requires_grad_()
    loss = (1 - ce_weight) * reference.taid(student, teacher.double(), t)
    if labels is not None:
        loss = loss + ce_weight * reference.cross_entropy(student, labels)
    loss.backward(upstream.double())
    return loss.detach(), student.grad


def assert_accurate(loss, grad, expected_loss, expected_grad):
    torch.testing.assert_close(loss.double(), expected_loss, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("shape", [(37, 101), (3, 5, 1009), (16, 32000)])
def test_taid_with_cross_entropy_within_the_promised_error(shape, t):
    student, teacher = make_logits(*shape)
    labels = make_labels(*shape[:-1], vocabulary=shape[-1])
    upstream = make_upstream(*shape[:-1])
    mix = {"labels": labels, "ce_weight": 0.25}
    found = value_and_grad("taid", student, teacher, upstream, t=t, **mix)
    assert_accurate(*found, *exact(student, teacher, t, upstream, **mix))
    found = value_and_grad("taid", student, teacher, upstream, t=t)
    assert_accurate(*found, *exact(student, teacher, t, upstream))


def test_cross_entropy_needs_no_teacher_and_ignores_negative_labels():
    student, _ = make_logits(40, 97)
    labels, upstream = make_labels(40, vocabulary=97), make_upstream(40)
    loss, grad = value_and_grad("cross_entropy", student, None, upstream, labels=labels)
    zero = torch.zeros(40, 97)
    expected = exact(student, zero, 0.0, upstream, labels=labels, ce_weight=1.0)
    assert_accurate(loss, grad, *expected)
    assert (labels < 0).any()
    assert not loss[labels < 0].any()
    assert not grad[labels < 0].any()


def test_an_ignored_label_leaves_the_divergence():
    student, teacher = make_logits(4, 50)
    labels, upstream = torch.full((4,), -100), make_upstream(4)
    mix = {"labels": labels, "ce_weight": 0.5}
    found = value_and_grad("taid", student, teacher, upstream, t=0.5, **mix)
    loss, grad = exact(student, teacher, 0.5, upstream)
    assert_accurate(*found, loss / 2, grad / 2)


def test_the_student_at_t_0_has_nothing_to_learn():
    student, teacher = make_logits(9, 1000)
    loss, grad = value_and_grad("taid", student, teacher, make_upstream(9), t=0.0)
    assert not loss.any()
    assert not grad.any()


def test_t_1_is_forward_kl_bit_for_bit():
    student, teacher = make_logits(9, 1000)
    upstream = make_upstream(9)
    taid = value_and_grad("taid", student, teacher, upstream, t=1.0)
    forward_kl = value_and_grad("forward_kl", student, teacher, upstream)
    assert torch.equal(taid[0], forward_kl[0])
    assert torch.equal(taid[1], forward_kl[1])


@pytest.mark.parametrize("t", [0.4, 1.0])
def test_statistics_are_those_of_the_definitions(t):
    student, teacher = make_logits(20, 501)
    labels = make_labels(20, vocabulary=501)
    s, z = student.double(), teacher.double()
    log_q, p = s.log_softmax(-1), ((1 - t) * s + t * z).softmax(-1)
    expected = {
        "objective": reference.taid(s, z, t),
        "cross_entropy_to_target": -(p * log_q).sum(-1),
        "kl": reference.forward_kl(s, z),
        "cross_entropy": reference.cross_entropy(s, labels),
    }
    student.requires_grad_()
    arguments = {"t": t, "labels": labels, "ce_weight": 0.5}
    loss, stats = distillation_loss("taid", student, teacher, return_stats=True, **arguments)
    assert list(stats) == list(expected)
    for name, value in stats.items():
        torch.testing.assert_close(value.double(), expected[name], atol=2e-6, rtol=1e-6)
        assert not value.requires_grad
    assert loss.requires_grad
    for name in expected:
        again, one = distillation_loss("taid", student, teacher, return_stats=(name,), **arguments)
        assert list(one) == [name]
        assert torch.equal(one[name], stats[name])
        assert torch.equal(again, loss)


def test_statistics_of_cross_entropy():
    student, teacher = make_logits(6, 50)
    labels = make_labels(6, vocabulary=50)
    loss, stats = distillation_loss(
        "cross_entropy", student, None, labels=labels, return_stats=True
    )
    assert set(stats) == {"objective", "cross_entropy_to_target", "cross_entropy"}
    assert all(torch.equal(value, loss) for value in stats.values())
    _, stats = distillation_loss(
        "cross_entropy", student, teacher, labels=labels, return_stats=("kl",)
    )
    expected = reference.forward_kl(student.double(), teacher.double())
    torch.testing.assert_close(stats["kl"].double(), expected, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inplace", [False, True])
def test_half_storage_is_computed_in_fp32(dtype, inplace):
    """Interpolating in bf16 would be off by 8e-3; only the gradient is rounded, and last."""
    student, teacher = make_logits(13, 999, dtype=dtype)
    labels, upstream = make_labels(13, vocabulary=999), make_upstream(13)
    arguments = {"t": 0.3, "labels": labels, "ce_weight": 0.25, "kernel": "torch"}
    expected, expected_grad = value_and_grad(
        "taid", student.float(), teacher.float(), upstream, **arguments
    )
    loss, grad = value_and_grad("taid", student, teacher, upstream, inplace=inplace, **arguments)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(grad, expected_grad.to(dtype))


def test_float64_is_computed_in_float64():
    student, teacher = make_logits(5, 40, dtype=torch.float64)
    labels = torch.tensor([3, -1, 39, 0, 7])
    student.requires_grad_()
    assert gradcheck(
        lambda s: distillation_loss(
            "forward_kl", s, teacher, labels=labels, ce_weight=0.3, chunk_tokens=2
        ),
        student,
    )
    upstream = make_upstream(5)
    loss, grad = value_and_grad("taid", student, teacher, upstream, t=0.6)
    expected, expected_grad = exact(student, teacher, 0.6, upstream)
    torch.testing.assert_close(loss, expected, atol=1e-13, rtol=0)
    torch.testing.assert_close(grad, expected_grad, atol=1e-14, rtol=0)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "narrowed": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every other token": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "columns apart": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "four axes": lambda x: x.unsqueeze(2).expand(-1, -1, 1, -1),
}


@pytest.mark.parametrize("chunk_tokens", [None, 1, 4])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, inplace, chunk_tokens):
    student, teacher = make_logits(6, 5, 83)
    labels, upstream = make_labels(6, 5, vocabulary=83), make_upstream(6, 5)
    mix = {"labels": labels, "ce_weight": 0.25}
    expected_loss, expected_grad = exact(student, teacher, 0.4, upstream, **mix)

    leaf = student.clone().requires_grad_()
    view = LAYOUTS[layout](leaf)
    assert layout == "four axes" or not view.is_contiguous()
    shape = view.shape[:-1]
    loss = distillation_loss(
        "taid",
        view,
        teacher.view(view.shape),
        t=0.4,
        labels=labels.view(shape),
        ce_weight=0.25,
        inplace=inplace,
        chunk_tokens=chunk_tokens,
    )
    loss.backward(upstream.view(shape))
    assert loss.shape == shape
    assert_accurate(loss.detach().view(6, 5), leaf.grad, expected_loss, expected_grad)


def test_one_token_without_a_token_axis():
    student, teacher = make_logits(60)
    loss, grad = value_and_grad("taid", student, teacher, torch.tensor(0.5), t=0.4)
    assert loss.shape == ()
    assert_accurate(loss, grad, *exact(student, teacher, 0.4, torch.tensor(0.5)))


@pytest.mark.parametrize("shape", [(0, 50), (3, 0, 50)])
def test_no_tokens(shape):
    student, teacher = make_logits(*shape)
    student.requires_grad_()
    labels = torch.zeros(shape[:-1], dtype=torch.int64)
    loss, stats = distillation_loss(
        "taid", student, teacher, t=0.4, labels=labels, ce_weight=0.5, return_stats=True
    )
    loss.sum().backward()
    assert loss.shape == shape[:-1]
    assert student.grad.shape == shape
    assert all(value.shape == shape[:-1] for value in stats.values())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("filling", [0.0, 50.0, -torch.inf, torch.nan])
def test_padding_columns_hold_no_mass_and_get_no_gradient(filling, inplace):
    student, teacher = make_logits(8, 61)
    labels, upstream = make_labels(8, vocabulary=61), make_upstream(8)
    mix = {"labels": labels, "ce_weight": 0.25}
    wide_student, wide_teacher = (
        torch.cat([x, torch.full((8, 6), filling)], -1) for x in (student, teacher)
    )
    loss, grad = value_and_grad(
        "taid", wide_student, wide_teacher, upstream, t=0.4, padding=6, inplace=inplace, **mix
    )
    expected = exact(student, teacher, 0.4, upstream, **mix)
    assert_accurate(loss, grad[:, :61], *expected)
    assert torch.equal(grad[:, 61:], torch.zeros(8, 6))


@pytest.mark.parametrize("name", ["taid", "forward_kl"])
def test_columns_of_minus_infinity_need_not_be_declared(name):
    student, teacher = make_logits(8, 61)
    upstream = make_upstream(8)
    options = {"t": 0.4} if name == "taid" else {}
    masked = torch.full((8, 6), -torch.inf)
    loss, grad = value_and_grad(
        name,
        torch.cat([student, masked], -1),
        torch.cat([teacher, masked], -1),
        upstream,
        **options,
    )
    expected = exact(student, teacher, options.get("t", 1.0), upstream)
    assert_accurate(loss, grad[:, :61], *expected)
    assert not grad[:, 61:].any()


def test_by_default_no_input_changes():
    student, teacher = make_logits(12, 80)
    labels = make_labels(12, vocabulary=80)
    before = student.clone(), teacher.clone(), labels.clone()
    student.requires_grad_()
    arguments = {"t": 0.4, "labels": labels, "ce_weight": 0.5, "return_stats": True}
    loss, _ = distillation_loss("taid", student, teacher, **arguments)
    loss.sum().backward(retain_graph=True)
    first, student.grad = student.grad, None
    loss.sum().backward()
    assert torch.equal(student.grad, first)
    assert all(map(torch.equal, (student.detach(), teacher, labels), before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_puts_the_gradient_into_the_logits_storage(dtype):
    student, teacher = make_logits(12, 80, dtype=dtype)
    before = teacher.clone()
    expected = value_and_grad("taid", student, teacher, make_upstream(12), t=0.4)
    student.requires_grad_()
    loss = distillation_loss("taid", student, teacher, t=0.4, inplace=True)
    loss.backward(make_upstream(12))
    assert student.grad.data_ptr() == student.data_ptr()
    assert torch.equal(student.grad, expected[1])
    assert torch.equal(teacher, before)


def test_inplace_refuses_a_second_backward():
    student, teacher = make_logits(3, 20)
    loss = distillation_loss("taid", student.requires_grad_(), teacher, t=0.4, inplace=True)
    loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace=True"):
        loss.sum().backward()


def test_only_the_student_gets_a_gradient():
    student, teacher = make_logits(3, 20)
    teacher.requires_grad_()
    t = torch.tensor(0.4, requires_grad=True)
    assert not distillation_loss("taid", student, teacher, t=t).requires_grad
    loss = distillation_loss("taid", student.requires_grad_(), teacher, t=t)
    loss.sum().backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert t.grad is None


def test_t_may_be_a_tensor_of_any_float_type():
    student, teacher = make_logits(3, 20)
    expected = distillation_loss("taid", student, teacher, t=0.375)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        t = torch.tensor(0.375, dtype=dtype)
        assert torch.equal(distillation_loss("taid", student, teacher, t=t), expected)


def test_t_on_an_accelerator_is_used_as_it_was_at_the_call():
    """The path that never looks into t; its owner may move on before the backward."""
    student, teacher = make_logits(3, 20)
    expected = value_and_grad("taid", student, teacher, torch.ones(3), t=0.375)
    student.requires_grad_()
    t = torch.tensor(0.375)
    loss, _ = vocab_parallel.run(Interpolated(t), student, teacher, Request())
    t.fill_(0.9)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), expected[0])
    torch.testing.assert_close(student.grad, expected[1])


@pytest.mark.parametrize("chunk_tokens", [1, 3, 11, 100])
def test_the_chunk_size_does_not_matter(chunk_tokens):
    student, teacher = make_logits(11, 333)
    labels, upstream = make_labels(11, vocabulary=333), make_upstream(11)
    mix = {"labels": labels, "ce_weight": 0.25}
    arguments = {"t": 0.4, "chunk_tokens": chunk_tokens, **mix}
    found = value_and_grad("taid", student, teacher, upstream, **arguments)
    assert_accurate(*found, *exact(student, teacher, 0.4, upstream, **mix))


def test_what_is_kept_for_the_backward_is_the_logits_themselves_and_a_few_floats_a_token():
    student, teacher = make_logits(10, 400)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with hooks:
        distillation_loss("taid", student.requires_grad_(), teacher, t=0.4)
    shared = {student.data_ptr(), teacher.data_ptr()}
    assert shared <= {x.data_ptr() for x in kept}
    assert sum(x.numel() for x in kept if x.data_ptr() not in shared) <= 4 * 10


def test_without_a_gradient_nothing_is_kept():
    student, teacher = make_logits(3, 20)
    assert distillation_loss("taid", student, teacher, t=0.4).grad_fn is None
    with torch.no_grad():
        loss = distillation_loss("taid", student.requires_grad_(), teacher, t=0.4)
    assert loss.grad_fn is None


def test_a_shifted_teacher_is_the_same_teacher():
    """Softmax does not see an offset; neither may the loss, beyond the rounding of the input."""
    student, teacher = make_logits(16, 500)
    shifted = teacher + 1000.0
    back = shifted - 1000.0  # the same rounded logits
    loss = distillation_loss("taid", student, shifted, t=0.5)
    expected = distillation_loss("taid", student, back, t=0.5)
    torch.testing.assert_close(loss, expected, atol=2e-3, rtol=0)

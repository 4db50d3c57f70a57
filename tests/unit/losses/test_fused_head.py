"""The fused head: the same sum, statistics and gradients as heads and loss apart."""

import pytest
import torch

from taid_megatron.losses import distillation_loss
from taid_megatron.losses.fused_head import fused_distillation_loss, head_logits
from tests.unit.losses.divergences import CASES

TOKENS, VOCABULARY, WIDTH, TEACHER_WIDTH = (7, 3), 211, 12, 20


class Inputs:
    def __init__(self, dtype=torch.float64, shape=TOKENS):
        generator = torch.Generator().manual_seed(3)

        def normal(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden, self.weight = normal(*shape, WIDTH), normal(VOCABULARY, WIDTH)
        self.teacher = normal(*shape, TEACHER_WIDTH), normal(VOCABULARY, TEACHER_WIDTH)
        self.labels = torch.randint(0, VOCABULARY, shape, generator=generator)
        self.mask = torch.rand(shape, generator=generator).mul(2).floor()  # zeros and ones
        self.mask *= 1 + torch.rand(shape, generator=generator)  # and uneven ones

    def leaves(self):
        return self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()


def apart(inputs, case, ce_weight, stats):
    hidden, weight = inputs.leaves()
    loss, found = distillation_loss(
        *(case.name, hidden @ weight.t(), inputs.teacher[0] @ inputs.teacher[1].t()),
        labels=inputs.labels,
        ce_weight=ce_weight,
        return_stats=stats,
        **case.options,
    )
    total = (loss * inputs.mask).sum()
    total.backward()
    return total.detach(), {"loss": loss.detach(), **found}, hidden.grad, weight.grad


def fused(inputs, case, ce_weight=0.25, stats=(), scale=None, **arguments):
    hidden, weight = inputs.leaves()
    total, found = fused_distillation_loss(
        *(case.name, hidden, weight, *inputs.teacher),
        loss_mask=inputs.mask,
        labels=inputs.labels,
        ce_weight=ce_weight,
        return_stats=stats,
        **case.options,
        **arguments,
    )
    (total if scale is None else total * scale).backward()
    return total.detach(), found, hidden.grad, weight.grad


@pytest.mark.parametrize("chunk", [1, 5, 256])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_heads_and_loss_apart(case, chunk):
    inputs = Inputs()
    stats = ("objective", "kl", "cross_entropy")
    expected = apart(inputs, case, 0.25, stats)
    found = fused(inputs, case, stats=stats, head_chunk_tokens=chunk)
    assert found[1].keys() == expected[1].keys()
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    assert not any(value.requires_grad for value in found[1].values())


def test_an_upstream_gradient_scales_both():
    inputs, case = Inputs(), CASES["taid"]
    _, _, hidden, weight = apart(inputs, case, 0.25, ())
    _, _, found_hidden, found_weight = fused(inputs, case, scale=2.5)
    torch.testing.assert_close(found_hidden, 2.5 * hidden, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found_weight, 2.5 * weight, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_takes_the_weights_share_in_fp32(dtype, tied):
    """As Megatron wants it: added to what is there, a gradient left for its hooks to find."""
    inputs, case = Inputs(dtype), CASES["taid"]
    wide = Inputs(dtype)
    wide.hidden, wide.weight = wide.hidden.float(), wide.weight.float()
    wide.teacher = tuple(x.float() for x in wide.teacher)
    _, _, expected_hidden, expected_weight = apart(wide, case, 0.25, ())
    hidden, weight = inputs.leaves()
    before = torch.full((VOCABULARY, WIDTH), 3.0)
    weight.main_grad, weight.zero_out_wgrad = before.clone(), tied
    total, _ = fused_distillation_loss(
        *("taid", hidden, weight, *inputs.teacher),
        loss_mask=inputs.mask,
        labels=inputs.labels,
        ce_weight=0.25,
        head_chunk_tokens=4,
        **case.options,
    )
    total.backward()
    precise = dtype == torch.float32
    # the gradient in bf16 logits is rounded once, before its two products
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if precise else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(weight.main_grad - before, expected_weight, **tolerance)
    torch.testing.assert_close(hidden.grad.float(), expected_hidden, **tolerance)
    assert weight.grad_added_to_main_grad
    assert weight.grad.shape == weight.shape
    assert not tied or not weight.grad.any()


def test_main_grad_refuses_another_scale():
    inputs = Inputs()
    hidden, weight = inputs.leaves()
    weight.main_grad = torch.zeros_like(weight)
    total, _ = fused_distillation_loss(
        *("forward_kl", hidden, weight, *inputs.teacher), loss_mask=inputs.mask
    )
    with pytest.raises(RuntimeError, match="got the gradient 2.0: with main_grad it must be 1"):
        (2 * total).backward()


def test_without_gradient_nothing_is_added():
    inputs = Inputs()
    inputs.weight.main_grad = torch.zeros_like(inputs.weight)
    inputs.weight.requires_grad_()
    arguments = {"loss_mask": inputs.mask, "labels": inputs.labels}
    with torch.no_grad():
        total, found = fused_distillation_loss(
            *("cross_entropy", inputs.hidden, inputs.weight, None, None), **arguments
        )
    assert not inputs.weight.main_grad.any()
    torch.testing.assert_close(total, (found["loss"] * inputs.mask).sum())


def test_no_tokens():
    inputs, case = Inputs(shape=(0, 3)), CASES["gjs"]
    total, found, hidden, weight = fused(inputs, case)
    assert total == 0
    assert found["loss"].shape == (0, 3)
    assert hidden.shape == (0, 3, WIDTH)
    assert not weight.any()


def test_head_logits_are_the_heads():
    inputs = Inputs()
    expected = (inputs.hidden @ inputs.weight.t()).view(-1, VOCABULARY)
    found = [(part, logits.clone()) for part, logits in head_logits(*inputs.leaves(), 4)]
    torch.testing.assert_close(torch.cat([logits for _, logits in found]), expected)
    assert [part.start for part, _ in found] == list(range(0, 21, 4))


def test_the_second_backward_is_refused():
    inputs = Inputs()
    hidden, weight = inputs.leaves()
    total, _ = fused_distillation_loss(
        *("forward_kl", hidden, weight, *inputs.teacher), loss_mask=inputs.mask
    )
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out by the first backward"):
        total.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_weight": torch.zeros(9, 5)}, r"student_hidden \(2, 4\) and .* \(9, 5\)"),
        ({"teacher_weight": torch.zeros(8, 4)}, r"\(2, 9\) and teacher_logits \(2, 8\)"),
        ({"teacher_hidden": torch.zeros(2, 4).double()}, "teacher_hidden is torch.float64"),
        ({"loss_mask": torch.ones(3)}, r"loss_mask \(3,\) does not fit \(2,\) tokens"),
        ({"head_chunk_tokens": 0}, "head_chunk_tokens=0"),
        ({"name": "kl"}, "unknown loss 'kl'"),
        ({"name": "dkd"}, "labels are missing"),
        ({"teacher_hidden": None}, "needs teacher_logits"),
    ],
)
def test_wrong_arguments(change, message):
    valid = {
        "name": "forward_kl",
        "student_hidden": torch.zeros(2, 4),
        "student_weight": torch.zeros(9, 4),
        "teacher_hidden": torch.zeros(2, 4),
        "teacher_weight": torch.zeros(9, 4),
        "loss_mask": torch.ones(2),
    }
    with pytest.raises(ValueError, match=message):
        fused_distillation_loss(**{**valid, **change})


def test_a_tensor_temperature_is_trained_by_the_statistic():
    inputs = Inputs()
    with pytest.raises(ValueError, match="train it by the statistic temperature_gradient"):
        fused_distillation_loss(
            *("ctkd", *inputs.leaves(), *inputs.teacher),
            loss_mask=inputs.mask,
            temperature=torch.tensor(2.0, requires_grad=True),
        )

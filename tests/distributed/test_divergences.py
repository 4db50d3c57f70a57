"""Every divergence on vocabulary shards: value, gradient and the number of collectives."""

import pytest
import torch
import torch.distributed as dist

from taid_megatron.losses import distillation_loss
from tests.distributed.ranks import run_ranks
from tests.unit.losses.divergences import CASES, assert_accurate, exact

TOKENS = 24
CE_WEIGHT = 0.25
SHARDS = {
    "2 even": (53, 53),
    "2 uneven": (17, 84),
    "4 uneven": (1, 40, 7, 53),
    "3 with one of padding": (30, 0, 31),
}
PADDING = 5


class Inputs:
    """Whole rows, and each rank's columns with padding behind them."""

    def __init__(self, widths, dtype=torch.float32):
        generator = torch.Generator().manual_seed(5)
        vocabulary = sum(widths)
        student, teacher = 5 * torch.randn(2, TOKENS, vocabulary, generator=generator)
        # a teacher with ties across the shards' borders
        self.student, self.teacher = student.to(dtype), teacher.bfloat16().to(dtype)
        self.labels = torch.randint(0, vocabulary, (TOKENS,), generator=generator)
        self.labels[::5] = -100
        self.upstream = 2 * torch.rand(TOKENS, generator=generator) - 1
        self.widths = widths

    def offset(self, rank):
        return sum(self.widths[:rank])

    def shard(self, whole, rank):
        part = whole[:, self.offset(rank) :][:, : self.widths[rank]]
        return torch.cat([part, torch.full((TOKENS, PADDING), 9.0, dtype=part.dtype)], -1)

    def run(self, case, rank, **arguments):
        student = self.shard(self.student, rank).requires_grad_()
        calls = dist.group.WORLD._get_sequence_number_for_group
        before = calls()
        loss = distillation_loss(
            case.name,
            student,
            self.shard(self.teacher, rank),
            labels=self.labels,
            group=dist.group.WORLD,
            vocab_offset=self.offset(rank),
            padding=PADDING,
            **case.options,
            **arguments,
        )
        forward = calls()
        loss.backward(self.upstream.to(loss.dtype))
        counts = forward - before, calls() - forward
        return loss.detach(), student.grad, counts


def _on_shards(widths, dtype, **arguments):
    """Per case: the ranks' losses, the gradients side by side, the collectives."""
    inputs = Inputs(widths, dtype)

    def on_rank(rank, world_size):
        return {key: inputs.run(case, rank, **arguments) for key, case in CASES.items()}

    ranks = run_ranks(len(widths), on_rank)
    results = {}
    for key in CASES:
        losses, grads, counts = zip(*(found[key] for found in ranks), strict=True)
        assert all(torch.equal(loss, losses[0]) for loss in losses), f"{key}: ranks differ"
        assert not any(grad[:, -PADDING:].any() for grad in grads), key
        grad = torch.cat([grad[:, :-PADDING] for grad in grads], -1)
        results[key] = losses[0], grad, set(counts)
    return inputs, results


def _exact(inputs, case, ce_weight):
    return exact(case, inputs.student, inputs.teacher, inputs.labels, inputs.upstream, ce_weight)


@pytest.mark.parametrize("widths", SHARDS.values(), ids=SHARDS)
def test_every_divergence_on_shards(widths):
    inputs, results = _on_shards(widths, torch.float32, ce_weight=CE_WEIGHT)
    for key, case in CASES.items():
        loss, grad, counts = results[key]
        assert_accurate(case, loss, grad, *_exact(inputs, case, CE_WEIGHT))
        assert counts == {(case.collectives, 0)}, key


def test_all_reduce_gives_the_same_in_float64():
    """A packed maximum, then sums; no ties between fp32 and float64 to hide a difference."""
    widths = (17, 40, 44)
    inputs, gathered = _on_shards(widths, torch.float64)
    _, reduced = _on_shards(widths, torch.float64, collective="all_reduce")
    for key, case in CASES.items():
        expected_loss, expected_grad = _exact(inputs, case, 0.0)
        for loss, grad, _ in (gathered[key], reduced[key]):
            torch.testing.assert_close(loss, expected_loss, atol=1e-11, rtol=1e-11)
            torch.testing.assert_close(grad, expected_grad, atol=1e-11, rtol=1e-11)
        ((forward, backward),) = reduced[key][2]
        assert (forward, backward) == (case.collectives + 1, 0), key


def test_the_temperature_gets_the_same_gradient_on_every_rank():
    """Its gradient is the whole row's, not a shard's."""
    inputs = Inputs((30, 31))

    def on_rank(rank, world_size):
        tau = torch.tensor(2.0, requires_grad=True)
        loss = distillation_loss(
            "ctkd",
            inputs.shard(inputs.student, rank).requires_grad_(),
            inputs.shard(inputs.teacher, rank),
            temperature=tau,
            group=dist.group.WORLD,
            padding=PADDING,
        )
        loss.backward(inputs.upstream)
        return tau.grad

    whole = torch.tensor(2.0, requires_grad=True)
    loss = distillation_loss("ctkd", inputs.student, inputs.teacher, temperature=whole)
    loss.backward(inputs.upstream)
    first, second = run_ranks(2, on_rank)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, whole.grad, atol=1e-4, rtol=1e-5)

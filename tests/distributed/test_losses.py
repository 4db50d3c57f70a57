"""The losses on vocabulary shards: the whole row's value and gradient, by one collective."""

import pytest
import torch
import torch.distributed as dist

from taid_megatron.losses import distillation_loss, reference
from tests.distributed.ranks import run_ranks

TOKENS = 24
T = 0.4
CE_WEIGHT = 0.25
STATS = ("objective", "cross_entropy_to_target", "kl", "cross_entropy")

# Local columns of each rank; the vocabularies divide by nothing in particular.
SHARDS = {
    "2 even": (53, 53),
    "2 uneven": (17, 84),
    "4 even": (26, 26, 26, 26),
    "4 uneven": (1, 40, 7, 53),
}


class Case:
    """Logits of whole rows, labels and upstream gradients, and each rank's share of them."""

    def __init__(self, widths, dtype=torch.float32, tokens=TOKENS, scale=5.0):
        generator = torch.Generator().manual_seed(11)
        self.widths, self.vocabulary = widths, sum(widths)
        self.student, self.teacher = (
            (scale * torch.randn(tokens, self.vocabulary, generator=generator)).to(dtype)
            for _ in range(2)
        )
        self.labels = torch.randint(0, self.vocabulary, (tokens,), generator=generator)
        self.labels[::5] = -100
        self.upstream = 2 * torch.rand(tokens, generator=generator) - 1

    def offset(self, rank):
        return sum(self.widths[:rank])

    def shard(self, whole, rank):
        return whole[..., self.offset(rank) :][..., : self.widths[rank]]

    def exact(self, t=T, ce_weight=CE_WEIGHT):
        """Loss and gradient in float64 on whole rows."""
        student = self.student.detach().double().requires_grad_()
        loss = (1 - ce_weight) * reference.taid(student, self.teacher.double(), t)
        loss = loss + ce_weight * reference.cross_entropy(student, self.labels)
        loss.backward(self.upstream.double())
        return loss.detach(), student.grad

    def run(self, rank, group, name="taid", **arguments):
        """This rank's loss and gradient, with labels and the mix unless told otherwise."""
        if name == "taid":
            arguments = {"t": T, **arguments}
        student = self.shard(self.student, rank).clone().requires_grad_()
        arguments = {
            "labels": self.labels,
            "ce_weight": CE_WEIGHT,
            "vocab_offset": self.offset(rank),
            **arguments,
        }
        teacher = self.shard(self.teacher, rank).clone()
        loss = distillation_loss(name, student, teacher, group=group, **arguments)
        loss.backward(self.upstream.to(loss.dtype))
        return loss.detach(), student.grad


def run_on_shards(case, **arguments):
    """Each rank's loss, the gradients side by side."""

    def on_rank(rank, world_size):
        return case.run(rank, dist.group.WORLD, **arguments)

    losses, grads = zip(*run_ranks(len(case.widths), on_rank), strict=True)
    assert all(torch.equal(loss, losses[0]) for loss in losses), "ranks differ in their bits"
    return losses[0], torch.cat(grads, -1)


def assert_accurate(loss, grad, expected_loss, expected_grad):
    torch.testing.assert_close(loss.double(), expected_loss, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize("widths", SHARDS.values(), ids=SHARDS)
@pytest.mark.parametrize("t", [0.0, T, 1.0])
def test_taid_and_cross_entropy_on_shards(widths, t):
    case = Case(widths)
    assert_accurate(*run_on_shards(case, t=t), *case.exact(t))


@pytest.mark.parametrize("widths", [SHARDS["2 uneven"], SHARDS["4 uneven"]], ids=str)
def test_each_loss_alone_on_shards(widths):
    case = Case(widths)
    alone = {"labels": None, "ce_weight": 0.0}
    assert_accurate(*run_on_shards(case, **alone), *case.exact(ce_weight=0.0))
    found = run_on_shards(case, name="forward_kl", **alone)
    assert_accurate(*found, *case.exact(t=1.0, ce_weight=0.0))
    found = run_on_shards(case, name="cross_entropy")
    assert_accurate(*found, *case.exact(ce_weight=1.0))


def test_shards_of_logits_far_apart_are_rescaled_to_one_maximum():
    """One shard's logits lie 60 below the other's in one model, 60 above in the other."""
    case = Case((30, 31))
    case.student[:, :30] -= 60
    case.teacher[:, :30] += 60
    loss, grad = run_on_shards(case, t=0.5)
    expected_loss, expected_grad = case.exact(t=0.5)
    torch.testing.assert_close(loss.double(), expected_loss, atol=2e-5, rtol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, atol=3e-6, rtol=0)


# loss, the mix's weight, statistics asked for -> floats a token that travel
TRAFFIC = {
    ("taid", 0.0, ()): 5,
    ("taid", CE_WEIGHT, ()): 6,
    ("taid", CE_WEIGHT, STATS): 10,
    ("forward_kl", 0.0, ("kl",)): 5,
    ("forward_kl", 0.0, ("cross_entropy",)): 6,
    ("cross_entropy", 0.0, ()): 3,
}


def test_one_collective_forward_and_none_backward():
    """Counted by the process group itself, whichever function called it; a few floats a token."""
    case = Case((20, 20))

    def on_rank(rank, world_size):
        sizes = []
        gather = dist.all_gather_into_tensor

        def counting(output, tensor, **arguments):
            sizes.append(tensor.numel())
            return gather(output, tensor, **arguments)

        dist.all_gather_into_tensor = counting
        calls = dist.group.WORLD._get_sequence_number_for_group
        counts = []
        for name, ce_weight, stats in TRAFFIC:
            student = case.shard(case.student, rank).clone().requires_grad_()
            options = {"t": T} if name == "taid" else {}
            before = calls()
            loss, _ = distillation_loss(
                name,
                student,
                case.shard(case.teacher, rank),
                labels=case.labels,
                ce_weight=ce_weight,
                group=dist.group.WORLD,
                return_stats=stats,
                **options,
            )
            forward = calls()
            loss.sum().backward()
            counts.append((forward - before, calls() - forward))
        return counts, sizes

    for counts, sizes in run_ranks(2, on_rank):
        assert counts == [(1, 0)] * len(TRAFFIC)
        assert sizes == [floats * TOKENS for floats in TRAFFIC.values()]


def test_a_group_of_one_needs_no_collective():
    case = Case((40,))

    def on_rank(rank, world_size):
        calls = dist.group.WORLD._get_sequence_number_for_group
        before = calls()
        result = case.run(rank, dist.group.WORLD)
        return calls() - before, result

    ((count, found),) = run_ranks(1, on_rank)
    assert count == 0
    assert_accurate(*found, *case.exact())


def test_statistics_on_shards():
    case = Case((17, 84))
    s, z = case.student.double(), case.teacher.double()
    p = ((1 - T) * s + T * z).softmax(-1)
    expected = {
        "objective": reference.taid(s, z, T),
        "cross_entropy_to_target": -(p * s.log_softmax(-1)).sum(-1),
        "kl": reference.forward_kl(s, z),
        "cross_entropy": reference.cross_entropy(s, case.labels),
    }

    def on_rank(rank, world_size):
        return distillation_loss(
            "taid",
            case.shard(case.student, rank),
            case.shard(case.teacher, rank),
            t=T,
            labels=case.labels,
            group=dist.group.WORLD,
            vocab_offset=case.offset(rank),
            return_stats=True,
        )[1]

    for stats in run_ranks(2, on_rank):
        assert list(stats) == list(STATS)
        for name, value in stats.items():
            torch.testing.assert_close(value.double(), expected[name], atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("filling", [7.0, torch.nan], ids=str)
@pytest.mark.parametrize("padding", [(0, 5), (3, 0, 0, 20), (20, 0, 6, 20)], ids=str)
def test_padding_may_differ_between_ranks_and_fill_a_shard(padding, filling):
    """Shards of equal width 20, whose labels need no vocab_offset."""
    width = 20
    real = torch.cat([rank * width + torch.arange(width - cut) for rank, cut in enumerate(padding)])
    dense = Case((len(real),))
    wide = Case((width,) * len(padding))
    for name in ("student", "teacher"):
        setattr(wide, name, torch.full((TOKENS, wide.vocabulary), filling))
        getattr(wide, name)[:, real] = getattr(dense, name)
    wide.upstream = dense.upstream
    wide.labels = torch.where(dense.labels < 0, dense.labels, real[dense.labels.clamp(min=0)])

    def on_rank(rank, world_size):
        return wide.run(rank, dist.group.WORLD, padding=padding[rank], vocab_offset=None)

    losses, grads = zip(*run_ranks(len(padding), on_rank), strict=True)
    grad = torch.cat(grads, -1)
    assert_accurate(losses[0], grad[:, real], *dense.exact())
    hidden = torch.ones(wide.vocabulary, dtype=torch.bool).index_fill_(0, real, False)
    assert not grad[:, hidden].any()
    assert hidden.sum() == sum(padding)


def test_a_shard_of_padding_has_no_say_in_the_maximum():
    """All real logits lie so far below zero that e^logit would vanish beside e^0."""
    case = Case((20, 20))
    case.student -= 200
    case.teacher -= 200

    def on_rank(rank, world_size):
        return case.run(rank, dist.group.WORLD, padding=20 * rank, labels=None, ce_weight=0.0)

    loss = run_ranks(2, on_rank)[0][0]
    expected = reference.taid(case.student[:, :20].double(), case.teacher[:, :20].double(), T)
    torch.testing.assert_close(loss.double(), expected, atol=1e-4, rtol=0)


def test_a_shard_of_minus_infinity_has_no_mass():
    case = Case((20, 20))
    case.student[:, 20:] = case.teacher[:, 20:] = -torch.inf
    case.labels %= 20
    loss, grad = run_on_shards(case)
    dense = Case((20,))
    dense.student, dense.teacher = case.student[:, :20], case.teacher[:, :20]
    dense.labels, dense.upstream = case.labels, case.upstream
    assert_accurate(loss, grad[:, :20], *dense.exact())
    assert not grad[:, 20:].any()


@pytest.mark.parametrize("inplace", [False, True])
def test_bf16_shards_are_computed_in_fp32(inplace):
    case = Case((60, 41), dtype=torch.bfloat16)
    loss, grad = run_on_shards(case, inplace=inplace)
    case.student, case.teacher = case.student.float(), case.teacher.float()
    expected_loss, expected_grad = run_on_shards(case)
    assert loss.dtype == torch.float32
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=0)
    assert torch.equal(grad, expected_grad.bfloat16())


def test_inplace_overwrites_the_shard_and_the_default_leaves_it():
    case = Case((60, 41))

    def on_rank(rank, world_size):
        outcome = []
        for inplace in (False, True):
            leaf = case.shard(case.student, rank).clone().requires_grad_()
            before = leaf.detach().clone()
            loss = distillation_loss(
                "taid",
                leaf,
                case.shard(case.teacher, rank),
                t=T,
                group=dist.group.WORLD,
                inplace=inplace,
            )
            loss.backward(case.upstream)
            kept = torch.equal(leaf.detach(), before)
            outcome.append((kept, leaf.grad.data_ptr() == leaf.data_ptr()))
        return outcome

    assert run_ranks(2, on_rank) == [[(True, False), (False, True)]] * 2


def test_transposed_logits_on_shards():
    """[s, b, V] seen as [b, s, V], as Megatron's output layer hands them over."""
    case = Case((60, 41))

    def on_rank(rank, world_size):
        leaf = case.shard(case.student, rank).reshape(4, 6, -1).transpose(0, 1).contiguous()
        leaf.requires_grad_()
        loss = distillation_loss(
            "taid",
            leaf.transpose(0, 1),
            case.shard(case.teacher, rank).reshape(4, 6, -1),
            t=T,
            labels=case.labels.view(4, 6),
            ce_weight=CE_WEIGHT,
            group=dist.group.WORLD,
            vocab_offset=case.offset(rank),
        )
        loss.backward(case.upstream.view(4, 6))
        return loss.detach().reshape(-1), leaf.grad.transpose(0, 1).reshape(TOKENS, -1)

    losses, grads = zip(*run_ranks(2, on_rank), strict=True)
    assert_accurate(losses[0], torch.cat(grads, -1), *case.exact())


def test_no_tokens_on_shards():
    case = Case((5, 6), tokens=0)
    loss, grad = run_on_shards(case)
    assert loss.shape == (0,)
    assert grad.shape == (0, 11)


def test_two_groups_side_by_side_do_not_mix():
    """Ranks 2 and 3 form the second tensor-parallel group: rank 2 has the first columns there."""
    cases = [Case((20, 20)), Case((20, 20), scale=2.0)]

    def on_rank(rank, world_size):
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        which, place = divmod(rank, 2)
        return cases[which].run(place, groups[which], vocab_offset=None)

    results = run_ranks(4, on_rank)
    for case, pair in zip(cases, (results[:2], results[2:]), strict=True):
        loss, grad = pair[0][0], torch.cat([grad for _, grad in pair], -1)
        assert_accurate(loss, grad, *case.exact())


def test_a_label_no_rank_has_is_refused_on_every_rank():
    case = Case((20, 20))
    case.labels[3] = 40

    def on_rank(rank, world_size):
        with pytest.raises(ValueError, match="label 40 is in no rank's real columns") as caught:
            case.run(rank, dist.group.WORLD)
        return str(caught.value)

    first, second = run_ranks(2, on_rank)
    assert first == second

"""The fused head on vocabulary shards, with and without sequence parallelism."""

import pytest
import torch
import torch.distributed as dist

from taid_megatron.losses.fused_head import fused_distillation_loss
from tests.distributed.ranks import run_ranks
from tests.unit.losses.divergences import CASES
from tests.unit.losses.test_fused_head import VOCABULARY, Inputs, apart

NAMES = ("taid", "gjs", "adaptive_kl", "dkd", "cross_entropy")
PADDING = 3


def _shard(weight, rank, size):
    """This rank's rows with padding behind them; the shards are not even."""
    border = VOCABULARY // 3
    part = weight[:border] if rank == 0 else weight[border:]
    return torch.cat([part, weight.new_ones(PADDING, weight.shape[1])]), 0 if rank == 0 else border


def _on_rank(rank, size, sequence_parallel):
    inputs = Inputs(shape=(8, 3))
    found = {}
    for key in NAMES:
        case = CASES[key]
        weight, offset = _shard(inputs.weight, rank, size)
        hidden = inputs.hidden.chunk(size)[rank] if sequence_parallel else inputs.hidden
        teacher = inputs.teacher[0].chunk(size)[rank] if sequence_parallel else inputs.teacher[0]
        hidden = hidden.clone().requires_grad_()
        total, values = fused_distillation_loss(
            *(case.name, hidden, weight.requires_grad_()),
            *(teacher.clone(), _shard(inputs.teacher[1], rank, size)[0]),
            loss_mask=inputs.mask,
            labels=inputs.labels,
            group=dist.group.WORLD,
            sequence_parallel=sequence_parallel,
            ce_weight=0.25,
            return_stats=("kl",),
            padding=PADDING,
            vocab_offset=offset,
            head_chunk_tokens=5,
            **case.options,
        )
        total.backward()
        found[key] = total.detach(), values, hidden.grad, weight.grad
    return found


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_shards_equal_the_whole(sequence_parallel):
    first, second = run_ranks(2, _on_rank, sequence_parallel)
    inputs = Inputs(shape=(8, 3))
    for key in NAMES:
        expected = apart(inputs, CASES[key], 0.25, ("kl",))
        (total, values, hidden, weight), (_, _, other_hidden, other_weight) = (
            first[key],
            second[key],
        )
        assert torch.equal(total, second[key][0])
        if sequence_parallel:
            hidden = torch.cat([hidden, other_hidden])
        else:
            assert torch.equal(hidden, other_hidden)
        for part in (weight, other_weight):
            assert not part[-PADDING:].any()
        weight = torch.cat([weight[:-PADDING], other_weight[:-PADDING]])
        found = total, values, hidden, weight
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10, msg=key)

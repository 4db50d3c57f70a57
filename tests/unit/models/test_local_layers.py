"""The leaner layers give what megatron-core's own give: rotation, gate, and their gradients."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.transformer import TransformerConfig
from torch.nn import functional

from taid_megatron.models.local_layers import gated, rotate


@pytest.mark.parametrize("rotated", [8, 4])
@pytest.mark.parametrize("batch_angles", [1, 2])
def test_rotation_is_megatrons(rotated, batch_angles) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 2, 3, 8, requires_grad=True)
    half = torch.randn(6, batch_angles, 1, rotated // 2)
    angles = torch.cat([half, half], dim=-1)
    upstream = torch.randn(6, 2, 3, 8)

    ours = rotate(x, half.cos(), half.sin())
    theirs = _apply_rotary_pos_emb_bshd(x, angles, rotary_interleaved=False)

    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (ours, theirs)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-6)
    assert not torch.equal(ours, x)


def test_gradient_of_the_rotation_is_exact() -> None:
    x = torch.randn(3, 1, 2, 4, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(3, 1, 1, 1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(x, angles.cos(), angles.sin()), x)


@pytest.mark.parametrize("with_gradient", [True, False])
def test_gate_is_the_activation_of_the_first_half(with_gradient) -> None:
    x = torch.randn(5, 8, requires_grad=with_gradient)
    before = x.detach().clone()
    out = gated(functional.silu)(x)
    torch.testing.assert_close(out, functional.silu(x[:, :4]) * x[:, 4:])
    assert torch.equal(x.detach(), before)


def _logits(rank: int, size: int, config: str, stock: bool) -> list[torch.Tensor]:
    from megatron.core.transformer.attention import SelfAttention

    from taid_megatron.models import build
    from tests.distributed import toy

    if stock:
        build.RotaryAttention = SelfAttention
        stock_config = TransformerConfig
        build.TransformerConfig = lambda **options: stock_config(
            **{**options, "use_te_activation_func": False}
        )
    with toy.trainer(config) as trainer:
        pair = trainer.pairs[0]
        tokens = torch.arange(64).reshape(2, 32)
        logits = pair(tokens, torch.arange(32).expand(2, 32), None)
        logits.student.sum().backward()
        gradients = [parameter.main_grad.clone() for parameter in pair.parameters()]
        return [logits.student.detach(), logits.teacher, *gradients]


def test_a_whole_model_is_megatrons(tmp_path) -> None:
    from tests.distributed import toy
    from tests.distributed.ranks import run_ranks

    config = str(toy.write_config(tmp_path))
    (ours,), (stock,) = (run_ranks(1, _logits, config, choice) for choice in (False, True))
    for value, expected in zip(ours, stock, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)

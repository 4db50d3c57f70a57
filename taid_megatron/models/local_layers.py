"""Parts of megatron-core's local layers in fewer passes over memory; the results are the same bits.

Transformer Engine's layers have fused kernels for both. The local ones rotate with two
concatenations and a negation, take cosine and sine anew for queries and keys, and add a zero to the
half of a gated activation, which the backward then keeps a copy of.

Shapes: S sequence, b micro-batch, n heads of this rank, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor
from torch.autograd.function import once_differentiable


class RotaryAttention(SelfAttention):
    """megatron-core's, but queries and keys are already rotated where it would come to that."""

    _angles: Tensor | None = None

    def forward(self, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any) -> Any:
        """As megatron-core's; rotary_pos_emb: angles [S, 1 or b, 1, r], r <= d."""
        self._angles = rotary_pos_emb
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._angles = None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Query [S, b, n, d], key and value [S, b, groups, d]; the first two rotated."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        if self._angles is not None:
            # megatron-core gives each angle twice, once for either half of the rotated channels
            angles = self._angles[..., : self._angles.shape[-1] // 2]
            cos, sin = angles.cos().to(query.dtype), angles.sin().to(query.dtype)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        return query, key, value


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs (i, i + r/2) of the first r. [S, b, n, d], [S, 1 or b, 1, r/2] x 2.

    Source: Su et al., RoFormer, 2021, in the halves of GPT-NeoX. No gradient in cos and sin.
    """
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    sizes = [half, half, x.shape[-1] - 2 * half]
    first, second, rest = x.split_with_sizes(sizes, -1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_first, out_second, out_rest = out.split_with_sizes(sizes, -1)
    torch.mul(first, cos, out=out_first).sub_(second * sin)
    torch.mul(second, cos, out=out_second).add_(first * sin)
    if sizes[2]:
        out_rest.copy_(rest)
    return out


def gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """activation(x[..., :f]) * x[..., f:] for x [..., 2 * f]."""

    def gated_activation(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        opened = activation(gate)
        return opened * up if opened.requires_grad else opened.mul_(up)

    return gated_activation

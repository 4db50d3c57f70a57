"""RMSNorm and LayerNorm for megatron-core's local layers, with sequence parallelism.

megatron-core's own torch norm refuses sequence parallelism: there every tensor-parallel rank
normalises its share of the sequence, so a weight's gradient is a part that has to be summed over
the ranks. Megatron's gradient finaliser does that for weights marked `sequence_parallel`. Like
Megatron's norms the weights carry no `tensor_model_parallel` mark: they are the same on every rank
and count once in the gradient norm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


class _Norm(nn.Module):
    """What both norms share: megatron-core's constructor call, and the marks on the weights.

    config: megatron-core's; params_dtype, sequence_parallel and normalization are read.
    hidden_size: normalised channels. eps: added to the variance.
    Raises ValueError for another normalization than this one, and for variants it does not do.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        _refuse(config, type(self).__name__)
        self.hidden_size = hidden_size
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self._mark(self.weight, config)

    @staticmethod
    def _mark(parameter: nn.Parameter, config: TransformerConfig) -> None:
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.hidden_size}, eps={self.eps}"


class RMSNorm(_Norm):
    """x / rms(x) * weight over the last axis, in fp32 inside. [..., h] -> [..., h], dtype kept.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last axis."""
        return functional.rms_norm(hidden_states, (self.hidden_size,), self.weight, self.eps)


class LayerNorm(_Norm):
    """(x - mean(x)) / std(x) * weight + bias over the last axis, in fp32 inside.

    [..., h] -> [..., h], dtype kept. Source: Ba, Kiros and Hinton, Layer Normalization, 2016.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(config, hidden_size, eps)
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self._mark(self.bias, config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last axis."""
        shape, weight, bias = (self.hidden_size,), self.weight, self.bias
        if hidden_states.dtype is torch.bfloat16 and hidden_states.device.type == "cpu":
            # torch's CPU kernel sums the weights' gradients over the tokens in bf16: 3% off after
            # 512 tokens. The CUDA kernel sums in fp32.
            wide = hidden_states.float()
            output = functional.layer_norm(wide, shape, weight.float(), bias.float(), self.eps)
            return output.to(torch.bfloat16)
        return functional.layer_norm(hidden_states, shape, weight, bias, self.eps)


_NORMS: dict[str, type[_Norm]] = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}


def norm_for(normalization: str) -> type[_Norm]:
    """The class for megatron-core's name of a normalisation. Raises ValueError where unknown."""
    if normalization not in _NORMS:
        raise ValueError(f"normalization: {normalization!r} is none of {', '.join(_NORMS)}")
    return _NORMS[normalization]


def _refuse(config: TransformerConfig, name: str) -> None:
    if config.normalization != name:
        raise ValueError(f"{name} where config.normalization is {config.normalization!r}")
    for option in (
        "layernorm_zero_centered_gamma",
        "memory_efficient_layer_norm",
        "persist_layer_norm",
    ):
        if getattr(config, option):
            raise ValueError(
                f"{option}: only in Transformer Engine's or Apex's norms; set it to false"
            )

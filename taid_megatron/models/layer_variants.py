"""What megatron-core's GPT lacks and some model families have: stretched rotary angles, and
attention and feed-forward block side by side.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from taid_megatron.config.schema import RotaryScaling


class ParallelResidualLayer(TransformerLayer):
    """x + attention(norm1(x)) + mlp(norm2(x)); megatron-core's layer puts one after the other.

    Source: Black et al., GPT-NeoX-20B, 2022, with a norm of its own for each half.
    """

    _input: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As megatron-core's; hidden_states [s, b, h]."""
        self._input = hidden_states
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            self._input = None

    def _forward_pre_mlp_layernorm(self, hidden_states: Tensor) -> Tensor:
        # hidden_states, with attention's output in it, stays the residual that mlp is added to
        return super()._forward_pre_mlp_layernorm(self._input)


def stretch(frequencies: Tensor, scaling: RotaryScaling) -> Tensor:
    """Rotary frequencies, radians per position, for longer sequences. fp32 [r/2] -> [r/2].

    Source: 'linear': Chen et al., position interpolation, 2023; 'llama3': Llama 3.1's release.
    """
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelengths = 2 * math.pi / frequencies
    # how many times a wave fits into the old length, from low_freq_factor (0) to high (1)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    fits = scaling.original_max_position_embeddings / wavelengths
    kept = ((fits - scaling.low_freq_factor) / span).clamp(0, 1)
    return torch.lerp(frequencies / scaling.factor, frequencies, kept)

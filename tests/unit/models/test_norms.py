"""Norms: values and gradients against float64, and the marks Megatron's finaliser looks for."""

import pytest
import torch
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer import TransformerConfig

from taid_megatron.models.norms import LayerNorm, RMSNorm, norm_for

HIDDEN, EPS = 48, 0.1  # an epsilon that shows in bf16 too


def config_of(normalization, **options):
    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        normalization=normalization,
        **options,
    )


def build(kind, dtype=torch.float32):
    """A norm with random weights, as megatron-core calls the constructor."""
    norm = kind(config=config_of(kind.__name__, params_dtype=dtype), hidden_size=HIDDEN, eps=EPS)
    generator = torch.Generator().manual_seed(1)
    for parameter in norm.parameters():
        noise = 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.data += noise.to(dtype)
    return norm


def dense(norm, hidden_states):
    """The definition in float64, with float64 weights: output and [input, *weights]."""
    leaves = [
        tensor.detach().double().requires_grad_() for tensor in (hidden_states, *norm.parameters())
    ]
    x, weight, *bias = leaves
    if bias:
        x = x - x.mean(-1, keepdim=True)
    output = x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight
    return (output + bias[0] if bias else output), leaves


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-6), (torch.bfloat16, 2**-8), (torch.float64, 1e-12)],
)
def test_equals_float64_definition(kind, dtype, tolerance):
    """Output and all gradients are right to the rounding of their own dtype, over 1,024 tokens.

    In bf16 that is one rounding of the result: sums over channels and tokens run in fp32.
    """
    torch.manual_seed(0)
    norm = build(kind, dtype)
    hidden_states = (torch.randn(256, 4, HIDDEN) * 2 + 1).to(dtype).requires_grad_()
    upstream = torch.randn(hidden_states.shape).to(dtype)
    output = norm(hidden_states)
    expected, leaves = dense(norm, hidden_states)
    gradients = torch.autograd.grad(output, [hidden_states, *norm.parameters()], upstream)
    expected_gradients = torch.autograd.grad(expected, leaves, upstream.double())
    assert output.dtype == dtype
    for got, want in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        assert got.dtype == dtype
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error <= tolerance


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_starts_as_plain_normalisation(kind):
    norm = kind(config=config_of(kind.__name__), hidden_size=HIDDEN)
    output = norm(torch.randn(64, HIDDEN) * 5)
    torch.testing.assert_close(output.pow(2).mean(-1), torch.ones(64), atol=1e-4, rtol=0)
    assert "eps=1e-05" in repr(norm)


def test_per_head_channels():
    """Query and key norms get [s, b, heads, channels] and normalise each head."""
    norm = RMSNorm(config=config_of("RMSNorm"), hidden_size=12, eps=EPS)
    query = torch.randn(5, 2, 4, 12)
    torch.testing.assert_close(norm(query)[:, :, 1], norm(query[:, :, 1]))


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_marks_for_gradient_reduction(kind, sequence_parallel):
    """Each weight says whether its gradient is a part; none counts as a tensor-parallel shard."""
    config = config_of(
        kind.__name__,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        params_dtype=torch.bfloat16,
    )
    norm = kind(config=config, hidden_size=HIDDEN, eps=EPS)
    parameters = list(norm.parameters())
    assert len(parameters) == (2 if kind is LayerNorm else 1)
    for parameter in parameters:
        assert parameter.sequence_parallel is sequence_parallel
        assert parameter.dtype == torch.bfloat16
        assert not hasattr(parameter, "tensor_model_parallel")
        assert param_is_not_tensor_parallel_duplicate(parameter, tp_group=_Rank(0))
        assert not param_is_not_tensor_parallel_duplicate(parameter, tp_group=_Rank(1))


class _Rank(int):
    def rank(self):
        return int(self)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("layernorm_zero_centered_gamma", True),
        ("memory_efficient_layer_norm", True),
        ("persist_layer_norm", True),
    ],
)
def test_refuses_variants_it_does_not_do(option, value):
    with pytest.raises(ValueError, match=option):
        RMSNorm(config=config_of("RMSNorm", **{option: value}), hidden_size=HIDDEN)


def test_refuses_the_other_normalization():
    with pytest.raises(ValueError, match="LayerNorm where config.normalization is 'RMSNorm'"):
        LayerNorm(config=config_of("RMSNorm"), hidden_size=HIDDEN)
    with pytest.raises(ValueError, match="'L2Norm' is none of RMSNorm, LayerNorm"):
        norm_for("L2Norm")
    assert norm_for("LayerNorm") is LayerNorm
    assert norm_for("RMSNorm") is RMSNorm

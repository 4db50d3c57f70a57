"""TorchAttention: values and gradients against a dense float64 definition; what it keeps; dropout.

Shapes: S sequence, b micro-batch, n heads, g groups, d channels.
"""

import gc
import math

import megatron.core.tensor_parallel.random as megatron_random
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import build_module
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from taid_megatron.models import attention as attention_module
from taid_megatron.models.attention import TorchAttention
from taid_megatron.models.norms import RMSNorm

S, B, HEADS, CHANNELS = 48, 2, 4, 8


def build(groups=HEADS, layer_number=1, softmax_scale=None, **options):
    """A layer's attention, as megatron-core calls the constructor."""
    options = {"attention_dropout": 0.0} | options
    config = TransformerConfig(
        num_layers=4,
        hidden_size=HEADS * CHANNELS,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        **options,
    )
    return TorchAttention(
        config=config,
        layer_number=layer_number,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        cp_comm_type=None,
        softmax_scale=softmax_scale,
        pg_collection=None,
    )


def random_inputs(groups=HEADS, batch=B, seq_length=S, dtype=torch.float32, seed=0):
    """Query [S, b, n, d], key and value [S, b, g, d], slices of one tensor as in Megatron."""
    torch.manual_seed(seed)
    mixed = torch.randn(seq_length, batch, groups, (HEADS // groups + 2) * CHANNELS, dtype=dtype)
    query, key, value = mixed.split([HEADS // groups * CHANNELS, CHANNELS, CHANNELS], dim=-1)
    query = query.reshape(seq_length, batch, HEADS, CHANNELS)
    return [part.detach().requires_grad_() for part in (query, key, value)]


def dense(query, key, value, document_ids=None, window=None, scale=None):
    """The definition: one query token and head at a time may see a set of earlier tokens."""
    seq_length, batch, heads, channels = query.shape
    position = torch.arange(seq_length)
    seen = position[:, None] >= position
    if window is not None:
        seen = seen & (position[:, None] - position < window)
    seen = seen.expand(batch, 1, -1, -1)
    if document_ids is not None:
        seen = seen & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    group_of_head = torch.arange(heads) // (heads // key.shape[2])
    key, value = key[:, :, group_of_head], value[:, :, group_of_head]
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) * (scale or channels**-0.5)
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("bnst,tbnd->sbnd", weights, value).reshape(seq_length, batch, -1)


def assert_equals_dense(attention, inputs, document_ids=None, tolerance=2e-6, **definition):
    """Output and the three gradients, under a random upstream gradient."""
    output = attention(*inputs, document_ids, attn_mask_type=AttnMaskType.causal)
    upstream = torch.randn(output.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(output, inputs, upstream.to(output.dtype))
    wide = [part.detach().double().requires_grad_() for part in inputs]
    expected = dense(*wide, document_ids=document_ids, **definition)
    expected_gradients = torch.autograd.grad(expected, wide, upstream.to(output.dtype).double())
    assert output.shape == (inputs[0].shape[0], inputs[0].shape[1], HEADS * CHANNELS)
    assert output.dtype == inputs[0].dtype
    for got, want in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max().clamp(min=1)


def several_documents(batch=B, seq_length=S):
    """Different in every row: lengths 5, 17, the rest; then 20, the rest; then one; ..."""
    starts = [(5, 22), (20,), (), (1, 2, seq_length - 1)]
    rows = torch.zeros(batch, seq_length, dtype=torch.int32)
    for row, boundaries in zip(rows, starts, strict=False):
        for start in boundaries:
            row[start:] += 1
    return rows


def saved_by(call):
    """Every tensor that autograd keeps during call(), and call's result."""
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()
    return saved, result


@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("batch", [1, 3])
def test_causal_equals_definition(groups, batch):
    """Plain causal attention, grouped or not, every batch row on its own."""
    assert_equals_dense(build(groups), random_inputs(groups, batch))


@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("window", [1, 2, 7, S - 1, S, S + 5])
def test_window_equals_definition(groups, window):
    """window_size (w - 1, 0): a token sees itself and the w - 1 before it."""
    attention = build(groups, window_size=(window - 1, 0))
    assert_equals_dense(attention, random_inputs(groups), window=window)


@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_documents_equal_definition(groups, batch, window, dtype):
    """Several documents in a row, different ones in each row, with and without a window."""
    attention = build(groups, window_size=None if window is None else (window - 1, 0))
    document_ids = several_documents(batch).to(dtype)
    assert_equals_dense(attention, random_inputs(groups, batch), document_ids, window=window)


def test_documents_do_not_leak():
    """Changing one document's tokens leaves the output of the others as it was, bit for bit."""
    document_ids, attention = several_documents(), build(2)
    query, key, value = random_inputs(2)
    before = attention(query, key, value, document_ids)
    with torch.no_grad():
        for part in (query, key, value):
            part[5:22, 0] += 1  # the second document of row 0
    after = attention(query, key, value, document_ids)
    changed = (before != after).any(-1).t()
    assert torch.equal(changed, (document_ids == 1) & (torch.arange(B) == 0)[:, None])


def test_layers_that_skip_the_window():
    """window_attn_skip_freq: every second layer sees the whole past."""
    options = {"window_size": (3, 0), "window_attn_skip_freq": 2}
    assert_equals_dense(build(layer_number=1, **options), random_inputs(), window=4)
    assert_equals_dense(build(layer_number=2, **options), random_inputs(), window=None)
    assert_equals_dense(build(window_size=(-1, 0)), random_inputs(), window=None)


def test_softmax_scale():
    """From the constructor as Megatron's layers pass it, else from the config, else 1/sqrt(d)."""
    assert_equals_dense(build(softmax_scale=0.7), random_inputs(), scale=0.7)
    assert_equals_dense(build(), random_inputs(), scale=CHANNELS**-0.5)
    config = {"hidden_size": 64, "num_attention_heads": 4, "num_layers": 1}
    scaled = TransformerConfig(**config, softmax_scale=0.3)
    arguments = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
    assert TorchAttention(scaled, **arguments).softmax_scale == 0.3
    assert TorchAttention(TransformerConfig(**config), **arguments).softmax_scale == 0.25


@pytest.mark.parametrize("groups", [1, 2, HEADS])
@pytest.mark.parametrize("documents", [False, True])
def test_bf16(groups, documents):
    """bf16 in and out, softmax in fp32: off by a few roundings of the largest value."""
    inputs = random_inputs(groups, dtype=torch.bfloat16)
    document_ids = several_documents() if documents else None
    assert_equals_dense(build(groups), inputs, document_ids, tolerance=2**-6)


@pytest.mark.parametrize(
    ("window", "documents"), [(None, False), (S, False), (5, False), (None, True), (5, True)]
)
@pytest.mark.parametrize("groups", [2, HEADS])
def test_keeps_no_scores(window, documents, groups):
    """Nothing of S*S is kept for the backward but one bias, the same one in every layer.

    Plain causal attention, and a window that holds the sequence, keep not even that. Keys and
    values are kept as they came: not repeated for the heads of their group.
    """
    long, layers = 256, 3  # so long that S*S stands out
    window = long if window == S else window
    attention = build(groups, window_size=None if window is None else (window - 1, 0))
    document_ids = several_documents(1, long) if documents else None
    query, key, value = random_inputs(groups, 1, long)
    saved, _ = saved_by(lambda: [attention(query, key, value, document_ids) for _ in range(layers)])
    kept = {tensor.data_ptr(): tensor.numel() for tensor in saved}
    biased = documents or (window is not None and window < long)
    bias = long * long if biased else 0
    assert [size for size in kept.values() if size >= long * long] == ([bias] if biased else [])
    outputs = layers * long * HEADS * (CHANNELS + 1)  # and the softmax's sum of every row
    inputs = query.numel() + key.numel() + value.numel()  # the same for the three calls
    assert sum(kept.values()) <= inputs + outputs + bias


@pytest.fixture
def built(monkeypatch):
    """How often a document bias was built; none is held at the start."""
    calls = []
    build_one = attention_module._document_bias
    monkeypatch.setattr(
        attention_module, "_document_bias", lambda *args: calls.append(args) or build_one(*args)
    )
    monkeypatch.setattr(attention_module, "_document_biases", attention_module._DocumentBiases())
    return calls


def test_bias_is_built_once_for_all_layers(built):
    """Layers and recomputation share it; it goes when the micro-batch's ids go."""
    layers = [build(layer_number=number) for number in (1, 2, 3)]
    query, key, value = random_inputs()
    document_ids = several_documents()

    def stack(query, document_ids):
        for layer in layers:
            query = layer(query, key, value, document_ids).view_as(query)
        return query

    stack(query, document_ids).sum().backward()
    assert len(built) == 1
    # recomputed layer by layer; like Megatron's, torch's checkpoint passes detached copies
    hidden = query
    for layer in layers:
        hidden = checkpoint(layer, hidden, key, value, document_ids, use_reentrant=True).view_as(
            query
        )
    hidden.sum().backward()
    assert len(built) == 1
    assert len(attention_module._document_biases) == 1
    built.clear()
    del document_ids, hidden
    gc.collect()
    assert len(attention_module._document_biases) == 0


def test_bias_follows_its_ids(built):
    """In-place changes, other views of one buffer, windows and dtypes get their own bias."""
    inputs, attention = random_inputs(), build()
    buffer = torch.stack([several_documents(), several_documents().flip(0)])
    for document_ids in (*buffer, buffer[0].flip(0), buffer[:, 1]):
        assert_equals_dense(attention, inputs, document_ids)
    assert len(built) == 4
    document_ids = buffer[0]
    assert_equals_dense(attention, inputs, document_ids)
    document_ids[:, 7:] += 9  # while the old bias is held
    assert_equals_dense(attention, inputs, document_ids)
    assert_equals_dense(build(window_size=(2, 0)), inputs, document_ids, window=3)
    wide = random_inputs(dtype=torch.float64)
    assert_equals_dense(attention, wide, document_ids, tolerance=1e-12)
    assert len(built) == 8
    assert len(attention_module._document_biases) == 2


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [None, 7])
def test_context_parallel_ranks_see_what_the_whole_would(documents, window):
    """Of 3 ranks, each with two parts of the sequence, keys gathered rank after rank."""
    query, key, value = (part.detach() for part in random_inputs())
    document_ids = several_documents() if documents else None
    expected = dense(query, key, value, document_ids, window)
    options = {"window_size": None if window is None else (window - 1, 0)}
    alone, places = build(**options), []
    shares = [attention_module.Share(rank, 3) for rank in range(3)]
    columns = torch.cat([share.rows(S, query.device) for share in shares])  # as they are gathered
    for share in shares:
        rows = share.rows(S, query.device)
        if documents:
            bias = attention_module._document_biases.get(document_ids, window, query.dtype, share)
        else:
            bias = attention_module._causal_bias(S, window, query.dtype, query.device, share)
        parts = [query[rows], key[columns], value[columns]]
        found = attention_module._attend(
            *(part.permute(1, 2, 0, 3) for part in parts), bias, 0.0, alone.softmax_scale
        )
        found = found.permute(2, 0, 1, 3).reshape(S // 3, B, -1)
        torch.testing.assert_close(found, expected[rows], rtol=0, atol=2e-6)
        places += rows.tolist()
    assert sorted(places) == list(range(S))
    assert places[: S // 3] == [*range(8), *range(S - 8, S)]


def test_two_micro_batches_in_flight_are_both_held(built):
    """A pipeline alternates between two micro-batches: neither layer nor pass builds anew."""
    first, second, third = several_documents(), several_documents() + 1, several_documents() + 2
    attention, inputs = build(), random_inputs()
    for _ in range(3):
        attention(*inputs, first)
        attention(*inputs, second)
    assert len(built) == 2
    attention(*inputs, first)
    attention(*inputs, third)  # pushes out the second, used longest ago
    attention(*inputs, first)
    assert len(built) == 3
    assert len(attention_module._document_biases) == 2


def test_evaluation_in_inference_mode(built):
    """What was built under inference_mode can be kept by a later backward."""
    windowed = build(window_size=(11, 0))
    inputs, document_ids = random_inputs(), several_documents()
    attention_module._causal_bias.cache_clear()
    with torch.inference_mode():
        windowed(*inputs, None)
        build()(*inputs, document_ids)
        own = document_ids.clone()  # an inference tensor: its changes go unrecorded
        before = build()(*inputs, own)
        own[:, 3:] += 1
        assert not torch.equal(before, build()(*inputs, own))
    assert_equals_dense(windowed, inputs, window=12)
    assert_equals_dense(build(), inputs, document_ids)


@pytest.mark.parametrize("bias", [False, True])
def test_groups_expanded_where_no_fused_kernel_takes_them(monkeypatch, bias):
    """The way that CUDA goes with a mask: repeated keys and values, summed gradients."""
    monkeypatch.setattr(attention_module, "_fused_takes_groups", lambda *args: False)
    document_ids = several_documents() if bias else None
    attention, inputs = build(2), random_inputs(2)
    assert_equals_dense(attention, inputs, document_ids)
    saved, _ = saved_by(lambda: attention(*inputs, document_ids))
    assert not [tensor for tensor in saved if tensor.shape[1:] == (HEADS, S, S)]


def test_asks_torch_which_kernel_takes_groups():
    """fp32 and bf16 on a CPU have one; dropout leaves the unfused one, which would keep S*S."""
    arguments = [part.permute(1, 2, 0, 3) for part in random_inputs(2)]
    takes = attention_module._fused_takes_groups
    assert takes(*arguments, None, 0.0, 1.0)
    assert not takes(*arguments, None, 0.1, 1.0)


@pytest.fixture
def rng_tracker(monkeypatch):
    """Megatron's CUDA generators, kept in torch's CPU generator; seeds anew when called."""
    monkeypatch.setattr(torch.cuda, "manual_seed", torch.manual_seed)
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
    monkeypatch.setattr(
        megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()
    )
    monkeypatch.setattr(
        megatron_random,
        "_set_cuda_rng_state",
        lambda state, *args, **kwargs: torch.set_rng_state(state),
    )
    for name in ("_CUDA_RNG_STATE_TRACKER", "_CUDA_RNG_STATE_TRACKER_INITIALIZED"):
        monkeypatch.setattr(megatron_random, name, getattr(megatron_random, name))
    with torch.random.fork_rng(devices=[]):
        yield lambda seed=5: megatron_random.model_parallel_cuda_manual_seed(
            seed, tp_rank=0, ep_rank=0, etp_rank=0, force_reset_rng=True
        )


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("groups", [2, HEADS])
def test_dropout_statistics(rng_tracker, documents, groups):
    """Equal scores and values of 1: token i's output is the kept share of its k visible tokens.

    Mean 1 and variance p / (k (1 - p)) with p = 0.25, over 1,536 draws a token.
    """
    rng_tracker()
    attention, batch, p = build(groups, attention_dropout=0.25), 64, 0.25
    shapes = [(S, batch, heads, CHANNELS) for heads in (HEADS, groups, groups)]
    query, key, value = torch.zeros(shapes[0]), torch.zeros(shapes[1]), torch.ones(shapes[2])
    document_ids = torch.arange(S).div(16, rounding_mode="floor").expand(batch, S)
    visible = torch.arange(1, S + 1)
    if documents:
        visible = torch.arange(S) % 16 + 1
    draws = [
        attention(query, key, value, document_ids if documents else None)
        .view(S, batch, HEADS, CHANNELS)[..., 0]
        .flatten(1)
        for _ in range(6)
    ]
    kept = torch.cat(draws, dim=1)
    variance = p / (visible * (1 - p))
    assert ((kept.mean(1) - 1).abs() < 5 * (variance / kept.shape[1]).sqrt()).all()
    assert ((kept.var(1) / variance - 1).abs() < 0.25).all()


def test_dropout_draws_from_megatrons_generator(rng_tracker):
    """Same seed, same draw; the next call draws anew; torch's own generator stays where it was."""
    attention, inputs = build(attention_dropout=0.3), random_inputs()
    rng_tracker(5)
    state = torch.get_rng_state()
    first, second = attention(*inputs, None), attention(*inputs, None)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)
    rng_tracker(5)
    torch.manual_seed(99)
    assert torch.equal(attention(*inputs, None), first)
    rng_tracker(6)
    assert not torch.equal(attention(*inputs, None), first)


def test_dropout_under_sequence_parallelism(rng_tracker):
    """Megatron's block has forked the generator already: the current one is used."""
    options = {"sequence_parallel": True, "tensor_model_parallel_size": 2}
    attention, inputs = build(attention_dropout=0.3, **options), random_inputs()
    rng_tracker(5)
    tracked = megatron_random.get_cuda_rng_tracker().get_states()
    torch.manual_seed(3)
    first = attention(*inputs, None)
    after = megatron_random.get_cuda_rng_tracker().get_states()
    assert all(torch.equal(tracked[name], after[name]) for name in tracked)
    torch.manual_seed(3)
    assert torch.equal(attention(*inputs, None), first)
    torch.manual_seed(4)
    assert not torch.equal(attention(*inputs, None), first)


@pytest.mark.parametrize("documents", [False, True])
def test_dropout_is_recomputed_alike(rng_tracker, documents):
    """Under Megatron's checkpointing the backward drops what the forward dropped."""
    attention, inputs = build(2, attention_dropout=0.3), random_inputs(2)
    document_ids = several_documents() if documents else None
    results = []
    for run in (attention, lambda *args: megatron_random.checkpoint(attention, False, *args)):
        rng_tracker(5)
        output = run(*inputs, document_ids)
        for part in inputs:
            part.grad = None
        output.square().sum().backward()
        results.append([output, *(part.grad.clone() for part in inputs)])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize(
    "attention", [build(), build(attention_dropout=0.3).eval()], ids=["p=0", "eval"]
)
def test_no_dropout_touches_no_generator(attention, monkeypatch):
    """Neither torch's generator moves nor is Megatron's tracker asked for."""

    def unexpected(*args, **kwargs):
        raise AssertionError("asked for the tracker")

    monkeypatch.setattr("megatron.core.tensor_parallel.get_cuda_rng_tracker", unexpected)
    inputs = random_inputs()
    state = torch.get_rng_state()
    attention(*inputs, None).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def megatron_on_one_rank(rng_tracker, monkeypatch):
    """Process groups of one rank, and megatron-core's score buffer on the CPU."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    rng_tracker()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    # Megatron keeps a few groups beyond that. A rank that a later test forks from here would try to
    # end their threads, which it does not have.
    for name, value in vars(parallel_state).items():
        if isinstance(value, torch.distributed.ProcessGroup):
            setattr(parallel_state, name, None)


def megatron_layer(core_attention, **options):
    """megatron-core's transformer layer, local kind, in the Llama shape with its own attention."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * CHANNELS,
        num_attention_heads=HEADS,
        num_query_groups=2,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        softmax_scale=0.4,
        **options,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = core_attention
    torch.manual_seed(2)
    return build_module(spec, config=config, layer_number=1)


@pytest.mark.parametrize("recompute", [False, True])
def test_in_megatrons_layer(megatron_on_one_rank, built, recompute):
    """The same layer output and gradients as with megatron-core's attention and a dense mask.

    With core_attn recomputed, the ids pass through Megatron's checkpoint and the bias is not built
    again.
    """
    options = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    document_ids = several_documents()
    hidden = random_inputs(batch=B)[0].detach().flatten(2).requires_grad_()
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    cases = [
        (megatron_layer(DotProductAttention), ~same.tril()),
        (megatron_layer(TorchAttention, **(options if recompute else {})), document_ids),
    ]
    results = []
    for layer, mask in cases:
        output, _ = layer(hidden, attention_mask=mask)
        weights = [hidden, *layer.parameters()]
        for weight in weights:
            weight.grad = None
        output.square().sum().backward()
        results.append([output, *(weight.grad for weight in weights)])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(built) == 1


def test_dropout_argument_stands_for_the_configs():
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    arguments = (config, 1, AttnMaskType.causal, "self")
    assert TorchAttention(*arguments).dropout == config.attention_dropout == 0.1
    assert TorchAttention(*arguments, attention_dropout=0.0).dropout == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"apply_query_key_layer_scaling": True}, "apply_query_key_layer_scaling"),
        ({"softmax_type": "learnable"}, "softmax_type 'learnable'"),
        ({"window_size": (4, 4)}, r"window_size \(4, 4\)"),
        ({"window_size": (-2, 0)}, r"window_size \(-2, 0\)"),
    ],
)
def test_refuses_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_refuses_what_is_not_causal():
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    with pytest.raises(ValueError, match="padding: this attention is causal"):
        TorchAttention(config, 1, AttnMaskType.padding, "self")
    with pytest.raises(ValueError, match="no_mask: this attention is causal"):
        build()(*random_inputs(), None, attn_mask_type=AttnMaskType.no_mask)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 1, S, S, dtype=torch.bool), r"torch.bool \[1, 1, 48, 48\]: .* \[2, 48\]"),
        (torch.ones(B, S, dtype=torch.bool), r"torch.bool \[2, 48\]"),
        (torch.zeros(B, S), r"torch.float32 \[2, 48\]"),
        (torch.zeros(B, S - 1, dtype=torch.int64), r"document_ids \[2, 47\]: expected .*\[2, 48\]"),
        (torch.zeros(1, S, dtype=torch.int64), r"document_ids \[1, 48\]"),
        (torch.zeros(S, dtype=torch.int64), r"document_ids \[48\]"),
        (torch.zeros(S, B, dtype=torch.int64), r"document_ids \[48, 2\]"),
        (torch.zeros(B, S, dtype=torch.int64, device="meta"), "document_ids on meta, query on cpu"),
    ],
)
def test_refuses_masks(mask, message):
    with pytest.raises(ValueError, match=message):
        build()(*random_inputs(), mask)


def test_refuses_shapes_and_extras():
    query, key, value = random_inputs()
    attention = build()
    with pytest.raises(ValueError, match=r"one length and batch: query \[1, 2, 4, 8\]"):
        attention(query[-1:], key, value, None)
    with pytest.raises(ValueError, match=r"multiple .* key \[48, 2, 3, 8\]"):
        attention(query, key[:, :, :3], value[:, :, :3], None)
    with pytest.raises(ValueError, match=r"value \[48, 2, 2, 8\]"):
        attention(query, key, value[:, :, :2], None)
    with pytest.raises(ValueError, match=r"query \[96, 4, 8\]"):
        attention(query.flatten(0, 1), key, value, None)
    with pytest.raises(ValueError, match="attention_bias"):
        attention(query, key, value, None, attention_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="packed_seq_params"):
        attention(query, key, value, None, packed_seq_params=object())

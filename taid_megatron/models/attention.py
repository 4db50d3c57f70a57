"""Causal self-attention for megatron-core's layers through torch's fused kernels.

Stands where megatron-core's local layers have DotProductAttention, which keeps [b, heads, S, S]
scores for the backward and knows no documents. Here nothing of size S*S is kept per layer: plain
causal attention needs no mask at all, and a mask for a sliding window or for documents is built
once for all layers.

Documents: the trainer passes `document_ids`, int [b, S], in the place of Megatron's attention mask,
which its layers hand through untouched (through recomputation as well). A token then attends within
its own document. With sequence parallelism attention sees the whole sequence, so the ids are always
of full length.

Context parallelism: a rank has two parts of the sequence, the r-th from the front and the r-th from
the back of 2 * size, so that causal attention is equal work on all of them. It gathers every rank's
keys and values, in the order of the ranks (attention does not mind their order, the bias follows
it), and its backward scatters their gradients. Document ids stay those of the whole sequence.

Shapes: S sequence, Q the part of it that this rank has (S without context parallelism),
b micro-batch, n heads and g key-value groups of this tensor-parallel rank, d channels of a head.
Megatron's layout is [Q, b, n, d], torch's [b, n, Q, d].
"""

from __future__ import annotations

import functools
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig


class Share(NamedTuple):
    """Which part of every sequence a context-parallel rank has."""

    rank: int = 0
    size: int = 1

    def rows(self, seq_length: int, device: torch.device) -> Tensor:
        """Its tokens' places in the sequence, [Q]. seq_length: S, a multiple of 2 * size."""
        if self.size == 1:
            return torch.arange(seq_length, device=device)
        parts = torch.arange(seq_length, device=device).chunk(2 * self.size)
        return torch.cat((parts[self.rank], parts[-1 - self.rank]))

    def columns(self, seq_length: int, device: torch.device) -> Tensor:
        """The places of the keys that it gathers, [S]: rank after rank."""
        ranks = [self._replace(rank=rank) for rank in range(self.size)]
        return torch.cat([share.rows(seq_length, device) for share in ranks])


WHOLE = Share()


class TorchAttention(torch.nn.Module):
    """Core attention of one layer; constructed and called as megatron-core's DotProductAttention.

    config: megatron-core's; read are attention_dropout, window_size, window_attn_skip_freq,
    kv_channels, softmax_scale, sequence_parallel. layer_number counts from 1 over the whole model.
    attention_dropout and softmax_scale, where given, stand for config's; of pg_collection the group
    cp is read. attention_type and cp_comm_type are not needed.
    Raises ValueError for what torch's kernels do not do (see _refuse_config).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        _refuse_config(config, attn_mask_type)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.sequence_parallel = config.sequence_parallel
        scale = config.softmax_scale if softmax_scale is None else softmax_scale
        self.softmax_scale = 1.0 / math.sqrt(config.kv_channels) if scale is None else scale
        self.window = _window(config, layer_number)
        self.cp_group = None
        if config.context_parallel_size > 1:
            self.cp_group = (
                pg_collection.cp if pg_collection else parallel_state.get_context_parallel_group()
            )

    @property
    def share(self) -> Share:
        """This rank's part of each sequence."""
        return Share(self.cp_group.rank(), self.cp_group.size()) if self.cp_group else WHOLE

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> Tensor:
        """softmax(q k^T * scale) v over the tokens that each token may see.

        query [Q, b, n, d]; key, value [Q, b, g, d], n a multiple of g; attention_mask: None, or
        document_ids, int [b, S]. Returns [Q, b, n*d]. Raises ValueError for anything else.
        """
        _refuse_call(query, key, value, attn_mask_type, attention_bias, packed_seq_params)
        if self.cp_group is not None:
            sizes = [key.shape[-1], value.shape[-1]]
            both = gather_from_sequence_parallel_region(
                torch.cat((key, value), -1), group=self.cp_group
            )
            key, value = both.split(sizes, -1)
        bias = self._bias(query, attention_mask)
        dropout = self.dropout if self.training else 0.0
        with self._dropout_generator(dropout):
            context = _attend(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                bias,
                dropout,
                self.softmax_scale,
            )
        # The kernels write [b, S, n, d]: a copy only where b > 1.
        return context.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)

    def _bias(self, query: Tensor, document_ids: Tensor | None) -> Tensor | None:
        """What is added to the scores, [1 or b, 1, Q, S]; None where plain causal will do."""
        share = self.share
        seq_length = query.shape[0] * share.size
        window = self.window if self.window is not None and self.window < seq_length else None
        if document_ids is not None:
            _refuse_document_ids(document_ids, query, seq_length)
            return _document_biases.get(document_ids, window, query.dtype, share)
        if window is not None or share.size > 1:
            return _causal_bias(seq_length, window, query.dtype, query.device, share)
        return None

    def _dropout_generator(self, dropout: float) -> AbstractContextManager:
        """Heads are spread over the tensor-parallel ranks: each draws its own dropout.

        With sequence parallelism Megatron runs the whole layer under that generator already.
        """
        if dropout == 0.0 or self.sequence_parallel:
            return nullcontext()
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        return get_cuda_rng_tracker().fork()


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float, scale: float
) -> Tensor:
    """Causal attention, or what bias allows. query [b, n, Q, d]; key, value [b, g, S, d]."""
    causal = bias is None
    repeats = query.shape[1] // key.shape[1]
    grouped = repeats > 1
    if grouped and not _fused_takes_groups(query, key, value, bias, dropout, scale):
        # Without a fused kernel for groups, torch would keep S*S scores: n/g times the keys and
        # values are less, and every fused kernel takes them.
        key = key.repeat_interleave(repeats, dim=1)
        value = value.repeat_interleave(repeats, dim=1)
        grouped = False
    return scaled_dot_product_attention(
        query, key, value, bias, dropout, causal, scale=scale, enable_gqa=grouped
    )


def _fused_takes_groups(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float, scale: float
) -> bool:
    """Whether torch would run a fused kernel on fewer key-value than query heads.

    It depends on device, dtype, mask and torch's version; torch itself answers. On CUDA with a mask
    most kernels do not.
    """
    choice = torch._fused_sdp_choice(
        query, key, value, bias, dropout, bias is None, scale=scale, enable_gqa=True
    )
    return choice != SDPBackend.MATH.value


def _build_bias(
    allowed: Tensor, window: int | None, dtype: torch.dtype, rows: Tensor, columns: Tensor
) -> Tensor:
    """Additive form of `allowed` (bool [.., Q, S], overwritten), causal and within the window.

    rows [Q], columns [S]: the tokens' places in the sequence. Returns [.., Q, S] in dtype, 0 or
    -inf. Not boolean, which torch would turn into this very tensor in every layer and keep for
    every layer's backward.
    """
    allowed.logical_and_(columns <= rows[:, None])
    if window is not None:
        allowed.logical_and_(columns > rows[:, None] - window)
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(allowed.logical_not_(), -math.inf)


@functools.lru_cache(maxsize=2)  # one for training, and one for a teacher or an evaluation
@torch.inference_mode(False)  # made while evaluating, it serves a later backward as well
def _causal_bias(
    seq_length: int, window: int | None, dtype: torch.dtype, device: torch.device, share: Share
) -> Tensor:
    """The bias without documents, [1, 1, Q, S]: the same for every layer and micro-batch."""
    rows, columns = share.rows(seq_length, device), share.columns(seq_length, device)
    shape = (1, 1, len(rows), seq_length)
    allowed = torch.ones(shape, dtype=torch.bool, device=device)
    return _build_bias(allowed, window, dtype, rows, columns)


class _DocumentBiases:
    """Biases of the last micro-batches, each built once for all layers; at most `keep` are held.

    Activation recomputation gives a layer a detached copy of document_ids, another tensor on the
    same memory: the memory (its storage), the view on it and its version say which ids they are. A
    bias goes when its ids go. Two suffice: pipelines alternate the forward of one micro-batch with
    the recomputed forward of another, and a teacher may have another window than its student.
    """

    def __init__(self, keep: int = 2) -> None:
        self.keep = keep
        self._held: OrderedDict[Hashable, tuple[weakref.ref, Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def get(
        self,
        document_ids: Tensor,
        window: int | None,
        dtype: torch.dtype,
        share: Share = WHOLE,
    ) -> Tensor:
        """The bias, [b, 1, Q, S], of document_ids, int [b, S]."""
        build = functools.partial(_document_bias, document_ids, window, dtype, share)
        if document_ids.is_inference():
            return build()  # such tensors have no version: a change in place would go unseen
        storage = document_ids.untyped_storage()
        view = (document_ids.storage_offset(), document_ids.shape, document_ids.stride())
        kind = (document_ids.dtype, window, dtype, share)
        return self._find((id(storage), document_ids._version, view, kind), storage, build)

    def _find(
        self, key: Hashable, storage: torch.UntypedStorage, build: Callable[[], Tensor]
    ) -> Tensor:
        if key not in self._held:
            # the id of dead memory may be given out again: its entry must be gone by then
            ref = weakref.ref(storage, lambda _: self._held.pop(key, None))
            self._held[key] = (ref, build())
        self._held.move_to_end(key)
        bias = self._held[key][1]
        while len(self._held) > self.keep:
            self._held.popitem(last=False)
        return bias


_document_biases = _DocumentBiases()


@torch.inference_mode(False)
def _document_bias(
    document_ids: Tensor, window: int | None, dtype: torch.dtype, share: Share
) -> Tensor:
    """Within the same document, causal. int [b, S] -> [b, 1, Q, S]."""
    seq_length, device = document_ids.shape[1], document_ids.device
    rows, columns = share.rows(seq_length, device), share.columns(seq_length, device)
    same = document_ids[:, None, rows, None] == document_ids[:, None, None, columns]
    return _build_bias(same, window, dtype, rows, columns)


def _window(config: TransformerConfig, layer_number: int) -> int | None:
    """Tokens that this layer's sliding window holds, the token itself included; None: all."""
    skip = config.window_attn_skip_freq
    if not is_layer_window_attention(config.window_size, skip, layer_number):
        return None
    look_back, look_ahead = config.window_size
    if look_ahead != 0 or look_back < -1:
        raise ValueError(
            f"window_size {config.window_size}: a causal window of w tokens is (w - 1, 0), "
            "an unlimited one (-1, 0)"
        )
    return None if look_back == -1 else look_back + 1


def _refuse_config(config: TransformerConfig, attn_mask_type: AttnMaskType) -> None:
    if config.apply_query_key_layer_scaling:
        raise ValueError("apply_query_key_layer_scaling: not with torch's attention; set it false")
    if config.softmax_type != "vanilla":
        raise ValueError(f"softmax_type {config.softmax_type!r}: torch's attention has 'vanilla'")
    _refuse_mask_type(attn_mask_type)


def _refuse_mask_type(attn_mask_type: AttnMaskType) -> None:
    if attn_mask_type is not AttnMaskType.causal:
        raise ValueError(f"attn_mask_type {attn_mask_type}: this attention is causal")


def _refuse_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask_type: AttnMaskType | None,
    attention_bias: Tensor | None,
    packed_seq_params: object | None,
) -> None:
    if attn_mask_type is not None:
        _refuse_mask_type(attn_mask_type)
    if attention_bias is not None or packed_seq_params is not None:
        raise ValueError("attention_bias and packed_seq_params: not with torch's attention")
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if query.dim() != 4 or key.dim() != 4 or key.shape[:3] != value.shape[:3]:
        raise ValueError(f"expected [Q, b, n, d] and twice [Q, b, g, d]: {shapes}")
    if query.shape[:2] != key.shape[:2]:
        raise ValueError(f"query and key must have one length and batch: {shapes}")
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"query heads must be a multiple of the key-value groups: {shapes}")


def _refuse_document_ids(document_ids: Tensor, query: Tensor, seq_length: int) -> None:
    batch = query.shape[1]
    if document_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"attention_mask {document_ids.dtype} {list(document_ids.shape)}: expected None "
            f"(plain causal) or document_ids, int32 or int64 {[batch, seq_length]}"
        )
    if document_ids.shape != (batch, seq_length):
        raise ValueError(
            f"document_ids {list(document_ids.shape)}: expected [b, S] = {[batch, seq_length]}"
        )
    if document_ids.device != query.device:
        raise ValueError(f"document_ids on {document_ids.device}, query on {query.device}")

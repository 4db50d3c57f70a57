"""Bytes of one rank, by part: weights, gradients, optimizer, activations, logits, teacher ...

What autograd keeps of a layer is written down operation by operation (see _layer_activations) and
held against what is allocated in tests/distributed/test_plan_memory.py. Not modelled: what torch's
allocator, CUDA and NCCL take for themselves (USABLE allows for it), masks of sliding windows and
documents.

Legend: T tokens of a micro-batch (s * b), h hidden size, t tensor-parallel ranks, e bytes of an
element.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from taid_megatron.config.batches import data_parallel_size, num_microbatches
from taid_megatron.config.schema import Architecture, Config, Recompute
from taid_megatron.models.vocabulary import Vocabulary, align
from taid_megatron.planning import timeline
from taid_megatron.planning.shape import Stage, layer_parameters, stage_parameters, stages

ELEMENT = {"fp32": 4, "bf16": 2}
USABLE = 0.92
"""Share of a GPU's memory to plan with: the rest is for CUDA, NCCL and the allocator's holes."""
_LOSS_BUFFERS = 3 * (64 << 20)
"""What the chunked loss works in on a GPU (losses/shards.py)."""
_LOSS_COLUMNS = 48
"""Bytes per token that the loss keeps beside the logits: merged statistics, mask."""
_PLAIN_COPIES = 5
"""fp32 copies of the logits that plain autograd keeps for TAID (README, measured)."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at the step's peak."""

    weights: float
    main_gradients: float
    """fp32, summed over micro-batches."""
    optimizer: float
    """fp32 weights (of bf16 ones) and both moments, this rank's shard."""
    activations: float
    """Kept for the backward, over all micro-batches in flight."""
    logits: float
    """Both models', with what the loss works in."""
    teacher: float
    """Weights of the frozen teacher."""
    work: float
    """For the moment only: the teacher's forward, or gradients within one layer."""
    messages: float
    """Between pipeline stages and tensor-parallel ranks."""

    @property
    def total(self) -> float:
        """All parts."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class Sizes:
    """What the formulas need of a run and its layout."""

    config: Config
    teacher: Architecture | None
    world_size: int
    cuda: bool = True
    """False: what the CPU engine keeps (its norms keep more, its activations are not fused)."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Padded for both models."""
        student = self.config.student.architecture.vocab_size
        teacher = self.teacher.vocab_size if self.teacher else None
        return align(student, teacher, self.config.parallel.tensor)

    @property
    def tokens(self) -> int:
        """T, of one context-parallel rank."""
        training = self.config.training
        return training.micro_batch_size * training.seq_length // self.config.parallel.context

    @property
    def sharded_tokens(self) -> int:
        """Tokens of a rank between the tensor-parallel blocks."""
        parallel = self.config.parallel
        return self.tokens // (parallel.tensor if parallel.sequence_parallel else 1)

    @property
    def element(self) -> int:
        """Bytes of a student's weight or activation."""
        return ELEMENT[self.config.training.precision]

    @property
    def teacher_element(self) -> int:
        """Bytes of a teacher's."""
        given = self.config.teacher.precision if self.config.teacher else None
        return ELEMENT[given or self.config.training.precision]

    @property
    def chunks(self) -> int:
        """Model chunks per rank."""
        return self.config.parallel.virtual_pipeline or 1

    def student_stages(self) -> list[Stage]:
        """In model order."""
        student = self.config.student
        split = student.layers_per_stage
        return stages(student.architecture.num_layers, split, self.config.parallel)

    def teacher_stages(self) -> list[Stage]:
        """In model order; empty without a teacher."""
        if self.teacher is None or self.config.teacher is None:
            return []
        split = self.config.teacher.layers_per_stage
        return stages(self.teacher.num_layers, split, self.config.parallel)

    def student_parameters(self, stage: Stage) -> int:
        """Of one stage on one rank."""
        shape, parallel = self.config.student.architecture, self.config.parallel
        return stage_parameters(shape, stage, self.vocabulary.padded, parallel.tensor)

    def teacher_parameters(self, stage: Stage) -> int:
        """Of one stage on one rank."""
        assert self.teacher is not None
        shape, parallel = self.teacher, self.config.parallel
        if shape.num_moe_experts is not None:
            here = shape.num_moe_experts // parallel.expert
            shape = shape.model_copy(update={"num_moe_experts": here})
        return stage_parameters(shape, stage, self.vocabulary.padded, parallel.tensor)


def rank_memory(sizes: Sizes, rank: int) -> RankMemory:
    """Bytes of a rank of pipeline stage `rank`; the tensor- and data-parallel ranks are alike."""
    parallel = sizes.config.parallel
    mine = sizes.student_stages()[rank :: parallel.pipeline]
    others = sizes.teacher_stages()[rank :: parallel.pipeline]
    weights = sum(map(sizes.student_parameters, mine))
    shards = data_parallel_size(sizes.config, sizes.world_size)
    kept = 8 if sizes.config.training.precision == "fp32" else 12
    logits = logits_bytes(sizes) if any(stage.last for stage in mine) else 0.0
    return RankMemory(
        weights=weights * sizes.element,
        main_gradients=4.0 * weights,
        optimizer=kept * weights / (shards if parallel.distributed_optimizer else 1),
        activations=_activations_peak(sizes, rank),
        logits=logits,
        teacher=_teacher_bytes(sizes, others),
        work=_work(sizes, mine, others),
        messages=_messages(sizes),
    )


def fullest_rank(sizes: Sizes) -> tuple[int, RankMemory]:
    """The pipeline rank that needs most, and what it needs."""
    ranks = [rank_memory(sizes, rank) for rank in range(sizes.config.parallel.pipeline)]
    most = max(range(len(ranks)), key=lambda rank: ranks[rank].total)
    return most, ranks[most]


def logits_bytes(sizes: Sizes, kind: str | None = None) -> float:
    """Logits of both models and what the loss works in, of one micro-batch on one rank.

    kind: 'dense' (plain autograd), 'chunked' (this loss), 'fused' (head and loss together); None:
    the configuration's.
    """
    loss, shard = sizes.config.loss, sizes.vocabulary.shard_size
    kind = kind or ("fused" if loss.fused_head else "chunked")
    buffers = _LOSS_BUFFERS if sizes.cuda else 0
    if kind == "fused":
        rows = min(sizes.tokens, loss.head_chunk_tokens)
        models = 2 if sizes.teacher else 1
        hidden = sizes.tokens * sizes.config.student.architecture.hidden_size * sizes.element
        narrow = 0 if sizes.element == 4 else rows * shard * sizes.element
        return models * rows * shard * 4 + narrow + hidden + buffers
    logits = sizes.tokens * shard * sizes.element
    if sizes.teacher:
        logits += sizes.tokens * shard * sizes.teacher_element
    if kind == "dense":
        return logits + _PLAIN_COPIES * sizes.tokens * shard * 4
    return logits + sizes.tokens * _LOSS_COLUMNS + buffers


def _teacher_bytes(sizes: Sizes, others: list[Stage]) -> float:
    if sizes.config.engine.teacher_fp8 != "none":
        return teacher_fp8_bytes(sizes, others)
    return float(sizes.teacher_element * sum(map(sizes.teacher_parameters, others)))


def teacher_fp8_bytes(sizes: Sizes, others: list[Stage]) -> float:
    """The weights of some of the teacher's stages on one rank: layers in FP8, both tables as they
    are.
    """
    total = 0.0
    for stage in others:
        tables = sizes.teacher_parameters(replace(stage, layers=0))
        layers = sizes.teacher_parameters(stage) - tables
        total += layers + sizes.teacher_element * tables
    return total


def _activations_peak(sizes: Sizes, rank: int) -> float:
    """Kept at once over the micro-batches in flight: the peak, less the logits' part of it."""
    logits = logits_bytes(sizes)
    held, extra = [], []
    for stage in sizes.student_stages():
        of_head = logits if stage.last else 0.0
        held.append(_stage_activations(sizes, stage) + of_head)
        # the head's own are gone before the layers' backward begins
        used_up = of_head + (_last_norm(sizes) if stage.last else 0.0)
        extra.append(max(_recomputed(sizes, stage) - used_up, 0.0))
    pipeline = sizes.config.parallel.pipeline
    count = num_microbatches(_unramped(sizes.config), sizes.world_size)
    # Later micro-batches repeat what the first ones show.
    count = min(count, 4 * pipeline)
    last_rank = rank == pipeline - 1
    most = timeline.peak(rank, pipeline, sizes.chunks, count, held, extra)
    return most - (logits if last_rank else 0.0)


def _unramped(config: Config) -> Config:
    return config.model_copy(
        update={"training": config.training.model_copy(update={"rampup": None})}
    )


def _stage_activations(sizes: Sizes, stage: Stage) -> float:
    """What one micro-batch's forward through a stage leaves for its backward."""
    shape, recompute = sizes.config.student.architecture, sizes.config.training.recompute
    dropout = sizes.config.student.hidden_dropout > 0
    total = 0.0
    if stage.first:
        total += 8 * sizes.tokens
        total += _dropout_mask(sizes) if dropout else 0
    if stage.last:
        total += _last_norm(sizes)
    boundary = sizes.sharded_tokens * shape.hidden_size * sizes.element
    angles = 4 * sizes.config.training.seq_length * _rotated(shape)
    if recompute.granularity != "full":
        return total + stage.layers * _layer_activations(sizes, recompute)
    whole = _layer_activations(sizes, Recompute())
    if recompute.method == "uniform":
        return total + stage.layers // recompute.num_layers * boundary + angles
    checkpointed = min(recompute.num_layers, stage.layers)
    return total + checkpointed * boundary + (stage.layers - checkpointed) * whole + angles


def _recomputed(sizes: Sizes, stage: Stage) -> float:
    """What a backward computes anew and holds for a moment."""
    recompute = sizes.config.training.recompute
    if stage.layers == 0 or recompute.granularity == "none":
        return 0.0
    whole = _layer_activations(sizes, Recompute())
    if recompute.granularity == "full":
        return whole * (recompute.num_layers if recompute.method == "uniform" else 1)
    return whole - _layer_activations(sizes, recompute)


def _layer_activations(sizes: Sizes, recompute: Recompute) -> float:
    """What autograd keeps of one layer: the inputs of its operations that are not recomputed."""
    config, shape = sizes.config, sizes.config.student.architecture
    tensor, e = config.parallel.tensor, sizes.element
    tokens, sharded, hidden = sizes.tokens, sizes.sharded_tokens, shape.hidden_size
    again = recompute.modules if recompute.granularity == "selective" else ()
    query = shape.num_attention_heads * shape.head_channels / tensor
    groups = max(shape.query_groups / tensor, 1)
    kv = groups * shape.head_channels
    both_norms = 2 * (_norm_activations(sizes, shape) + sharded * hidden * e)
    # rotated query and key; the value is a view that keeps the whole projection alive
    attention = tokens * e * ((query + kv) + (query + 2 * kv))
    # its output is the input of the output projection; log-sum-exps in fp32
    attention += tokens * e * query
    if "core_attn" not in again:
        attention += tokens * 4 * shape.num_attention_heads / tensor
    angles = config.training.seq_length * _rotated(shape) * e
    ffn = shape.ffn_width / tensor * tokens * e
    # gated: both halves, what the gate opens (fused on a GPU: recomputed), the product
    kept = (4 if not sizes.cuda else 3) if shape.gated else 2
    feed_forward = 0.0 if "mlp" in again else kept * ffn
    masks = 2 * _dropout_mask(sizes) if config.student.hidden_dropout > 0 else 0.0
    return both_norms + attention + angles + feed_forward + masks


def _last_norm(sizes: Sizes) -> float:
    """What the norm before the output layer keeps, and the output layer's input."""
    shape = sizes.config.student.architecture
    output = sizes.sharded_tokens * shape.hidden_size * sizes.element
    return _norm_activations(sizes, shape) + output


def _norm_activations(sizes: Sizes, shape: Architecture) -> float:
    """What a norm keeps, its output left out."""
    tokens, hidden = sizes.sharded_tokens, shape.hidden_size
    if sizes.cuda:
        return tokens * (hidden * sizes.element + 8)
    # torch on a CPU: the input widened to fp32 and, of RMSNorm, the normalised values
    return tokens * (hidden * 4 * (2 if shape.normalization == "RMSNorm" else 1) + 4)


def _dropout_mask(sizes: Sizes) -> float:
    hidden = sizes.config.student.architecture.hidden_size
    return sizes.sharded_tokens * hidden * (1 if sizes.cuda else sizes.element)


def _rotated(shape: Architecture) -> int:
    return int(shape.head_channels * shape.rotary_percent)


def _work(sizes: Sizes, mine: list[Stage], others: list[Stage]) -> float:
    """The larger of the teacher's forward in its widest layer and the student's gradients in it.

    An upper estimate: the two are never alive together, and their parts hardly ever.
    """
    config, tensor = sizes.config, sizes.config.parallel.tensor
    forward = 0.0
    if sizes.teacher is not None and any(stage.layers for stage in others):
        forward = _widest(sizes.teacher, tensor) * sizes.tokens * sizes.teacher_element
    shape = config.student.architecture
    backward = 0.0
    if any(stage.layers for stage in mine):
        backward = 2 * _widest(shape, tensor) * sizes.tokens * sizes.element
        backward += layer_parameters(shape, tensor) * sizes.element
    if any(stage.first or stage.last for stage in mine):
        table = sizes.vocabulary.shard_size * shape.hidden_size * sizes.element
        backward = max(backward, table)
    return max(forward, backward)


def _widest(shape: Architecture, tensor: int) -> float:
    """Elements per token alive inside the feed-forward block, residual stream included."""
    return 2 * shape.hidden_size + (3 if shape.gated else 2) * shape.ffn_width / tensor


def _messages(sizes: Sizes) -> float:
    """Receive and send buffers of the pipeline, gathered sequences, of both models."""
    parallel, total = sizes.config.parallel, 0.0
    shapes = [(sizes.config.student.architecture, sizes.element)]
    if sizes.teacher is not None:
        shapes.append((sizes.teacher, sizes.teacher_element))
    for shape, element in shapes:
        if parallel.pipeline > 1:
            total += 2 * sizes.sharded_tokens * shape.hidden_size * element
        if parallel.sequence_parallel:
            total += sizes.tokens * shape.hidden_size * element
    return total

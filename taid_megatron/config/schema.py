"""What a run can be told: typed, frozen sections, one class per YAML section.

Only ranges of single values are checked here; what must fit together is in checks.py. The words
are Megatron's where it has one. Nothing here imports torch: a configuration is read and refused in
well under a second, on a laptop or on a login node.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
FP8 = Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"]
HFFamily = Literal["llama", "qwen2", "qwen3", "mistral", "phi3", "gpt_neox", "stablelm", "mixtral"]


class Section(BaseModel):
    """A part of the configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        strict=False,
    )


class RotaryScaling(Section):
    """Rotary angles stretched beyond the length a model was first trained on."""

    kind: Literal["linear", "llama3"]
    """'linear': all frequencies divided by factor; 'llama3': the low ones, smoothly."""
    factor: Annotated[float, Field(ge=1)]
    """Largest division of a frequency."""
    low_freq_factor: Annotated[float, Field(gt=0)] = 1.0
    """Of 'llama3': wavelengths above original_max_position_embeddings / this are divided whole."""
    high_freq_factor: Annotated[float, Field(gt=0)] = 4.0
    """Of 'llama3': wavelengths below original_max_position_embeddings / this stay as they are."""
    original_max_position_embeddings: Positive = 8192
    """Of 'llama3': the length before stretching."""

    @model_validator(mode="after")
    def _ordered(self) -> RotaryScaling:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor} is not below high_freq_factor "
                f"{self.high_freq_factor}"
            )
        return self


class Architecture(Section):
    """A decoder-only transformer with rotary positions (the names are Megatron's)."""

    num_layers: Positive
    """Transformer layers over all pipeline stages."""
    hidden_size: Positive
    """Width of the residual stream."""
    num_attention_heads: Positive
    """Query heads."""
    vocab_size: Positive
    """Real token ids, padding excluded: the heads are padded at load to what the layout needs."""
    num_query_groups: Positive | None = None
    """Key and value heads (grouped-query attention); none: as many as query heads."""
    kv_channels: Positive | None = None
    """Channels per head; none: hidden_size / num_attention_heads."""
    ffn_hidden_size: Positive | None = None
    """Width inside the feed-forward block; none: 4 * hidden_size, or, where gated, 8/3 of
    hidden_size rounded up to a multiple of 64."""
    activation: Literal["swiglu", "geglu", "gelu", "silu"] = "swiglu"
    """Feed-forward activation; the first two are gated."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Kind of normalisation before attention, before the feed-forward block and at the end."""
    layernorm_epsilon: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the variance."""
    add_bias_linear: bool = False
    """Biases in every linear layer."""
    add_qkv_bias: bool = False
    """Biases in the query, key and value projections only (Qwen2)."""
    qk_layernorm: bool = False
    """Normalise queries and keys per head (Qwen3)."""
    parallel_residual: bool = False
    """Attention and feed-forward block both read the layer's input, each through its own norm
    (GPT-NeoX), instead of one after the other."""
    num_moe_experts: Annotated[int, Field(ge=2)] | None = None
    """Feed-forward blocks of a mixture (Mixtral), a teacher's only; none: dense."""
    moe_router_topk: Positive = 2
    """Of a mixture: experts per token; their softmax weights sum to 1."""
    rotary_base: Annotated[float, Field(gt=0)] = 10000
    """Base period of the rotary position embedding."""
    rotary_scaling: RotaryScaling | None = None
    """Stretched angles (Llama 3.1 and later); none: plain."""
    rotary_percent: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each head's channels that is rotated."""
    sliding_window: Positive | None = None
    """A token sees itself and the sliding_window - 1 tokens before it; none: all before it."""
    tie_embeddings: bool = False
    """The output layer shares the input embedding's weight."""
    max_position_embeddings: Positive | None = None
    """Longest sequence the model is meant for; it changes nothing here and is written on export."""
    hf_family: HFFamily | None = None
    """Hugging Face's model_type to export as; none: the first of these that fits."""
    init_method_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of random weights (scaled by 1/sqrt(2 * num_layers) on output layers)."""

    @property
    def head_channels(self) -> int:
        """Channels of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Key and value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def gated(self) -> bool:
        """Whether the feed-forward block multiplies two projections."""
        return self.activation in ("swiglu", "geglu")

    @property
    def ffn_width(self) -> int:
        """Width inside the feed-forward block, the default resolved."""
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        # -(-a // b) rounds up: hidden_size * 8 / 3 in multiples of 64
        return -(-self.hidden_size * 8 // (3 * 64)) * 64 if self.gated else 4 * self.hidden_size


class Init(Section):
    """Where a model's weights start, when not in its own checkpoint."""

    source: Literal["random", "hf", "teacher"]
    """Also `from`. 'random': by run.seed; 'hf': student.hf; 'teacher': some of its layers."""
    layers: tuple[NotNegative, ...] | None = None
    """Of 'teacher': its layers, counted from 0, that become the student's, in this order."""

    @model_validator(mode="after")
    def _layers_of_teacher(self) -> Init:
        if (self.source == "teacher") != (self.layers is not None):
            raise ValueError("'layers' goes with 'from: teacher', and with nothing else")
        if self.layers is not None and not self.layers:
            raise ValueError("'layers' is empty; name the teacher's layers to keep")
        return self


class Student(Section):
    """The model that is trained."""

    hf: Path | None = None
    """A Hugging Face model folder (or a hub name): its architecture, and its weights to start
    from."""
    architecture: Architecture
    """Its shape; not needed beside hf, or beside init from a teacher that is hf or a shape."""
    init: Init | None = None
    """Where the weights start; none: hf where given, else random."""
    layers_per_stage: tuple[NotNegative, ...] | None = None
    """Layers of each (virtual) pipeline stage in model order; none: an even split."""
    hidden_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the residual branches."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the attention weights."""


class Teacher(Section):
    """The frozen model the student learns from: Hugging Face's, a checkpoint, or random weights."""

    hf: Path | None = None
    """A Hugging Face model folder (or a hub name)."""
    checkpoint: Path | None = None
    """A checkpoint folder, or a run folder (its newest checkpoint); carries its architecture."""
    architecture: Architecture | None = None
    """Beside hf: its shape, filled in. Alone: enough to plan with; to train, see init."""
    init: Init | None = None
    """`from: random`, beside an architecture alone: random weights, for tests and benchmarks."""
    layers_per_stage: tuple[NotNegative, ...] | None = None
    """As the student's; the teacher has a split of its own."""
    precision: Literal["fp32", "bf16"] | None = None
    """Type of its weights and activations; none: training.precision."""

    @model_validator(mode="after")
    def _one_source(self) -> Teacher:
        if (self.checkpoint is None) == (self.architecture is None and self.hf is None):
            raise ValueError(
                "give one of 'hf', 'checkpoint' or 'architecture', and no more (null removes one)"
            )
        if self.hf is not None and self.architecture is None:
            raise ValueError(
                "'hf' needs its architecture, which config/load.py reads in the folder"
            )
        if self.init is not None and (self.init.source != "random" or self.has_weights):
            raise ValueError(
                "a teacher's 'init' is 'from: random', beside an architecture alone; remove it"
            )
        return self

    @property
    def has_weights(self) -> bool:
        """Whether it says where its weights are."""
        return self.hf is not None or self.checkpoint is not None


LOSS_OPTIONS: dict[str, tuple[str, ...]] = {
    "taid": (),
    "forward_kl": (),
    "reverse_kl": (),
    "tvd": (),
    "gjs": ("beta",),
    "skew_kl": ("lam",),
    "skew_reverse_kl": ("lam",),
    "adaptive_kl": ("mu", "variant"),
    "dkd": ("alpha", "beta", "temperature"),
    "ctkd": ("variant", "temperature_start", "temperature_range", "temperature_lr"),
    "cross_entropy": (),
}
"""Fields of the loss section that belong to each loss (taid's own are the section `taid`)."""


class Loss(Section):
    """What is minimised, per token; p is the teacher's distribution, q the student's."""

    name: Literal[
        "taid",
        "forward_kl",
        "reverse_kl",
        "tvd",
        "gjs",
        "skew_kl",
        "skew_reverse_kl",
        "adaptive_kl",
        "dkd",
        "ctkd",
        "cross_entropy",
    ] = "taid"
    """The divergence between teacher and student, or cross-entropy to the labels alone."""
    ce_weight: Fraction = 0.0
    """The loss is (1 - ce_weight) * divergence + ce_weight * cross-entropy to the labels."""
    kernel: Literal["auto", "triton", "native", "torch"] = "auto"
    """Implementation of the divergence; 'auto' takes the fastest that the machine has."""
    collective: Literal["gather", "all_reduce"] = "gather"
    """How tensor-parallel ranks exchange their sums: one all-gather, or two all-reduces, which move
    less where many ranks share the vocabulary."""
    fused_head: bool = False
    """Make both models' logits inside the loss, some tokens at a time, so that none of the size of
    tokens x vocabulary exists. Saves memory; the gradient's products run in the forward."""
    head_chunk_tokens: Positive = 1024
    """Tokens at a time with fused_head."""
    beta: Annotated[float, Field(ge=0)] | None = None
    """gjs: the teacher's share of the mixture, in (0, 1); none: 0.1. dkd: weight of the non-target
    classes; none: 8."""
    lam: Annotated[float, Field(gt=0, lt=1)] | None = None
    """skew_kl, skew_reverse_kl: skew lambda; none: 0.1."""
    mu: Annotated[float, Field(gt=0, le=1)] | None = None
    """adaptive_kl: mass of the teacher's head; none: 0.5."""
    alpha: Annotated[float, Field(ge=0)] | None = None
    """dkd: weight of the target class; none: 1."""
    temperature: Annotated[float, Field(gt=0)] | None = None
    """dkd: temperature of both models; none: 4."""
    variant: Literal["paper", "official"] | None = None
    """adaptive_kl, ctkd: 'official' is what the TAID authors' code does; none: 'paper'."""
    temperature_start: Annotated[float, Field(gt=0)] | None = None
    """ctkd: the temperature is temperature_start + temperature_range * sigmoid(theta), theta
    learned; none: 1."""
    temperature_range: Annotated[float, Field(gt=0)] | None = None
    """ctkd: see temperature_start; none: 20."""
    temperature_lr: Annotated[float, Field(gt=0)] | None = None
    """ctkd: learning rate of theta (Adam); none: the student's, as it is at each step."""

    @model_validator(mode="after")
    def _options_belong(self) -> Loss:
        mine = LOSS_OPTIONS[self.name]
        every = {option for options in LOSS_OPTIONS.values() for option in options}
        for option in sorted(every - set(mine)):
            if getattr(self, option) is not None:
                owners = [name for name, options in LOSS_OPTIONS.items() if option in options]
                raise ValueError(
                    f"{option} is not an option of {self.name} but of {', '.join(owners)}: remove "
                    "it, or set loss.name"
                )
        if self.name == "gjs" and self.beta is not None and not 0 < self.beta < 1:
            raise ValueError(f"beta {self.beta} of gjs is not between 0 and 1")
        return self


class Taid(Section):
    """The interpolation schedule of `loss.name: taid`."""

    t_start: Fraction = 0.4
    """Interpolation at the first step: the share of the teacher in the target's logits."""
    t_end: Fraction = 1.0
    """Interpolation at the last step."""
    alpha: Fraction = 5e-4
    """Largest adaptive step of t."""
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Momentum of the objective's relative improvement."""
    adaptive: bool = True
    """False: t follows the straight line from t_start to t_end."""
    rule: Literal["paper", "official"] = "paper"
    """'official' follows the authors' released code where it differs from their text."""

    @model_validator(mode="after")
    def _rises(self) -> Taid:
        if self.t_start > self.t_end:
            raise ValueError(f"t_start {self.t_start} is above t_end {self.t_end}")
        return self


class Parallel(Section):
    """How the pair is spread over the ranks; data parallelism is what remains of the world."""

    tensor: Positive = 1
    """Ranks that share each layer (tensor_model_parallel_size)."""
    pipeline: Positive = 1
    """Pipeline stages (pipeline_model_parallel_size)."""
    virtual_pipeline: Positive | None = None
    """Model chunks per pipeline stage (interleaved schedule); needs overlap_p2p at pipeline=2."""
    context: Positive = 1
    """Ranks that share each sequence: each has two parts of it, as far from both ends."""
    expert: Positive = 1
    """Ranks that share the experts of a mixture; taken from the replicas' and context's ranks."""
    sequence_parallel: bool = False
    """Shard the activations between tensor-parallel blocks along the sequence."""
    distributed_optimizer: bool = False
    """Shard the optimizer's state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over the data-parallel ranks while the backward still runs."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward runs; needs the distributed optimizer."""
    overlap_p2p: bool | None = None
    """Overlap the pipeline's messages with compute; none: on with virtual_pipeline, else off."""

    @property
    def model_ranks(self) -> int:
        """Ranks of one replica of the pair."""
        return self.tensor * self.pipeline * self.context

    @property
    def p2p_overlapped(self) -> bool:
        """overlap_p2p, its default resolved."""
        return self.virtual_pipeline is not None if self.overlap_p2p is None else self.overlap_p2p


class Recompute(Section):
    """Activations that are computed again in the backward instead of kept."""

    granularity: Literal["none", "selective", "full"] = "none"
    """'selective' recomputes `modules`; 'full' whole layers."""
    method: Literal["uniform", "block"] = "uniform"
    """Of 'full': checkpoint every num_layers layers, or the first num_layers of each stage."""
    num_layers: Positive = 1
    """Of 'full': see method."""
    modules: tuple[Literal["core_attn", "mlp", "layernorm"], ...] = ("core_attn",)
    """Of 'selective': which parts; 'layernorm' is refused, no layer here can leave it out."""


class RampUp(Section):
    """Global batch size that grows at the start of a run."""

    start: Positive
    """First global batch size, in sequences."""
    increment: Positive
    """Sequences added at each stage."""
    samples: Positive
    """Sequences over which the full size is reached."""


class Training(Section):
    """Batch, length, precision."""

    micro_batch_size: Positive = 1
    """Sequences per rank and forward pass."""
    global_batch_size: Positive
    """Sequences per optimizer step over all ranks."""
    rampup: RampUp | None = None
    """Global batch size at the start of the run."""
    seq_length: Positive
    """Tokens per sequence."""
    steps: Positive | None = None
    """Optimizer steps of the whole run; either this or tokens."""
    tokens: Positive | None = None
    """Tokens of the whole run, rounded up to whole optimizer steps."""
    stop_at: Positive | None = None
    """Stop after this step, with a checkpoint; the schedules stay those of the whole run."""
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """Stop after this much time in this process, with a checkpoint; resuming goes on."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of weights and activations; gradients are summed and weights updated in fp32."""
    recompute: Recompute = Recompute()
    """Activations to compute again instead of keeping."""
    gc_interval: NotNegative = 100
    """Steps between garbage collections, on all ranks at once; 0 leaves it to Python."""
    max_skipped_steps: NotNegative = 10
    """Steps in a row that may be skipped because a loss or gradient is not finite; one more
    ends the run."""
    loss_spike_deviations: Annotated[float, Field(gt=0)] | None = 6.0
    """A step's loss so many standard deviations above the mean of the 100 before is recorded, with
    the ids of its samples; none: never."""
    step_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that one step may take, before the run is ended as hung."""
    phase_timeout: Annotated[float, Field(gt=0)] = 3600.0
    """The same for what is no step: loading, the first step of a process, an evaluation, a save."""
    silence_timeout: Annotated[float, Field(ge=4)] = 20.0
    """Seconds without a sign of life after which a rank counts as stopped, or its host as gone;
    more where a network file system may hang a process for longer. Ten minutes while loading."""

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give either 'steps' or 'tokens', and not both (null removes one)")
        return self


class Optimizer(Section):
    """AdamW and its learning-rate schedule."""

    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the decay."""
    warmup_steps: NotNegative = 0
    """Steps of linear warm-up from 0."""
    decay: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """'wsd' stays at lr and decays over the last wsd_decay_steps only."""
    wsd_decay_steps: NotNegative = 0
    """Of 'wsd': steps of the final decay."""
    wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "minus_sqrt"
    """Of 'wsd': shape of the final decay."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the squared gradient's mean."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the squared gradient's mean."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled; norms and biases are excluded."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 does not clip."""

    @model_validator(mode="after")
    def _falls(self) -> Optimizer:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        return self


class BlendPart(Section):
    """One dataset of a blend."""

    prefix: Path
    """Path of the .bin/.idx pair without its ending."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the samples, relative to the other parts."""


def _plain_prefix(value: object) -> object:
    """Let `blend: [a, b]` and `blend: a` stand for equally weighted parts."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    return [{"prefix": part} if isinstance(part, (str, Path)) else part for part in parts]


Blend = Annotated[tuple[BlendPart, ...], BeforeValidator(_plain_prefix)]


class Data(Section):
    """Indexed datasets (`taid-data prepare` makes them)."""

    blend: Blend
    """Training data: prefixes, or {prefix, weight} parts."""
    validation: Blend | None = None
    """Held-out data; none: no evaluation."""
    reader: Literal["gpt", "dali"] = "gpt"
    """'gpt': megatron-core's GPTDataset, sequences packed across documents; 'dali': the same
    samples through an NVIDIA DALI pipeline, copied to the GPU ahead (needs the extra `dali`)."""
    verify: Literal["fast", "full"] = "fast"
    """What is checked before the first step: 'fast' the index and its hash, and token ids in 64
    places; 'full' every token id and the tokens' hash too (reads all of the data once)."""
    eod_id: NotNegative | None = None
    """End-of-document token id; none: the one in the first prefix's manifest."""
    cache: Path | None = None
    """Where the sample index is kept; none: RUN/cache."""
    eod_mask_loss: bool = False
    """Leave out of the loss the token that follows an end of document."""
    reset_position_ids: bool = False
    """Count positions from 0 in every document."""
    reset_attention_mask: bool = False
    """Tokens attend within their own document only."""
    prefetch: NotNegative = 2
    """Micro-batches read ahead by a background thread; 0 reads in the training thread."""


class Checkpoint(Section):
    """Saving and resuming."""

    every: Positive | None = None
    """Steps between checkpoints; none: only at the end."""
    resume: bool = True
    """Go on from the newest checkpoint of the run folder; false: refuse a folder that has one."""
    keep: Positive | None = None
    """Checkpoints that stay, the last so many; none: all. The one resumed from always stays."""
    keep_every: Positive | None = None
    """With keep: those of every n-th step stay as well."""
    asynchronous: bool = False
    """Train on while a process beside each rank writes its part of a save. Training then stands
    still for a copy in host memory alone, which needs room: what the rank's files will take."""
    writer_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that an asynchronous save may take to be written; one that takes longer, or whose
    process dies, ends the run on all ranks."""
    verify: Literal["fast", "full"] = "fast"
    """What is checked before loading: 'fast' the manifest, all sizes and the hashes of all files
    but the shards, 'full' the shards' hashes too."""
    strict: bool = False
    """Refuse to start where the newest checkpoint, or the pointer to it, is damaged; false: go on
    from the newest one that is sound, with a warning and a record in metrics.jsonl."""
    accept_changes: bool = False
    """Go on although settings that change the training (optimizer, batch, length, data, seed, loss,
    teacher) are others than in the checkpoint; the differences are said and kept in
    metrics.jsonl. False: refuse."""


class Engine(Section):
    """Which layers carry the models, and in which formats they multiply."""

    layers: Literal["auto", "te", "local"] = "auto"
    """'te': Transformer Engine's; 'local': megatron-core's own with torch's
    scaled_dot_product_attention; 'auto': 'te' for bf16 models where it is there."""
    fp8: FP8 = "none"
    """Recipe of the student's matrix products, but the head's, in FP8; weights stay bf16 with fp32
    copies. Scales: 'delayed' from earlier steps (anew after a resume), 'tensorwise' from each
    tensor, 'blockwise' from blocks of 128, 'mxfp8' from 32 values (Blackwell)."""
    teacher_fp8: FP8 = "none"
    """The same for the teacher, whose weights are then kept in FP8 alone: one byte each. Not
    'delayed'."""


class Evaluation(Section):
    """Held-out figures during and after training; they never touch t."""

    every: Positive | None = None
    """Steps between evaluations; none: only at the end."""
    samples: Positive = 64
    """Held-out sequences, the same every time; rounded up to whole global micro-batches."""


class Logging(Section):
    """What is written, and how often."""

    every: Positive = 1
    """Steps between records of metrics.jsonl and TensorBoard."""
    tensorboard: bool = True
    """Write TensorBoard events into RUN/tensorboard."""
    wandb: str | None = None
    """Project in Weights & Biases that gets the figures too; needs the package wandb."""
    progress: bool = True
    """Show a progress line on rank 0 (a plain line per record where there is no terminal)."""
    profile_steps: tuple[NotNegative, NotNegative] | None = None
    """First and last step of a torch profiler trace, in RUN/profile."""
    memory_snapshot_step: Positive | None = None
    """Step after which the CUDA allocator's history is written to RUN/profile."""


class Run(Section):
    """Where the run lives, and its seed."""

    folder: Path
    """Everything the run writes."""
    seed: NotNegative = 1234
    """Of weights, data order and dropout."""


class Config(Section):
    """A whole run."""

    run: Run
    student: Student
    teacher: Teacher | None = None
    loss: Loss = Loss()
    taid: Taid = Taid()
    parallel: Parallel = Parallel()
    training: Training
    optimizer: Optimizer
    data: Data
    checkpoint: Checkpoint = Checkpoint()
    engine: Engine = Engine()
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()

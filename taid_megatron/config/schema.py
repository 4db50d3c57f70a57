"""What a run can be told: typed, frozen sections, one class per YAML section.

The two models' are in models.py; all others import every section from here. Only ranges of single
values are checked in them; what must fit together is in checks.py. The words are Megatron's where
it has one. Nothing here imports torch: a configuration is read and refused in well under a second,
on a laptop or on a login node.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from .models import Architecture as Architecture
from .models import HFFamily as HFFamily
from .models import RotaryScaling as RotaryScaling
from .models import Student, Teacher
from .section import Fraction, NotNegative, Positive, Section

FP8 = Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"]

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

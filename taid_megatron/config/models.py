"""The sections that say what student and teacher are, and where their weights come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .section import NotNegative, Positive, Section

HFFamily = Literal["llama", "qwen2", "qwen3", "mistral", "phi3", "gpt_neox", "stablelm", "mixtral"]


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

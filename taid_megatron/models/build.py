"""One pipeline stage of a GPT: megatron-core's model from an architecture and a layout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor
from torch.nn import functional

from taid_megatron.config.engine import EngineAbilities
from taid_megatron.config.schema import Architecture, Parallel, Recompute
from taid_megatron.models.attention import TorchAttention
from taid_megatron.models.layer_variants import ParallelResidualLayer, stretch
from taid_megatron.models.local_layers import RotaryAttention, gated
from taid_megatron.models.norms import norm_for
from taid_megatron.models.vocabulary import Vocabulary

# Gradients have the wider range of e5m2 where one scale serves a whole tensor ("hybrid").
_FP8_FORMATS = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_ACTIVATIONS = {
    "swiglu": functional.silu,
    "silu": functional.silu,
    "geglu": functional.gelu,
    "gelu": functional.gelu,
}


_EXTRA_STATE = "._extra_state"


class Head(NamedTuple):
    """What the logits are made of, for a loss that makes them itself."""

    hidden: Tensor
    """[s, b, h], after the last norm; [s / tp, b, h] with sequence parallelism."""
    weight: Tensor
    """[V/tp, h], the output layer's."""


class GPTStage(GPTModel):
    """megatron-core's GPTModel that ends in logits as the loss wants them: [s, b, V/tp].

    GPTModel without labels transposes and copies its logits to [b, s, V/tp], a hidden copy of the
    largest tensor of the step. After `leave_head_to_loss` it ends in a Head.
    """

    reset_positions = False
    """Rotary angles follow position_ids (megatron-core counts along the sequence)."""

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, *args: object, **kwargs: object
    ) -> tuple:
        decoder_input, angles, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        if self.reset_positions and angles is not None:
            # those of the whole sequence, where a context-parallel rank has a share of it
            length = angles.shape[0] * self.config.context_parallel_size
            angles = self.rotary_pos_emb(length, packed_seq=True)
            # [S, 1, 1, d] along the sequence -> [s, b, 1, d] at each token's own position
            angles = angles[position_ids.t(), 0, 0].unsqueeze(2)
        return decoder_input, angles, *rest

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What a checkpoint holds: parameters.

        Transformer Engine's modules add FP8 scales of earlier steps as a pickle, which other
        layers would not know. Only the recipe 'delayed' has any; it finds them anew in a step.
        """
        found = super().sharded_state_dict(*args, **kwargs)
        return {key: value for key, value in found.items() if not key.endswith(_EXTRA_STATE)}

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; the same scales are not missed."""
        hook = self.register_load_state_dict_post_hook(_forgive_extra_state)
        try:
            return super().load_state_dict(*args, **kwargs)
        finally:
            hook.remove()

    def leave_head_to_loss(self) -> None:
        """End in a Head; on stages without the output layer this does nothing."""
        if self.post_process:
            # Still called as a module: Megatron's hooks on it gather its weight.
            self.output_layer.forward = self._hand_over

    def _hand_over(self, hidden: Tensor, weight: Tensor | None = None) -> tuple[Head, None]:
        return Head(hidden, self.output_layer.weight if weight is None else weight), None

    def _postprocess(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor | Head:
        if not self.post_process:
            return hidden_states
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        output, _ = self.output_layer(hidden_states, weight=weight)
        return output


def transformer_config(
    architecture: Architecture,
    parallel: Parallel,
    *,
    precision: str,
    abilities: EngineAbilities,
    layers_per_stage: tuple[int, ...] | None = None,
    recompute: Recompute | None = None,
    hidden_dropout: float = 0.0,
    attention_dropout: float = 0.0,
    fp8: str = "none",
    frozen: bool = False,
) -> TransformerConfig:
    """megatron-core's description of a model under a layout. Raises ValueError where they clash.

    fp8: a recipe of the configuration (engine.fp8), for Transformer Engine's layers. frozen: the
    model is not trained; with FP8 its layers' weights are kept in FP8 alone.
    """
    dtype = DTYPES[precision]
    window = architecture.sliding_window
    overlapped = parallel.p2p_overlapped
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.query_groups,
        kv_channels=architecture.head_channels,
        ffn_hidden_size=architecture.ffn_width,
        gated_linear_unit=architecture.gated,
        activation_func=_ACTIVATIONS[architecture.activation],
        normalization=architecture.normalization,
        layernorm_epsilon=architecture.layernorm_epsilon,
        add_bias_linear=architecture.add_bias_linear,
        add_qkv_bias=architecture.add_qkv_bias,
        qk_layernorm=architecture.qk_layernorm,
        window_size=None if window is None else (window - 1, 0),
        hidden_dropout=hidden_dropout,
        attention_dropout=attention_dropout,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        pipeline_model_parallel_layout=_pipeline_layout(layers_per_stage),
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence_parallel,
        overlap_p2p_comm=overlapped,
        batch_p2p_comm=not overlapped,
        # The overlapped schedule frees an output whose message may still be leaving: in order on a
        # CUDA stream, but gloo reads the memory itself and would send what came after.
        deallocate_pipeline_outputs=abilities.has_cuda,
        # sums and counts travel, one division at the end: see training/step.py
        calculate_per_token_loss=True,
        # weights are filled by models/initialize.py or a checkpoint; Megatron's initialisation
        # still runs, for the tensor-parallel marks it leaves on each parameter
        init_method=_leave_alone,
        output_layer_init_method=_leave_alone,
        gradient_accumulation_fusion=abilities.has_apex,
        # these fusions go through torch.compile, which wants a compiler on a CPU; without a bias
        # Megatron has the first for gated activations alone
        bias_activation_fusion=abilities.has_cuda and architecture.gated,
        # what lets a layer's spec name the activation, Transformer Engine or not
        use_te_activation_func=architecture.gated
        and architecture.num_moe_experts is None
        and not abilities.has_cuda,
        bias_dropout_fusion=abilities.has_cuda,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        **_mixture_options(architecture, parallel.expert, abilities),
        **_fp8_options(fp8, frozen),
        **_recompute_options(recompute),
    )


def build_stages(
    architecture: Architecture,
    config: TransformerConfig,
    vocabulary: Vocabulary,
    *,
    seq_length: int,
    reset_positions: bool = False,
    transformer_engine: bool = False,
    documents_apart: bool = False,
) -> list[GPTStage]:
    """This rank's model chunks (one, or virtual_pipeline of them), weights not yet filled.

    transformer_engine: with its layers. documents_apart: the forward is given document_ids.
    """
    chunks = config.virtual_pipeline_model_parallel_size
    if transformer_engine:
        layer, norm = _transformer_engine_layer(config, architecture, documents_apart)
    else:
        layer, norm = _local_layer(config, architecture)
    stages = []
    for vp_stage in range(chunks) if chunks else [None]:
        stage = GPTStage(
            config,
            TransformerBlockSubmodules(
                [layer] * get_num_layers_to_build(config, vp_stage=vp_stage), norm
            ),
            vocab_size=vocabulary.padded,
            max_sequence_length=seq_length,
            position_embedding_type="rope",
            rotary_percent=architecture.rotary_percent,
            rotary_base=architecture.rotary_base,
            pre_process=parallel_state.is_pipeline_first_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            post_process=parallel_state.is_pipeline_last_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            share_embeddings_and_output_weights=architecture.tie_embeddings,
            parallel_output=True,
            vp_stage=vp_stage,
        )
        stage.reset_positions = reset_positions
        if architecture.rotary_scaling is not None:
            rotary = stage.rotary_pos_emb
            rotary.inv_freq = stretch(rotary.inv_freq, architecture.rotary_scaling)
        stages.append(stage)
    return stages


def fuse_weight_gradients(modules: Iterable[torch.nn.Module]) -> None:
    """Let Transformer Engine's linears add their weights' gradients to main_grad in the product.

    Megatron's switch for it, gradient_accumulation_fusion, is the output layer's as well, which
    needs Apex for it. To be called where the weights have a main_grad.
    """
    for module in modules:
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]


def _forgive_extra_state(module: torch.nn.Module, incompatible: Any) -> None:
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if not key.endswith(_EXTRA_STATE)]


def _leave_alone(weight: Tensor) -> Tensor:
    return weight


def _pipeline_layout(layers_per_stage: tuple[int, ...] | None) -> list[list[str]] | None:
    if layers_per_stage is None:
        return None
    layout = [["decoder"] * layers for layers in layers_per_stage]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def _fp8_options(fp8: str, frozen: bool) -> dict[str, Any]:
    if fp8 == "none":
        return {}
    return {
        "fp8": _FP8_FORMATS[fp8],
        "fp8_recipe": fp8,
        "fp8_param": frozen,
        # of 'delayed': the largest value of so many steps sets the scale; Megatron's default is one
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
    }


def _mixture_options(
    architecture: Architecture, expert: int, abilities: EngineAbilities
) -> dict[str, Any]:
    """A mixture that is not trained: no auxiliary loss, no capacity, weights that sum to 1."""
    if architecture.num_moe_experts is None:
        return {}
    # megatron-core 0.16 asks for this name without Transformer Engine, too, and leaves it undefined
    vars(moe_utils).setdefault("te_general_gemm", None)
    return {
        "num_moe_experts": architecture.num_moe_experts,
        "moe_ffn_hidden_size": architecture.ffn_width,
        "moe_router_topk": architecture.moe_router_topk,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "expert_model_parallel_size": expert,
        # it sends a token to its experts' ranks alone, on CUDA's streams; without, all go to all
        "moe_token_dispatcher_type": "alltoall"
        if expert > 1 and abilities.has_cuda
        else "allgather",
    }


def _recompute_options(recompute: Recompute | None) -> dict:
    if recompute is None or recompute.granularity == "none":
        return {}
    if recompute.granularity == "selective":
        return {
            "recompute_granularity": "selective",
            "recompute_modules": list(recompute.modules),
        }
    return {
        "recompute_granularity": "full",
        "recompute_method": recompute.method,
        "recompute_num_layers": recompute.num_layers,
    }


def _local_layer(
    config: TransformerConfig, architecture: Architecture
) -> tuple[ModuleSpec, type[torch.nn.Module]]:
    """megatron-core's local layer with torch's attention and sequence-parallel norms; its norm."""
    norm = norm_for(architecture.normalization)
    layer: ModuleSpec = get_gpt_layer_local_spec(
        num_experts=architecture.num_moe_experts,
        normalization=architecture.normalization,
        qk_layernorm=architecture.qk_layernorm,
    )
    layer.submodules.input_layernorm = norm
    layer.submodules.pre_mlp_layernorm = norm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = TorchAttention
    if architecture.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    if config.use_te_activation_func:
        layer.submodules.mlp.submodules.activation_func = gated(config.activation_func)
    return _varied(layer, architecture), norm


def _transformer_engine_layer(
    config: TransformerConfig, architecture: Architecture, documents_apart: bool
) -> tuple[ModuleSpec, type]:
    """megatron-core's layer of Transformer Engine's modules, and its norm."""
    layer: ModuleSpec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=architecture.num_moe_experts, qk_layernorm=architecture.qk_layernorm
    )
    # its attention knows neither document_ids nor, around a ring of ranks, a sliding window
    in_a_ring = config.context_parallel_size > 1 and config.window_size is not None
    if documents_apart or in_a_ring:
        layer.submodules.self_attention.submodules.core_attention = TorchAttention
    return _varied(layer, architecture), TENorm


def _varied(layer: ModuleSpec, architecture: Architecture) -> ModuleSpec:
    """What this system changes in either kind of layer."""
    layer.submodules.self_attention.module = RotaryAttention
    if architecture.parallel_residual:
        layer.module = ParallelResidualLayer
    return layer

"""AdamW and the learning rate, by megatron-core."""

from __future__ import annotations

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from taid_megatron.config.schema import Optimizer, Parallel
from taid_megatron.models.build import fuse_weight_gradients
from taid_megatron.models.pair import Pair


def wrap(pairs: list[Pair], parallel: Parallel) -> list[DistributedDataParallel]:
    """Megatron's data parallelism around each model chunk: gradients summed in fp32."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    stages = [
        # later chunks are reduced while earlier ones still compute: one bucket is best for them
        DistributedDataParallel(pair.config, config, pair, disable_bucketing=chunk > 0)
        for chunk, pair in enumerate(pairs)
    ]
    for pair in pairs:
        fuse_weight_gradients(pair.modules())
    return stages


def build_optimizer(
    stages: list[DistributedDataParallel],
    settings: Optimizer,
    parallel: Parallel,
    dtype: torch.dtype,
) -> MegatronOptimizer:
    """AdamW over the student's weights, in fp32; norms and biases are not decayed."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    return get_megatron_optimizer(config, stages, get_standard_config_overrides(config))


def build_lr_schedule(
    optimizer: MegatronOptimizer, settings: Optimizer, steps: int
) -> OptimizerParamScheduler:
    """Learning rate over optimizer steps.

    Advance it before each update: update n of N then uses n / warmup_steps of the warm-up and the
    last one min_lr (advanced after it, as Megatron-LM does, the first update would use 0).
    """
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style="WSD" if settings.decay == "wsd" else settings.decay,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=settings.wsd_decay_steps,
        lr_wsd_decay_style=settings.wsd_decay_style,
        # what it holds follows from the configuration and the step: nothing of it is restored
        use_checkpoint_opt_param_scheduler=False,
    )


def wire(stages: list[DistributedDataParallel], parallel: Parallel) -> None:
    """Tell Megatron's schedules how to hold back, start and finish gradient communication."""
    config = stages[0].module.config
    config.finalize_model_grads_func = finalize_model_grads

    def per_chunk(functions: list) -> object:
        return functions if len(functions) > 1 else functions[0]

    if parallel.overlap_grad_reduce:
        config.no_sync_func = per_chunk([stage.no_sync for stage in stages])
        if parallel.pipeline > 1:
            # all stages start at once, so that none waits for another's reduction mid-pipeline
            config.grad_sync_func = per_chunk([stage.start_grad_sync for stage in stages])
    if parallel.overlap_param_gather and parallel.pipeline > 1:
        config.param_sync_func = per_chunk([stage.start_param_sync for stage in stages])

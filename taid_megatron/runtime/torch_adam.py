"""megatron-core's distributed optimizer over torch's own AdamW: loading its state.

Without Transformer Engine and Apex megatron-core takes torch.optim.AdamW, which keeps a `step`
tensor beside each parameter's moments. DistributedOptimizer of megatron-core 0.16 saves that state
but cannot load it: it looks for a sharded tensor named `step`, and it hands ONE step tensor to all
parameters, so that every later update advances the count once per parameter and the resumed run is
silently wrong. Both are mended here; with a fused Adam, which counts per group, nothing is done.
"""

from __future__ import annotations

from typing import Any

import torch

_installed = False


def install() -> None:
    """Mend DistributedOptimizer's loading where torch's AdamW is in use. Idempotent."""
    global _installed
    from megatron.core import optimizer as megatron_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if _installed or not megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        return
    _installed = True
    load_state_dict = DistributedOptimizer.load_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_states_but_step(self: Any, model_param: torch.Tensor, tensors: dict) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        set_states(self, model_param, {**tensors, "step": state["step"]})

    def load_state_dict_with_own_steps(self: Any, state_dict: dict) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_but_step
    DistributedOptimizer.load_state_dict = load_state_dict_with_own_steps

"""megatron-core's distributed optimizer over torch's own AdamW: loading its state.

Without Transformer Engine and Apex megatron-core takes torch.optim.AdamW, which keeps a `step`
tensor beside each parameter's moments. DistributedOptimizer of megatron-core 0.16 saves that state
but cannot load it: it fails where no update has been made yet, it looks for a sharded tensor named
`step`, and it hands ONE step tensor to all parameters, so that every later update advances the
count once per parameter and the resumed run is silently wrong. All three are mended here; with a
fused Adam, which counts per group, nothing is done.
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
    state_dict = DistributedOptimizer.state_dict
    load_state_dict = DistributedOptimizer.load_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def state_dict_from_the_start(self: Any) -> dict:
        _create_state(self.optimizer)
        return state_dict(self)

    def set_states_but_step(self: Any, model_param: torch.Tensor, tensors: dict) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        set_states(self, model_param, {**tensors, "step": state["step"]})

    def load_state_dict_with_own_steps(self: Any, state_dict: dict) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    DistributedOptimizer.state_dict = state_dict_from_the_start
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_but_step
    DistributedOptimizer.load_state_dict = load_state_dict_with_own_steps


def _create_state(adam: torch.optim.Optimizer) -> None:
    """What AdamW creates at its first step, for parameters that have not had one."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }

"""One run measured on this device: seconds of a step, MFU, memory by part, each beside the plan's.

python -m tests.gpu.measure GPU CONFIG [section.key=value ...]

GPU is a kind that `taid-megatron plan` knows, or `this`. The last line is the figures as JSON. No
checkpoint is written.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from taid_megatron.config.errors import UserError
from taid_megatron.config.load import load
from taid_megatron.config.schema import Architecture
from taid_megatron.planning import gpus
from taid_megatron.planning import plan as planning
from taid_megatron.planning.shape import head_operations, layer_operations
from taid_megatron.training import loop
from taid_megatron.training.setup import Trainer

WARM_UP_STEPS = 3
"""Compilation, autotuning, the allocator's first requests."""
PARTS = ("weights", "main_gradients", "optimizer", "teacher")
"""What stays allocated from step to step; the rest of the peak comes and goes."""


def kind_of(card: str) -> str:
    """The plan's name for a card, such as h200 for 'NVIDIA H200'. Raises UserError."""
    named = [kind for kind in gpus.kinds() if all(part in card.lower() for part in kind.split("-"))]
    if not named:
        raise UserError(f"{card}: no row in taid_megatron/planning/gpus.yaml; add its data sheet's")
    return max(named, key=len)


def lasting_bytes(trainer: Trainer) -> dict[str, int]:
    """Bytes of each of PARTS on this rank, as they are allocated."""
    students = [p for pair in trainer.pairs for p in pair.student.parameters()]
    teachers = [p for pair in trainer.pairs if pair.teacher for p in pair.teacher.parameters()]
    buffers = [buffer for stage in trainer.stages for buffer in stage.buffers]
    of_model = {p.data_ptr() for p in students}
    kept = [tensor for tensor in optimizer_tensors(trainer) if tensor.data_ptr() not in of_model]
    found = (students, [buffer.grad_data for buffer in buffers], kept, teachers)
    return {part: sum(map(_bytes, tensors)) for part, tensors in zip(PARTS, found, strict=True)}


def optimizer_tensors(trainer: Trainer) -> list[torch.Tensor]:
    """fp32 weights and moments (in fp32 the weights are the model's own)."""
    chain = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    tensors = []
    for inner in (each.optimizer for each in chain):
        tensors += [p for group in inner.param_groups for p in group["params"]]
        states = [value for state in inner.state.values() for value in state.values()]
        tensors += [value for value in states if isinstance(value, torch.Tensor)]
    return tensors


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def step_operations(trainer: Trainer) -> float:
    """Floating-point operations that the models ask for: nothing that is computed twice counts."""
    training = trainer.config.training
    padded = trainer.vocabulary.padded

    def forward(shape: Architecture) -> float:
        layers = shape.num_layers * layer_operations(shape, training.seq_length)
        return layers + head_operations(shape, padded)

    per_token = 3 * forward(trainer.config.student.architecture)
    if trainer.config.teacher is not None and trainer.config.teacher.architecture is not None:
        per_token += forward(trainer.config.teacher.architecture)
    return per_token * training.global_batch_size * training.seq_length


def measure(gpu: str, config_file: str, overrides: list[str]) -> dict[str, Any]:
    """The figures of a run that succeeds, on one device. Raises RuntimeError where it does not."""
    config = load(config_file, overrides)
    trainers: list[Trainer] = []
    build = loop.build_trainer
    loop.build_trainer = lambda *given: trainers.append(build(*given)) or trainers[-1]  # type: ignore[func-returns-value]
    loop._save = lambda trainer: None
    if code := loop.run(config):
        raise RuntimeError(f"the run ended with {code}")
    has_cuda = torch.cuda.is_available()
    card = torch.cuda.get_device_name() if has_cuda else "CPU"
    planned = planning.make(config, world_size=1, gpu=kind_of(card) if gpu == "this" else gpu)
    memory, peak_rate = planned.figures["memory"][0], planned.costs.gpu.bf16_tflops * 1e12
    lines = (config.run.folder / "metrics.jsonl").read_text().splitlines()
    seconds = sorted(json.loads(line)["step_seconds"] for line in lines[WARM_UP_STEPS:])
    step, planned_step = seconds[len(seconds) // 2], planned.figures["time"]["seconds"]
    operations = step_operations(trainers[0])
    parts = lasting_bytes(trainers[0])
    peak = torch.cuda.max_memory_allocated() if has_cuda else sum(parts.values())
    return {
        "card": card,
        "planned_for": planned.costs.gpu.name,
        "step_seconds": {"measured": step, "planned": planned_step},
        "tokens_per_second": config.training.global_batch_size * config.training.seq_length / step,
        "mfu": {
            "measured": operations / step / peak_rate,
            "planned": operations / planned_step / peak_rate,
        },
        "bytes": {
            **{part: {"measured": parts[part], "planned": memory[part]} for part in PARTS},
            "rest": {
                "measured": peak - sum(parts.values()),
                "planned": memory["total"] - sum(memory[part] for part in PARTS),
            },
            "peak": {"measured": peak, "planned": memory["total"]},
        },
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], sys.argv[3:])))

"""What a rank of a run really allocates, counted by kind: what the planner's memory model says."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from taid_megatron.config.batches import num_microbatches
from taid_megatron.training.objectives import TrainingObjective
from taid_megatron.training.setup import Trainer

from . import toy


def measure(rank: int, world_size: int, config: str, overrides: list[str]) -> dict[str, int]:
    """Bytes of this rank after one optimizer step, activations at their peak."""
    with toy.trainer(config, *overrides) as trainer:
        weights = [p for pair in trainer.pairs for p in pair.parameters()]
        teacher = [p for pair in trainer.pairs if pair.teacher for p in pair.teacher.parameters()]
        saved = _Saved(known=_storages([*weights, *teacher]))
        with saved.counted():
            one_step(trainer, world_size)
        trainer.optimizer.step()
        return {
            "weights": _unique_bytes(weights),
            "teacher": _unique_bytes(teacher),
            "main_gradients": sum(
                buffer.grad_data.nbytes for stage in trainer.stages for buffer in stage.buffers
            ),
            "optimizer": _optimizer_bytes(trainer, _storages(weights)),
            "activations": saved.peak,
        }


def one_step(trainer: Trainer, world_size: int) -> None:
    """Forward and backward of one global batch, weights left alone."""
    config = trainer.config
    size, length = config.training.micro_batch_size, config.training.seq_length
    vocabulary = config.student.architecture.vocab_size
    ids = torch.arange(size * length).view(size, length) % vocabulary
    batch = {
        "tokens": ids,
        "labels": ids,
        "loss_mask": torch.ones(size, length),
        "position_ids": torch.arange(length).expand(size, length).contiguous(),
    }
    objective = TrainingObjective(
        trainer.world,
        trainer.vocabulary,
        loss=config.loss,
        sequence_parallel=config.parallel.sequence_parallel,
        t=0.5,
        temperature=None,
        logged=False,
        with_teacher=trainer.has_teacher,
        rule="paper",
    )
    for stage in trainer.stages:
        stage.zero_grad_buffer()
    micro_batches = [dict(batch) for _ in range(num_microbatches(config, world_size))]
    trainer.pipeline.run(micro_batches, objective)


def _optimizer_bytes(trainer: Trainer, weights: set[int]) -> int:
    """fp32 copies of the weights and both moments; a view of a weight is the weight."""
    total = 0
    for optimizer in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        adam = optimizer.optimizer
        for group in adam.param_groups:
            for parameter in group["params"]:
                if parameter.untyped_storage().data_ptr() not in weights:
                    total += parameter.nbytes
                state = adam.state[parameter]
                total += sum(state[name].nbytes for name in ("exp_avg", "exp_avg_sq"))
    return total


def _storages(tensors: list[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _unique_bytes(tensors: list[Tensor]) -> int:
    return sum({(t.untyped_storage().data_ptr(), t.data_ptr()): t.nbytes for t in tensors}.values())


class _Saved:
    """Bytes of the storages that autograd keeps for the backward, weights left out."""

    def __init__(self, known: set[int]) -> None:
        self.peak = 0
        self._known = known
        self._users: Counter[int] = Counter()
        self._bytes: dict[int, int] = {}
        self._now = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor):
            yield

    def _pack(self, tensor: Tensor) -> _Held:
        held = _Held(tensor)
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self._known or address == 0:
            return held
        if self._users[address] == 0:
            self._bytes[address] = storage.nbytes()
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
        self._users[address] += 1
        weakref.finalize(held, self._release, address)
        return held

    def _release(self, address: int) -> None:
        self._users[address] -= 1
        if self._users[address] == 0:
            self._now -= self._bytes.pop(address)


class _Held:
    """A saved tensor; dies with the graph's node that saved it."""

    def __init__(self, tensor: Tensor) -> None:
        # A node that saves its own output must not keep itself alive.
        self.tensor = tensor.detach() if tensor.requires_grad and not tensor.is_leaf else tensor

"""The teacher in the pipeline: frozen, outside all that is trained or saved, forward only."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist

from taid_megatron.models import teacher_p2p
from taid_megatron.models.pair import teachers
from taid_megatron.training import loop
from taid_megatron.training.setup import build_batches

from . import toy
from .ranks import run_ranks

PP2 = ("parallel.pipeline=2",)
VPP2 = (*PP2, "parallel.virtual_pipeline=2")
MICRO_BATCHES, STUDENT_BYTES, TEACHER_BYTES = 8, 32 * 1 * 32 * 4, 32 * 1 * 64 * 4


def _one_step(rank: int, size: int, config: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """A step under observation: bytes by neighbour, and teacher activations alive in backwards."""
    from megatron.core.pipeline_parallel import schedules

    sent: dict[int, list[int]] = {}
    received: list[weakref.ref] = []
    alive_in_backward: list[int] = []
    send, post_receive = dist.ProcessGroup.send, teacher_p2p.TeacherCarryingCommunicator._receive
    backward_step = schedules.backward_step

    def counting_send(self: Any, tensors: list[torch.Tensor], to: int, tag: int) -> Any:
        sent.setdefault(to, []).extend(tensor.nbytes for tensor in tensors)
        return send(self, tensors, to, tag)

    def watching_receive(self: Any) -> Any:
        pending = post_receive(self)
        received.append(weakref.ref(pending.buffer))
        return pending

    def watching_backward(*args: Any, **kwargs: Any) -> Any:
        alive_in_backward.append(sum(ref() is not None for ref in received))
        return backward_step(*args, **kwargs)

    with toy.trainer(config, *overrides) as trainer:
        # every message of torch.distributed ends here, batched or not
        dist.ProcessGroup.send = counting_send
        teacher_p2p.TeacherCarryingCommunicator._receive = watching_receive
        schedules.backward_step = watching_backward
        batches, _ = build_batches(trainer)
        with batches:
            loop._optimizer_step(trainer, batches)
        return {
            "sent": sent,
            "received": len(received),
            "alive_in_backward": alive_in_backward,
            "teacher_bytes": trainer.pipeline.communicator.teacher_bytes_sent,
        }


def test_nothing_of_the_teacher_travels_backward(config) -> None:
    first, last = run_ranks(2, _one_step, str(config), (*PP2, f"run.folder={config.parent}/bytes"))

    messages = [TEACHER_BYTES] * MICRO_BATCHES + [STUDENT_BYTES] * MICRO_BATCHES
    assert sorted(first["sent"][1]) == sorted(messages)
    assert last["sent"] == {0: [STUDENT_BYTES] * MICRO_BATCHES}
    assert first["teacher_bytes"] == TEACHER_BYTES * MICRO_BATCHES
    assert last["teacher_bytes"] == 0


def test_chunks_send_the_teacher_around_the_ring_forward_only(config) -> None:
    first, last = run_ranks(2, _one_step, str(config), (*VPP2, f"run.folder={config.parent}/ring"))

    # four stages in a row: three borders, two of them leave the first rank
    assert first["teacher_bytes"] == 2 * TEACHER_BYTES * MICRO_BATCHES
    assert last["teacher_bytes"] == TEACHER_BYTES * MICRO_BATCHES
    assert first["sent"][1].count(TEACHER_BYTES) == 2 * MICRO_BATCHES
    assert last["sent"][0].count(TEACHER_BYTES) == MICRO_BATCHES


@pytest.mark.parametrize("stages", [2, 4])
def test_teacher_activations_are_gone_before_the_backward(config, stages) -> None:
    ranks = run_ranks(
        stages,
        _one_step,
        str(config),
        (f"parallel.pipeline={stages}", f"run.folder={config.parent}/alive{stages}"),
    )

    for rank, seen in enumerate(ranks):
        assert seen["received"] == (MICRO_BATCHES if rank else 0)
        assert len(seen["alive_in_backward"]) == MICRO_BATCHES
        assert max(seen["alive_in_backward"]) == 0


def test_chunks_hold_no_more_than_what_is_on_its_way(config) -> None:
    """The interleaved schedule posts receives ahead: those alone may be alive in a backward."""
    overrides = (*VPP2, f"run.folder={config.parent}/alive_chunks")
    for seen in run_ranks(2, _one_step, str(config), overrides):
        assert len(seen["alive_in_backward"]) == 2 * MICRO_BATCHES
        assert max(seen["alive_in_backward"]) <= 2


def _what_is_trained(rank: int, size: int, config: str) -> None:
    with toy.trainer(config) as trainer:
        (teacher,) = teachers(trainer.pairs)
        before = {
            name: weight.clone()
            for name, weight in teacher.state_dict().items()
            if weight is not None
        }
        student_before = [weight.clone() for weight in trainer.pairs[0].parameters()]
        batches, _ = build_batches(trainer)
        with batches:
            for _ in range(2):
                loop._optimizer_step(trainer, batches)

        for name, weight in teacher.named_parameters():
            assert torch.equal(weight, before[name]), name
            assert weight.grad is None
            assert not hasattr(weight, "main_grad")
        assert not teacher.training
        assert any(
            not torch.equal(weight, old)
            for weight, old in zip(trainer.pairs[0].parameters(), student_before, strict=True)
        )
        frozen = {id(weight) for weight in teacher.parameters()}
        assert len(frozen) > 10
        optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        assert not frozen & optimized
        assert not frozen & {id(weight) for weight in trainer.stages[0].parameters()}
        assert not frozen & {id(module) for module in trainer.stages[0].modules()}
        assert not any("teacher" in name for name in trainer.stages[0].state_dict())


def test_teacher_is_frozen_and_outside_the_optimizer_and_the_state(config) -> None:
    run_ranks(1, _what_is_trained, str(config))


def test_undecayed_parameters_are_norms_and_biases(config) -> None:
    run_ranks(1, _weight_decay, f"{config}")


def _weight_decay(rank: int, size: int, config: str) -> None:
    with toy.trainer(config, "student.architecture.add_bias_linear=true") as trainer:
        decayed = {
            id(parameter): group["wd_mult"] > 0
            for group in trainer.optimizer.param_groups
            for parameter in group["params"]
        }
        for name, parameter in trainer.pairs[0].named_parameters():
            is_matrix = not ("layernorm" in name or name.endswith("bias"))
            assert decayed[id(parameter)] == is_matrix, name

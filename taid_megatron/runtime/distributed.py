"""The ranks of a run: process groups, device, seeds, and what this machine can do."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy
import torch
import torch.distributed as dist

from taid_megatron.config.checks import EngineAbilities
from taid_megatron.config.errors import UserError
from taid_megatron.config.schema import Parallel
from taid_megatron.runtime import cpu_engine, torch_adam, transformer_engine

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

Result = TypeVar("Result")


def abilities() -> EngineAbilities:
    """What this machine offers."""
    has_transformer_engine, found = transformer_engine.probe()
    if not torch.cuda.is_available():
        return EngineAbilities(
            has_cuda=False,
            has_transformer_engine=False,
            has_apex=False,
            gpu_count=0,
            transformer_engine=found,
        )
    _one_hardware_queue()
    gpus = range(torch.cuda.device_count())
    cuda = (torch.version.cuda or "0.0").split(".")
    return EngineAbilities(
        has_cuda=True,
        has_transformer_engine=has_transformer_engine,
        has_apex=importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        gpu_count=len(gpus),
        transformer_engine=found,
        compute_capability=min(torch.cuda.get_device_capability(gpu) for gpu in gpus),
        cuda_version=(int(cuda[0]), int(cuda[1])),
    )


def _one_hardware_queue() -> None:
    """To be called before CUDA starts: kernels then run in the order of their launch.

    Megatron relies on it to overlap tensor-parallel communication with the products behind it.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def world_size_from_environment() -> int:
    """Ranks that torchrun started; 1 when run alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class World:
    """This process's place among the ranks. Groups are Megatron's; sizes count ranks."""

    rank: int
    size: int
    device: torch.device
    groups: ProcessGroupCollection
    """tp, pp, cp, dp, dp_cp, mp, embd, pos_embd, ... as megatron-core's schedules take them."""
    teacher_groups: tuple[dist.ProcessGroup, dist.ProcessGroup] | None
    """The pipeline's ranks twice more, for the teacher's messages (models/teacher_p2p.py)."""
    joined_here: bool
    """Whether `start` joined the ranks, so that `stop` leaves them."""

    @cached_property
    def tensor_rank(self) -> int:
        """Position within the tensor-parallel group."""
        return self.groups.tp.rank()

    @cached_property
    def pipeline_rank(self) -> int:
        """Position within the pipeline."""
        return self.groups.pp.rank()

    @cached_property
    def data_rank(self) -> int:
        """Position among the data-parallel replicas."""
        return self.groups.dp.rank()

    @property
    def is_last_stage(self) -> bool:
        """Whether the logits and the loss come about here."""
        return self.pipeline_rank == self.groups.pp.size() - 1

    @cached_property
    def loss_source(self) -> int:
        """Global rank, in this rank's model replica, whose loss figures all of it adopts."""
        pipelines = self.groups.pp.size()
        tensors = self.groups.tp.size()
        # Megatron orders a replica's ranks tensor first, pipeline last.
        return dist.get_process_group_ranks(self.groups.mp)[(pipelines - 1) * tensors]

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks to the user and writes the run's files."""
        return self.rank == 0


def start(parallel: Parallel, seed: int, timeout_minutes: float = 10.0) -> World:
    """Join the other ranks, build Megatron's groups, seed every generator.

    Run alone (no torchrun environment), the process is a world of one rank. On CUDA each process
    takes the GPU of its LOCAL_RANK and talks over NCCL; without CUDA the ranks talk over gloo.
    timeout_minutes: that a rank waits for the others, here and in every collective.
    """
    _one_hardware_queue()
    on_cpu = cpu_engine.install()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    torch_adam.install()
    rank, size = int(os.environ.get("RANK", "0")), world_size_from_environment()
    device = torch.device("cpu")
    if not on_cpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    joined_here = not dist.is_initialized()
    if joined_here:
        dist.init_process_group(
            backend="gloo" if on_cpu else "cpu:gloo,cuda:nccl",
            rank=rank,
            world_size=size,
            timeout=timedelta(minutes=timeout_minutes),
            store=None if "RANK" in os.environ else dist.HashStore(),
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        distributed_timeout_minutes=math.ceil(timeout_minutes),
    )
    seed_everything(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=device,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        teacher_groups=_teacher_groups(parallel, timedelta(minutes=timeout_minutes)),
        joined_here=joined_here,
    )


def seed_everything(seed: int) -> None:
    """Python's, numpy's and torch's generators."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _teacher_groups(
    parallel: Parallel, timeout: timedelta
) -> tuple[dist.ProcessGroup, dist.ProcessGroup] | None:
    """This rank's two groups for the teacher's messages; all ranks take part in making them."""
    if parallel.pipeline == 1:
        return None
    from megatron.core import parallel_state

    mine = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    pipelines: list = [None] * dist.get_world_size()
    dist.all_gather_object(pipelines, mine)
    own: tuple | None = None
    for ranks in sorted({tuple(ranks) for ranks in pipelines}):
        first, second = (dist.new_group(list(ranks), timeout=timeout) for _ in range(2))
        if dist.get_rank() in ranks:
            own = (first, second)
    return own


def private_store(name: str) -> dist.Store | None:
    """The store in which the ranks met, for the use of one part of the program; None for one rank.

    Its keys are apart from others', also from those of an earlier call: each rank calls it as often
    as the others. It is a connection of its own, so who waits there keeps nobody else from using
    the store (torch before 2.8 cannot do that: there it is the same one).
    """
    if dist.get_world_size() == 1:
        return None
    store = dist.distributed_c10d._get_default_store()
    own = store.clone() if hasattr(store, "clone") else store
    return dist.PrefixStore(f"{name}_{next(_private_stores)}", own)


_private_stores = itertools.count()


def any_of(flags: Sequence[bool], world: World) -> list[bool]:
    """Whether each flag is set on any rank; the same answers on all of them, in one collective."""
    raised = torch.tensor([float(flag) for flag in flags], device=world.device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in raised.tolist()]


def on_first_rank(function: Callable[[], Result]) -> Result:
    """Call it on rank 0 and give every rank its result; to be called on every rank.

    What it raises is raised on every rank: a UserError as it is, anything else as a RuntimeError
    with its text on the others. None waits for one that has left.
    """
    outcome: list[Any] = [None, None]
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except Exception as raised:
            error = raised
            outcome[1] = (isinstance(raised, UserError), str(raised))
    dist.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if outcome[1] is not None:
        is_users, text = outcome[1]
        raise UserError(text) if is_users else RuntimeError(f"rank 0 failed: {text}")
    return outcome[0]


def stop(world: World) -> None:
    """Leave Megatron's groups, and the ranks where `start` joined them."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if world.joined_here:
        dist.destroy_process_group()

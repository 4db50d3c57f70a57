"""Loaded under another layout, a checkpoint is the same one: weights, optimizer, samples to come.

One checkpoint goes from layout to layout: loaded, and saved again by what has loaded it. At each
station all tensors are compared with the first by their global names, bit for bit.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from taid_megatron.checkpointing import store
from taid_megatron.runtime.random_state import get_random_state
from taid_megatron.training.setup import build_batches

from . import toy
from .ranks import run_ranks

TP2 = "parallel.tensor=2"
PP2 = "parallel.pipeline=2"
VPP2 = "parallel.virtual_pipeline=2"
SHARDED = "parallel.distributed_optimizer=true"
OVERLAP = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")

# The stations by number of ranks: 12 pairs of neighbours, from one process to one process.
STATIONS: list[tuple[int, list[tuple[str, ...]]]] = [
    (
        4,
        [
            (TP2, PP2),
            (PP2, VPP2, *OVERLAP),
            (TP2, "parallel.sequence_parallel=true"),
            (),
            ("parallel.pipeline=4",),
            (TP2, PP2, VPP2),
        ],
    ),
    (2, [(TP2,), (PP2, VPP2), OVERLAP, (PP2,), (TP2,)]),
    (1, [()]),
]


def _travel(
    rank: int, size: int, config: str, first: Path, folder: Path, stations: list[tuple[str, ...]]
) -> list[list[list[int]]]:
    """Load and save under each layout in turn; the next step's samples at each, by their tokens."""
    at, samples = first, []
    for number, overrides in enumerate(stations):
        with toy.trainer(config, f"run.folder={folder}", SHARDED, *overrides) as trainer:
            checkpoint = store.find(at)
            state = checkpoint.state()
            store.load(
                checkpoint,
                stages=trainer.students,
                optimizer=trainer.optimizer,
                random_state=None,
            )
            trainer.consumed_samples = state["consumed_samples"]
            samples.append(_next_samples(trainer))
            at = store.begin(
                folder / f"{size}_{number}",
                checkpoint.step,
                stages=trainer.students,
                optimizer=trainer.optimizer,
                random_state=get_random_state(),
                state=state,
            ).complete()
    return samples


def _next_samples(trainer) -> list[list[int]]:
    """The tokens of the next global batch, of all replicas, sorted."""
    batches, _ = build_batches(trainer)
    with batches:
        mine = [row.tolist() for batch in batches.step(8) for row in batch["tokens"]]
    told: list = [None] * dist.get_world_size()
    dist.all_gather_object(told, (trainer.world.data_rank, mine))
    return sorted(row for rows in dict(told).values() for row in rows)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint but the ranks' random generators, by global name."""
    reader = FileSystemReader(path)
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("random_state")
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def _same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for the vocabulary's padding, which follows the tensor-parallel size."""
    if tensor.shape[1:] != other.shape[1:]:
        return False
    if len(tensor) != len(other):
        assert min(len(tensor), len(other)) > toy.VOCABULARY
        tensor, other = tensor[: toy.VOCABULARY], other[: toy.VOCABULARY]
    return torch.equal(tensor, other)


def test_twelve_pairs_of_layouts_load_each_other(config, tmp_path) -> None:
    toy.train(config, tmp_path / "run", 1, SHARDED, "training.stop_at=2", save=True)
    at = store.find(tmp_path / "run").path
    expected, samples = _tensors(at), None
    moments = [name for name in expected if "exp_avg" in name]
    assert moments
    assert all(bool(expected[name].any()) for name in moments)
    for ranks, stations in STATIONS:
        told = run_ranks(ranks, _travel, str(config), at, tmp_path, stations)
        for number, (layout, seen) in enumerate(zip(stations, told[0], strict=True)):
            at = store.newest(tmp_path / f"{ranks}_{number}").path
            found = _tensors(at)
            assert found.keys() == expected.keys(), layout
            different = [name for name in expected if not _same(found[name], expected[name])]
            assert different == [], layout
            samples = samples or seen
            assert seen == samples, layout
    assert len(samples) == 8

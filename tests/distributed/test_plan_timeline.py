"""The simulated schedule against what Megatron's schedules really do.

The order of operations is asserted. By hand, `python -m tests.distributed.test_plan_timeline` runs
stages of known duration (they sleep) and prints measured beside simulated seconds.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from taid_megatron.models.pair import Outputs, Pair
from taid_megatron.planning.timeline import Durations, Operation, order, simulate

from . import allocated, toy
from .ranks import run_ranks

PP2, VPP2 = "parallel.pipeline=2", "parallel.virtual_pipeline=2"


def run_stages(
    rank: int,
    world_size: int,
    config: str,
    overrides: list[str],
    chunks: int,
    forward: list[float],
    backward: list[float],
) -> tuple[list[Operation], float]:
    """Operations of this rank in the order they ran, and the seconds of the second of two steps.

    forward, backward: seconds that each stage sleeps, in model order.
    """
    ran: list[Operation] = []
    seen: Counter[tuple[bool, int]] = Counter()
    plain = Pair.forward

    def note(is_backward: bool, stage: int) -> None:
        ran.append(Operation(is_backward, stage, seen[is_backward, stage]))
        seen[is_backward, stage] += 1
        time.sleep((backward if is_backward else forward)[stage])

    def noted(pair: Pair, *arguments):
        stage = (pair.vp_stage or 0) * world_size + rank
        output = plain(pair, *arguments)
        note(False, stage)
        student = output.student if isinstance(output, Outputs) else output
        student.register_hook(lambda grad: note(True, stage))
        return output

    Pair.forward = noted
    with toy.trainer(config, *overrides) as trainer:
        allocated.one_step(trainer, world_size)
        ran.clear()
        seen.clear()
        started = time.perf_counter()
        allocated.one_step(trainer, world_size)
        return ran, time.perf_counter() - started


@pytest.mark.parametrize(
    ("ranks", "chunks", "overrides"),
    [
        (2, 1, (PP2,)),
        (2, 2, (PP2, VPP2)),
        (3, 2, ("parallel.pipeline=3", VPP2, "training.global_batch_size=9",
                "student.layers_per_stage=[1,1,0,1,0,1]",
                "teacher.layers_per_stage=[2,1,1,1,2,1]")),
    ],
)  # fmt: skip
def test_megatron_works_in_the_simulated_order(ranks, chunks, overrides, config, tmp_path) -> None:
    given = [f"run.folder={tmp_path / 'run'}", *overrides]
    nothing = [0.0] * ranks * chunks

    found = run_ranks(ranks, run_stages, str(config), given, chunks, nothing, nothing)

    micro_batches = 9 if ranks == 3 else 8
    for rank, (ran, _) in enumerate(found):
        assert ran == order(rank, ranks, chunks, micro_batches)


def main() -> None:
    """Print measured beside simulated seconds."""
    folder = Path(tempfile.mkdtemp())
    config = toy.write_config(folder)
    cases = {
        "PP=2, uneven": ((PP2,), 1, [0.2, 0.44], [0.28, 0.68]),
        "PP=2, the same work balanced": ((PP2,), 1, [0.32, 0.32], [0.48, 0.48]),
        "PP=2 VPP=2, balanced": ((PP2, VPP2), 2, [0.16] * 4, [0.24] * 4),
    }
    for name, (overrides, chunks, forward, backward) in cases.items():
        given = [f"run.folder={folder / 'run'}", *overrides]
        found = run_ranks(2, run_stages, str(config), given, chunks, forward, backward)
        measured = max(seconds for _, seconds in found)
        durations = Durations(forward=forward, backward=backward)
        simulated = simulate(durations, 2, chunks, 8).seconds
        print(f"{name}: measured {measured:.2f} s, simulated {simulated:.2f} s", file=sys.stderr)


if __name__ == "__main__":
    main()

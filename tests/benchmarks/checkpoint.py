"""A save with its hashes against one without, blocking and asynchronous, side by side in one run.

    python tests/benchmarks/checkpoint.py [--megabytes 500] [--repeats 7] [--folder DISK]

CPU-seconds of this process and the writer's, and seconds by the clock: medians of interleaved
rounds, the order turned round from one to the next, and of the ratios within a round. A save
without hashes is the same code with a hash that does nothing. `stands still` is what training
waits for.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import write_json
from megatron.core.dist_checkpointing import ShardedTensor

from taid_megatron.checkpointing import manifest, saving, store, writer
from taid_megatron.runtime import cpu_engine

_HASH_FILE, _START = manifest.hash_file, writer._START
_NO_HASH = (
    "import types, xxhash; xxhash.xxh3_128 = lambda: types.SimpleNamespace("
    "update=lambda block: None, hexdigest=lambda: '0'); "
)
_TENSORS = 10
VERSIONS = {
    "blocking, no hash": (None, False),
    "blocking": (None, True),
    "asynchronous, no hash": (600.0, False),
    "asynchronous": (600.0, True),
}


class State:
    """Tensors in place of a model, or of an optimizer."""

    def __init__(self, megabytes: int) -> None:
        size = -(-megabytes * 2**18 // _TENSORS) if megabytes else 0
        self.tensors = {f"w{n}": torch.randn(size) for n in range(_TENSORS if size else 0)}

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, ShardedTensor]:
        """As megatron-core asks for it."""
        return {
            name: ShardedTensor.from_rank_offsets(name, tensor)
            for name, tensor in self.tensors.items()
        }


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def one_save(folder: Path, state: State, version: str) -> dict[str, float]:
    """CPU-seconds and seconds of a save, and the seconds that training stands still for it."""
    timeout, hashed = VERSIONS[version]
    manifest.hash_file = _HASH_FILE if hashed else lambda path: "0" * 32
    writer._START = _START if hashed else _NO_HASH + _START
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    cpu, start = cpu_seconds(), time.perf_counter()
    pending = store.begin(
        *(folder, 1),
        stages=[state],
        optimizer=State(0),
        random_state={},
        state={},
        writer_timeout=timeout,
    )
    begun = time.perf_counter()
    pending.complete()
    ended = time.perf_counter()
    return {
        "cpu_seconds": cpu_seconds() - cpu,
        "seconds": ended - start,
        "stands_still": (begun if timeout else ended) - start,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write; none: the temporary folder")
    parser.add_argument("--json", type=Path, help="write the table there as JSON")
    args = parser.parse_args(argv)
    saving._POLL_SECONDS = 0.005  # no part of the time to be told apart
    cpu_engine.install()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    state = State(args.megabytes)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VERSIONS}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for repeat in range(args.repeats + 1):
            for name in list(VERSIONS)[:: 1 if repeat % 2 else -1]:
                figures = one_save(Path(folder) / "checkpoints", state, name)
                if repeat:  # the first round warms up
                    found[name].append(figures)
    rows = []
    print(
        f"{'':<24}{'CPU-s':>8}{'ratio':>8}{'s':>8}{'ratio':>8}{'stands still, s':>18}{'ratio':>8}"
    )
    for name, rounds in found.items():
        against = name.removesuffix(", no hash") + ", no hash"
        row: dict[str, Any] = {"version": name, "against": against}
        for figure in ("cpu_seconds", "seconds", "stands_still"):
            base = "blocking" if figure == "stands_still" else against
            ratios = [a[figure] / b[figure] for a, b in zip(rounds, found[base], strict=True)]
            row[figure] = statistics.median(each[figure] for each in rounds)
            row[f"{figure}_ratio"] = statistics.median(ratios)
        rows.append(row)
        print(
            f"{name:<24}{row['cpu_seconds']:>8.2f}{row['cpu_seconds_ratio']:>8.3f}"
            f"{row['seconds']:>8.2f}{row['seconds_ratio']:>8.3f}"
            f"{row['stands_still']:>8.2f}{row['stands_still_ratio']:>8.3f}"
        )
    write_json(args.json, {"megabytes": args.megabytes, "repeats": args.repeats, "rows": rows})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

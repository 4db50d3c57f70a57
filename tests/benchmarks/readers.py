"""Micro-batches by data.reader: samples per CPU-second, side by side in one run.

    python tests/benchmarks/readers.py [--seq-length 2048] [--micro-batch-size 4]
                                       [--samples 4000] [--rounds 5] [--json FILE]

Made-up token files, megatron-core's GPTDataset, one rank, no thread beside it: all of a version's
work is in its CPU-seconds. The versions take turns; a ratio is the median of the rounds'. Before
anything is timed, all versions give the same micro-batches. Needs the extra `dali`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import write_json

from data_tools.indexed_writer import IndexedWriter
from taid_megatron.data.dali_reader import through_dali
from taid_megatron.data.datasets import build_datasets
from taid_megatron.data.loader import DistributedBatches, Transport, pinned

VERSIONS: dict[str, Transport] = {"gpt": pinned, "dali": through_dali}


def make_dataset(folder: Path, seq_length: int, samples: int) -> Any:
    """Windows over documents of 100 to 2,000 tokens of a vocabulary of 32,000."""
    rng = np.random.default_rng(0)
    with IndexedWriter(folder / "tokens", vocab_size=32_000) as writer:
        tokens = 0
        while tokens <= (samples + 1) * seq_length:
            document = rng.integers(1, 32_000, int(rng.integers(100, 2_000)))
            writer.add_document(np.append(document, 0), name="made up")
            tokens += len(document) + 1
        writer.finish()
    dataset, _ = build_datasets(
        train_blend=[(str(folder / "tokens"), 1.0)],
        seq_length=seq_length,
        seed=0,
        num_train_samples=samples,
        num_valid_samples=None,
        eod_id=0,
        cache_path=folder / "cache",
    )
    return dataset


def stream(dataset: Any, version: str, size: int) -> DistributedBatches:
    """The loader of a run on one rank, without its thread."""
    place = {"micro_batch_size": size, "dp_rank": 0, "dp_size": 1, "prefetch": 0}
    return DistributedBatches(dataset, **place, transport=VERSIONS[version])  # type: ignore[arg-type]


def check_equal(dataset: Any, size: int) -> None:
    """Ends the program where a version gives anything else than the first."""
    streams = [stream(dataset, version, size) for version in VERSIONS]
    for batches in zip(*(one.step(8 * size) for one in streams), strict=True):
        for other in batches[1:]:
            if any(not torch.equal(other[name].cpu(), batches[0][name]) for name in batches[0]):
                raise SystemExit("readers: the versions give different micro-batches")


def cpu_seconds(dataset: Any, version: str, size: int) -> float:
    """Of reading everything once, from a stream that is already under way."""
    with stream(dataset, version, size) as batches:
        batches.step(4 * size)
        began = time.process_time()
        while batches.consumed_samples + size <= len(dataset):
            batches.step(size)
        return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--samples", type=int, default=4_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        print("readers: NVIDIA DALI is not installed; pip install -e '.[dali]'", file=sys.stderr)
        raise SystemExit(2)
    size, rows = args.micro_batch_size, []
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(Path(folder), args.seq_length, args.samples)
        check_equal(dataset, size)
        rounds = [
            {version: cpu_seconds(dataset, version, size) for version in VERSIONS}
            for _ in range(args.rounds)
        ]
    print(f"Windows of {args.seq_length} tokens, {size} per micro-batch;")
    print("speed: CPU-seconds of gpt / those of the row, lowest-highest round")
    for version in VERSIONS:
        speeds = [one["gpt"] / one[version] for one in rounds]
        rate = (args.samples - 4 * size) / statistics.median(one[version] for one in rounds)
        speed = statistics.median(speeds)
        spread = f"{min(speeds):.2f}-{max(speeds):.2f}"
        print(f"  {version:6s} {speed:6.2f} ({spread}) {rate:10.0f} samples per CPU-second")
        rows.append({"version": version, "speed": speed, "samples_per_cpu_second": rate})
    write_json(args.json, {"rows": rows})


if __name__ == "__main__":
    main()

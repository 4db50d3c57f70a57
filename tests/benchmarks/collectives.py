"""The losses' two ways to exchange statistics, on gloo ranks of this machine.

    python tests/benchmarks/collectives.py [--ranks 2] [--tokens 2048] [--vocabulary 32000]

Seconds of one forward and backward on vocabulary shards, by the clock, the slowest rank's, medians
of interleaved rounds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from measure import write_json

from taid_megatron.losses import distillation_loss
from taid_megatron.losses.registry import COLLECTIVES


def on_rank(rank: int, args: argparse.Namespace, store: str, results: object) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    generator = torch.Generator().manual_seed(rank)
    size = (args.tokens, args.vocabulary // args.ranks)
    student, teacher = (3 * torch.randn(size, generator=generator) for _ in range(2))
    seconds: dict[str, list[float]] = {name: [] for name in COLLECTIVES}
    for repeat in range(args.repeats + 1):
        for name in COLLECTIVES:
            leaf = student.clone().requires_grad_()
            dist.barrier()
            start = time.perf_counter()
            loss = distillation_loss(
                *("taid", leaf, teacher), t=0.4, group=dist.group.WORLD, collective=name
            )
            loss.sum().backward()
            slowest = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if repeat:
                seconds[name].append(slowest.item())
    if rank == 0:
        results.put(seconds)  # type: ignore[attr-defined]
    dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the table there as JSON")
    args = parser.parse_args(argv)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        ranks = [
            context.Process(target=on_rank, args=(rank, args, store, results))
            for rank in range(args.ranks)
        ]
        for process in ranks:
            process.start()
        seconds = results.get()
        for process in ranks:
            process.join()
    baseline = seconds[COLLECTIVES[0]]
    rows = []
    for name, found in seconds.items():
        ratios = [own / other for own, other in zip(found, baseline, strict=True)]
        median, ratio = statistics.median(found), statistics.median(ratios)
        rows.append({"collective": name, "seconds": median, "time_ratio": ratio})
        print(f"{name:<12}{median:>10.4f} s{ratio:>8.2f}")
    write_json(args.json, {"ranks": args.ranks, "tokens": args.tokens, "rows": rows})


if __name__ == "__main__":
    main()

"""Time and peak memory of the loss, forward and backward, beside plain autograd.

    python tests/benchmarks/loss.py [--tokens 2048] [--vocabulary 32000] [--dtype bfloat16] ...

Times are medians of interleaved runs in one process, so that a busy machine slows all alike. Memory
is the peak resident size of a fresh process per version, over what it held with the inputs, in
copies of the student's logits. Only the ratios carry over to another machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from taid_megatron.losses import distillation_loss

T = 0.4
WARMUP_TOKENS = 4


def naive_taid(student: Tensor, teacher: Tensor, t: float = T) -> Tensor:
    """What one writes first: softmax, log_softmax, multiply, sum."""
    mixed = torch.lerp(student.detach().float(), teacher.float(), t)
    target = mixed.softmax(-1)
    return (target * (mixed.log_softmax(-1) - student.float().log_softmax(-1))).sum(-1)


def naive_forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    target = teacher.float().softmax(-1)
    log_ratio = teacher.float().log_softmax(-1) - student.float().log_softmax(-1)
    return (target * log_ratio).sum(-1)


def torch_taid(student: Tensor, teacher: Tensor) -> Tensor:
    return distillation_loss("taid", student, teacher, t=T, kernel="torch")


def torch_taid_inplace(student: Tensor, teacher: Tensor) -> Tensor:
    return distillation_loss("taid", student, teacher, t=T, kernel="torch", inplace=True)


def torch_taid_all_stats(student: Tensor, teacher: Tensor) -> Tensor:
    loss, _ = distillation_loss("taid", student, teacher, t=T, inplace=True, return_stats=True)
    return loss


def torch_forward_kl_inplace(student: Tensor, teacher: Tensor) -> Tensor:
    return distillation_loss("forward_kl", student, teacher, kernel="torch", inplace=True)


# version -> the version it is compared with
VERSIONS: dict[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]] = {
    naive_taid: naive_taid,
    torch_taid: naive_taid,
    torch_taid_inplace: naive_taid,
    torch_taid_all_stats: naive_taid,
    naive_forward_kl: naive_forward_kl,
    torch_forward_kl_inplace: naive_forward_kl,
}


def make_inputs(tokens: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Normal logits of scale 3, written in place: no temporary raises the memory's baseline."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.empty(tokens, vocabulary, dtype=dtype).normal_(std=3.0, generator=generator)
        for _ in range(2)
    )


def run_once(version: Callable, student: Tensor, teacher: Tensor) -> None:
    student.grad = None
    version(student.requires_grad_(), teacher).sum().backward()


def time_versions(args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of one forward and backward, per version."""
    student, teacher = make_inputs(args.tokens, args.vocabulary, args.dtype)
    source = student.clone()
    seconds: dict[str, list[float]] = {version.__name__: [] for version in VERSIONS}
    for repeat in range(args.repeats + 1):
        for version in VERSIONS:
            with torch.no_grad():
                student.copy_(source)  # the last version may have overwritten it
            start = time.perf_counter()
            run_once(version, student, teacher)
            if repeat > 0:
                seconds[version.__name__].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_bytes() -> int:
    """Peak resident size of this program (Linux). getrusage would count what the parent held."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure_memory(name: str, args: argparse.Namespace) -> float:
    """Peak memory of this process during one run of a version, in copies of the logits."""
    version = next(version for version in VERSIONS if version.__name__ == name)
    student, teacher = make_inputs(args.tokens, args.vocabulary, args.dtype)
    # Loads libraries and starts threads without memory of the logits' size.
    run_once(version, *make_inputs(WARMUP_TOKENS, 64, args.dtype))
    before = peak_bytes()
    run_once(version, student, teacher)
    return (peak_bytes() - before) / (student.numel() * student.element_size())


def memory_in_fresh_process(name: str, args: argparse.Namespace) -> float:
    command = [sys.executable, __file__, "--memory-of", name, "--tokens", str(args.tokens)]
    command += ["--vocabulary", str(args.vocabulary), "--dtype", str(args.dtype).split(".")[-1]]
    command += ["--threads", str(args.threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the table there as JSON")
    parser.add_argument("--memory-of", metavar="VERSION", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(measure_memory(args.memory_of, args))
        return
    seconds = time_versions(args)
    rows = []
    for version, baseline in VERSIONS.items():
        name = version.__name__
        rows.append(
            {
                "version": name,
                "against": baseline.__name__,
                "seconds": seconds[name],
                "time_ratio": seconds[name] / seconds[baseline.__name__],
                "extra_copies": memory_in_fresh_process(name, args),
            }
        )
    print(f"{args.tokens} tokens x {args.vocabulary}, {args.dtype}, {args.threads} threads")
    print(f"{'version':<26}{'seconds':>9}{'ratio':>8}{'extra copies of the logits':>29}")
    for row in rows:
        print(
            f"{row['version']:<26}{row['seconds']:>9.3f}{row['time_ratio']:>8.2f}"
            f"{row['extra_copies']:>29.2f}"
        )
    if args.json:
        settings = {"tokens": args.tokens, "vocabulary": args.vocabulary}
        settings |= {"dtype": str(args.dtype), "threads": args.threads, "torch": torch.__version__}
        args.json.write_text(json.dumps({**settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""The losses on one CUDA device against what its memory allows, and against other ways to do it.

    python tests/benchmarks/loss_gpu.py [--tokens 16384] [--vocabularies 32000,152064] ...

Times are milliseconds of the device between CUDA events, forward and backward, medians over
interleaved runs on several sets of inputs, so that none lies in a cache. A device that waits hides
what the host needs to launch. Both ceilings are measured in the same call: the bandwidth of a copy,
and the rate of the fused head's four matrix products on their own.

`floor` is the time in which a copy moves the bytes that a loss cannot do without: with bf16, 2 + 2
logits read forward and backward and 1 written are 10 bytes per element, 14 for losses that need the
normalisers first. `copies` is the extra peak memory in copies of the student's logits.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from loss import T, naive_taid
from measure import write_json
from torch import Tensor

from taid_megatron.losses import distillation_loss
from taid_megatron.losses.fused_head import fused_distillation_loss

ACCESSES = {
    **dict.fromkeys(("taid", "forward_kl", "reverse_kl"), 5),
    **dict.fromkeys(("tvd", "gjs", "skew_kl", "skew_reverse_kl"), 7),
}
"""Reads and writes per element of each loss that has a kernel."""
SCALE = 3.0
# Cycles that the device waits before the first event: the host is then ahead of it.
WAIT = 4_000_000

Run = Callable[[Tensor, Tensor], Tensor]
Row = dict[str, Any]


# ---- what is compared ----------------------------------------------------------------------------


@cache
def _compiled() -> Run:
    return torch.compile(naive_taid)


@cache
def _modelopt() -> Callable[[Tensor, Tensor], Any]:
    from megatron.core import parallel_state
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    return LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=2, sequence_parallel=False))


def modelopt(student: Tensor, teacher: Tensor) -> Tensor:
    with torch.no_grad():
        target = torch.lerp(student.unsqueeze(1).float(), teacher.unsqueeze(1).float(), T)
    return _modelopt()(student.unsqueeze(1), target)[0]


def ours(name: str, kernel: str, student: Tensor, teacher: Tensor) -> Tensor:
    options = {"t": T} if name == "taid" else {}
    return distillation_loss(name, student, teacher, kernel=kernel, inplace=True, **options)


def versions() -> dict[str, Run]:
    """By name; `naive` first, which the ratios are to."""
    found: dict[str, Run] = {
        "naive": naive_taid,
        "compiled": lambda student, teacher: _compiled()(student, teacher),
        "torch": partial(ours, "taid", "torch"),
    }
    if find_spec("modelopt"):
        found["modelopt"] = modelopt
    found |= {name: partial(ours, name, "triton") for name in ACCESSES}
    # on torch's operations: the head's length depends on the data
    return found | {"adaptive_kl": partial(ours, "adaptive_kl", "torch")}


# ---- measuring -----------------------------------------------------------------------------------


def milliseconds(run: Callable[[], object]) -> float:
    """Of the device, one run."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(WAIT)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def copy_bandwidth(repeats: int, size: int = 2 << 30) -> float:
    """Bytes per second, read and written, of a copy much larger than any cache."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source)) for _ in range(repeats + 1)]
    return 2 * size / statistics.median(times[1:]) * 1e3


def normal(*shape: int, std: float) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=std)


def step(run: Run, student: Tensor, teacher: Tensor) -> None:
    student.grad = None
    run(student, teacher).sum().backward()


def time_versions(
    runs: dict[str, Run], sets: Sequence[tuple[Tensor, Tensor]], repeats: int
) -> dict[str, list[float]]:
    """Milliseconds per version, interleaved; a version that memory does not hold has none."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    master = torch.empty_like(sets[0][0])
    for repeat in range(repeats + 2):
        source, teacher = sets[repeat % len(sets)]
        for name, run in runs.items():
            if repeat > 0 and not times[name]:
                continue
            student = master.copy_(source).requires_grad_()
            try:
                times[name].append(milliseconds(partial(step, run, student, teacher)))
            except torch.OutOfMemoryError:
                times[name].clear()
            master = master.detach()
            master.grad = student = None
    # the first two compile and warm up
    return {name: found[2:] for name, found in times.items()}


def extra_copies(run: Run, sets: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Peak memory beyond the inputs of one forward and backward, in copies of the logits."""
    student = sets[0][0].clone().requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(run, student, sets[0][1])
    peak = torch.cuda.max_memory_allocated() - before
    return peak / (student.numel() * student.element_size())


def measure_losses(args: argparse.Namespace, vocabulary: int, bandwidth: float) -> list[Row]:
    """One row per version at one vocabulary."""
    sets = [
        (normal(args.tokens, vocabulary, std=SCALE), normal(args.tokens, vocabulary, std=SCALE))
        for _ in range(args.sets)
    ]
    runs = versions()
    times = time_versions(runs, sets, args.repeats)
    rows: list[Row] = []
    for name, run in runs.items():
        row: Row = {"version": name, "vocabulary": vocabulary, "milliseconds": None}
        rows.append(row)
        if not times[name]:
            continue
        row["milliseconds"] = statistics.median(times[name])
        if times["naive"]:
            row["naive_over_it"] = statistics.median(times["naive"]) / row["milliseconds"]
        if name in ACCESSES:
            floor = ACCESSES[name] * 2 * args.tokens * vocabulary / bandwidth * 1e3
            row |= {"floor_milliseconds": floor, "over_floor": row["milliseconds"] / floor}
        row["extra_copies"] = extra_copies(run, sets)
    return rows


def measure_head(args: argparse.Namespace, vocabulary: int) -> Row:
    """The fused head against the four matrix products that it cannot do without."""
    tokens, (width, teacher_width) = args.tokens, args.hidden
    hidden, teacher_hidden = (normal(tokens, w, std=1.0) for w in args.hidden)
    weight, teacher_weight = (normal(vocabulary, w, std=SCALE / w**0.5) for w in args.hidden)
    gradient = normal(tokens, vocabulary, std=1e-3)
    hidden.requires_grad_()
    weight.requires_grad_()
    weight.main_grad = torch.zeros(vocabulary, width, device="cuda")
    mask = torch.ones(tokens, device="cuda")

    def products() -> None:
        with torch.no_grad():
            torch.mm(hidden, weight.t())
            torch.mm(teacher_hidden, teacher_weight.t())
            torch.mm(gradient, weight)
            torch.mm(gradient.t(), hidden)

    def fused() -> None:
        hidden.grad = weight.grad = None
        heads = (hidden, weight, teacher_hidden, teacher_weight)
        total, _ = fused_distillation_loss(
            "taid", *heads, loss_mask=mask, t=T, head_chunk_tokens=args.head_chunk_tokens
        )
        total.backward()

    times: dict[str, list[float]] = {"products": [], "fused": []}
    for repeat in range(args.repeats + 2):
        for name, run in (("products", products), ("fused", fused)):
            elapsed = milliseconds(run)
            if repeat > 1:
                times[name].append(elapsed)
    bare, whole = (statistics.median(times[name]) for name in ("products", "fused"))
    operations = 2 * tokens * vocabulary * (3 * width + teacher_width)
    return {
        "vocabulary": vocabulary,
        "products_milliseconds": bare,
        "products_teraflops": operations / bare / 1e9,
        "fused_milliseconds": whole,
        "over_products": whole / bare,
    }


# ---- the table -----------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--vocabularies", type=numbers, default=[32000, 152064])
    parser.add_argument("--hidden", type=numbers, default=[2048, 4096], help="student's, teacher's")
    parser.add_argument("--head-chunk-tokens", type=int, default=2048)
    parser.add_argument("--sets", type=int, default=2, help="inputs to alternate between")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path, help="write the table there as JSON")
    return parser.parse_args(argv)


def show(rows: list[Row]) -> None:
    columns = ("milliseconds", "over_floor", "naive_over_it", "extra_copies")
    print(f"{'version':<18}{'ms':>10}{'x floor':>10}{'naive / it':>12}{'copies':>9}")
    for row in rows:
        if row["milliseconds"] is None:
            print(f"{row['version']:<18}  out of memory")
            continue
        ms, floor, naive, copies = (row.get(column) for column in columns)
        print(
            f"{row['version']:<18}{ms:>10.3f}"
            + (f"{floor:>10.2f}" if floor else f"{'':>10}")
            + (f"{naive:>12.2f}" if naive else f"{'':>12}")
            + f"{copies:>9.3f}"
        )


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not torch.cuda.is_available():
        print(
            "loss_gpu: no CUDA device here; it measures on one alone (loss: on the CPU)",
            file=sys.stderr,
        )
        sys.exit(2)
    torch.manual_seed(0)
    device, bandwidth = torch.cuda.get_device_name(), copy_bandwidth(args.repeats)
    print(f"{device}, torch {torch.__version__}: a copy moves {bandwidth / 1e12:.2f} TB/s")
    results: dict[str, Any] = {"device": device, "torch": torch.__version__, "tokens": args.tokens}
    results |= {"copy_bytes_per_second": bandwidth, "rows": [], "heads": []}
    for vocabulary in args.vocabularies:
        rows = measure_losses(args, vocabulary, bandwidth)
        head = measure_head(args, vocabulary)
        results["rows"] += rows
        results["heads"].append(head)
        print(f"\n{args.tokens} tokens x {vocabulary}, bfloat16, forward and backward")
        show(rows)
        print(
            f"fused head, hidden {args.hidden}: {head['fused_milliseconds']:.2f} ms, "
            f"{head['over_products']:.2f} x its four matrix products "
            f"({head['products_teraflops']:.0f} TFLOP/s)"
        )
        write_json(args.json, results)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

"""Time and peak memory of the losses, forward and backward, beside other ways to compute them.

    python tests/benchmarks/loss.py [--tokens 2048] [--vocabulary 32000] [--dtype bfloat16] ...

`naive` is what one writes first: softmax, log_softmax, multiply and sum under autograd; `compiled`
the same through torch.compile; `modelopt` NVIDIA ModelOpt's LogitsKLLoss, in its tensor-parallel
branch over a group of one rank, given TAID's target (where nvidia-modelopt is installed). `torch`,
`native` and `fused head` are this project's. The other losses are compared with their definitions
in losses/reference.py, and the fused head with two heads and the naive loss.

Times are CPU-seconds, medians of interleaved runs in one process, so that a busy machine slows all
alike. Memory is the peak resident size of a fresh process per version, over what it held with its
inputs, in copies of the student's logits. Only the ratios carry over to another machine.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measure import MIB, peak_bytes, write_json
from torch import Tensor

from taid_megatron.losses import distillation_loss, reference
from taid_megatron.losses.fused_head import fused_distillation_loss

T = 0.4
WARMUP_TOKENS = 4
WIDTHS = (256, 512)
"""Hidden sizes of student and teacher for the fused head."""

Inputs = dict[str, Tensor]


# ---- what is compared ----------------------------------------------------------------------------


def naive_taid(student: Tensor, teacher: Tensor, t: float = T) -> Tensor:
    """What one writes first: softmax, log_softmax, multiply, sum."""
    mixed = torch.lerp(student.detach().float(), teacher.float(), t)
    target = mixed.softmax(-1)
    return (target * (mixed.log_softmax(-1) - student.float().log_softmax(-1))).sum(-1)


def naive(inputs: Inputs) -> Tensor:
    return naive_taid(inputs["student"], inputs["teacher"])


@cache
def _compiled() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(naive_taid)


def compiled(inputs: Inputs) -> Tensor:
    return _compiled()(inputs["student"], inputs["teacher"])


@cache
def _modelopt() -> Callable[[Tensor, Tensor], Any]:
    from megatron.core import parallel_state
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    # The one group it asks for. Megatron's own set-up would need the CPU engine, which keeps freed
    # memory and so would change what the others here are measured with.
    parallel_state._TENSOR_MODEL_PARALLEL_GROUP = torch.distributed.group.WORLD
    return LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=2, sequence_parallel=False))


def modelopt(inputs: Inputs) -> Tensor:
    student = inputs["student"].unsqueeze(1)
    with torch.no_grad():
        target = torch.lerp(student.float(), inputs["teacher"].unsqueeze(1).float(), T)
    return _modelopt()(student, target)[0]


def ours(name: str, kernel: str, inplace: bool, inputs: Inputs) -> Tensor:
    options = {"taid": {"t": T}, "ctkd": {"temperature": 2.0}}.get(name, {})
    return distillation_loss(
        *(name, inputs["student"], inputs["teacher"]),
        labels=inputs["labels"] if name == "dkd" else None,
        kernel=kernel,
        inplace=inplace,
        **options,
    )


DEFINITIONS: dict[str, Callable[[Inputs], Tensor]] = {
    "forward_kl": lambda x: reference.forward_kl(x["student"], x["teacher"]),
    "reverse_kl": lambda x: reference.reverse_kl(x["student"], x["teacher"]),
    "tvd": lambda x: reference.tvd(x["student"], x["teacher"]),
    "gjs": lambda x: reference.gjs(x["student"], x["teacher"], 0.1),
    "skew_kl": lambda x: reference.skew_kl(x["student"], x["teacher"], 0.1),
    "skew_reverse_kl": lambda x: reference.skew_reverse_kl(x["student"], x["teacher"], 0.1),
    "adaptive_kl": lambda x: reference.adaptive_kl(x["student"], x["teacher"], 0.5),
    "dkd": lambda x: reference.dkd(x["student"], x["teacher"], x["labels"], 1.0, 8.0, 4.0),
    "ctkd": lambda x: reference.ctkd(x["student"], x["teacher"], 2.0),
}


def heads_apart(inputs: Inputs) -> Tensor:
    logits = [inputs[f"{model}_hidden"] @ inputs[f"{model}_weight"].t() for model in MODELS]
    return naive_taid(*logits)


def heads_fused(inputs: Inputs) -> Tensor:
    heads = [inputs[f"{model}_{part}"] for model in MODELS for part in ("hidden", "weight")]
    mask = torch.ones(len(heads[0]))
    total, _ = fused_distillation_loss("taid", *heads, loss_mask=mask, t=T, head_chunk_tokens=256)
    return total


MODELS = ("student", "teacher")


@dataclass(frozen=True)
class Version:
    """A way to compute something, and the name of the one it is compared with."""

    run: Callable[[Inputs], Tensor]
    against: str


def versions() -> dict[str, Version]:
    """By name, the baselines before what is compared with them."""
    found = {"naive": Version(naive, "naive"), "compiled": Version(compiled, "naive")}
    if find_spec("modelopt"):
        found["modelopt"] = Version(modelopt, "naive")
    for kernel in ("torch", "native"):
        found[f"{kernel}"] = Version(partial(ours, "taid", kernel, False), "naive")
        found[f"{kernel} inplace"] = Version(partial(ours, "taid", kernel, True), "naive")
    for name, definition in DEFINITIONS.items():
        found[f"{name} defined"] = Version(definition, f"{name} defined")
        found[f"{name} inplace"] = Version(partial(ours, name, "auto", True), f"{name} defined")
    found["heads apart"] = Version(heads_apart, "heads apart")
    found["fused head"] = Version(heads_fused, "heads apart")
    return found


# ---- inputs --------------------------------------------------------------------------------------


def make_inputs(name: str, tokens: int, vocabulary: int, dtype: torch.dtype) -> Inputs:
    """Normal logits of scale 3, written in place: no temporary raises the memory's baseline."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, std: float) -> Tensor:
        return torch.empty(size, dtype=dtype).normal_(std=std, generator=generator)

    if "head" not in name:
        logits = {model: normal(tokens, vocabulary, std=3.0) for model in MODELS}
        labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
        logits["student"].requires_grad_()
        return {**logits, "labels": labels}
    heads: Inputs = {}
    for model, width in zip(MODELS, WIDTHS, strict=True):
        heads[f"{model}_hidden"] = normal(tokens, width, std=1.0)
        heads[f"{model}_weight"] = normal(vocabulary, width, std=3.0 / width**0.5)
    for part in ("hidden", "weight"):
        heads[f"student_{part}"].requires_grad_()
    # where Megatron keeps the weight's gradient; the baseline of both
    heads["student_weight"].main_grad = torch.zeros(vocabulary, WIDTHS[0])
    return heads


def run_once(version: Callable[[Inputs], Tensor], inputs: Inputs) -> None:
    for x in inputs.values():
        x.grad = None
    version(inputs).sum().backward()
    weight = inputs.get("student_weight")
    if weight is not None and not getattr(weight, "grad_added_to_main_grad", False):
        weight.main_grad.add_(weight.grad)  # as Megatron's hook does


# ---- measuring -----------------------------------------------------------------------------------


def time_versions(args: argparse.Namespace, names: list[str]) -> dict[str, list[float]]:
    """CPU-seconds of one forward and backward, per version, interleaved."""
    every = versions()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    inputs = make_inputs(names[0], args.tokens, args.vocabulary, args.dtype)
    source = {name: x.detach().clone() for name, x in inputs.items()}
    for repeat in range(args.repeats + 1):
        for name in names:
            for key, x in inputs.items():
                with torch.no_grad():
                    x.copy_(source[key])  # the last version may have overwritten it
                x.grad_added_to_main_grad = False
            start = time.process_time()
            run_once(every[name].run, inputs)
            if repeat > 0:
                seconds[name].append(time.process_time() - start)
    return seconds


def measure_memory(name: str, args: argparse.Namespace) -> float:
    """Peak memory of this process during one run of a version, in copies of the logits."""
    version = versions()[name].run
    inputs = make_inputs(name, args.tokens, args.vocabulary, args.dtype)
    # Loads libraries and starts threads without memory of the logits' size.
    run_once(version, make_inputs(name, WARMUP_TOKENS, 64, args.dtype))
    before = peak_bytes(reset=True)
    run_once(version, inputs)
    return (peak_bytes() - before) / (args.tokens * args.vocabulary * args.dtype.itemsize)


def memory_in_fresh_process(name: str, args: argparse.Namespace) -> float:
    command = [sys.executable, "-W", "ignore", __file__, "--memory-of", name]
    command += ["--tokens", str(args.tokens), "--vocabulary", str(args.vocabulary)]
    command += ["--dtype", str(args.dtype).split(".")[-1], "--threads", str(args.threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per version."""
    every = versions()
    groups: dict[str, list[str]] = {}
    for name, version in every.items():
        if args.only and not any(part in name for part in args.only.split(",")):
            continue
        groups.setdefault(version.against, []).append(name)
    rows = []
    for baseline, names in groups.items():
        seconds = time_versions(args, names)
        for name in names:
            pairs = zip(seconds[name], seconds[baseline], strict=True)
            rows.append(
                {
                    "version": name,
                    "against": baseline,
                    "cpu_seconds": statistics.median(seconds[name]),
                    "time_ratio": statistics.median(own / other for own, other in pairs),
                    "extra_copies": memory_in_fresh_process(name, args),
                }
            )
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", help="parts of the names of the versions wanted, with commas")
    parser.add_argument("--json", type=Path, help="write the table there as JSON")
    parser.add_argument("--memory-of", metavar="VERSION", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(measure_memory(args.memory_of, args))
        return
    rows = measure(args)
    copy = args.tokens * args.vocabulary * args.dtype.itemsize / MIB
    print(
        f"{args.tokens} tokens x {args.vocabulary}, {args.dtype}, {args.threads} threads; "
        f"one copy of the logits is {copy:.0f} MiB"
    )
    print(f"{'version':<26}{'CPU-seconds':>12}{'ratio':>8}  {'of':<26}{'extra copies':>13}")
    for row in rows:
        print(
            f"{row['version']:<26}{row['cpu_seconds']:>12.3f}{row['time_ratio']:>8.2f}  "
            f"{row['against']:<26}{row['extra_copies']:>13.2f}"
        )
    settings = {"tokens": args.tokens, "vocabulary": args.vocabulary, "dtype": str(args.dtype)}
    settings |= {"threads": args.threads, "torch": torch.__version__}
    write_json(args.json, {**settings, "rows": rows})


if __name__ == "__main__":
    main()

"""Time and memory of attention, forward and backward, beside megatron-core's own.

    python tests/benchmarks/attention.py [--seq-length 512,1024] [--groups 2] [--json FILE]

Compared is TorchAttention with megatron-core's DotProductAttention and a dense causal mask, the
attention of its layers where Transformer Engine is missing. Times are medians of interleaved runs,
so that a busy machine slows both alike. `kept` is what one layer leaves for its backward, `peak`
the most that forward and backward together hold beyond their inputs; both in MiB. Only the ratios
carry over to another machine.
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
from typing import Any

import torch
from torch import Tensor

from taid_megatron.runtime import cpu_engine, log

VERSIONS = ("megatron", "torch", "torch, documents")
MIB = 2**20


class _OneRank:
    """The tensor-parallel group of a single process, as far as attention asks it."""

    def size(self) -> int:
        return 1


def make_attention(name: str, args: argparse.Namespace, seq_length: int) -> Callable[..., Tensor]:
    """One version as a function of query, key and value."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from taid_megatron.models.attention import TorchAttention

    config = TransformerConfig(
        num_layers=1,
        hidden_size=args.heads * args.channels,
        num_attention_heads=args.heads,
        num_query_groups=args.groups,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        bf16=args.dtype is torch.bfloat16,
        params_dtype=args.dtype,
    )
    groups = ProcessGroupCollection()
    groups.tp = _OneRank()
    arguments: dict[str, Any] = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
    if name == "megatron":
        parallel_state.destroy_global_memory_buffer()
        parallel_state._set_global_memory_buffer()
        model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
        attention = DotProductAttention(config, 1, pg_collection=groups, **arguments)
        ones = torch.ones(1, 1, seq_length, seq_length, dtype=torch.bool, device=args.device)
        mask = ones.triu(1)  # True: not seen
    else:
        attention = TorchAttention(config, 1, pg_collection=groups, **arguments)
        mask = None
        if name == "torch, documents":
            ids = torch.arange(seq_length, device=args.device) // (seq_length // 4)
            mask = ids.expand(args.batch, -1)
    return lambda query, key, value: attention(query, key, value, mask)


def make_inputs(args: argparse.Namespace, seq_length: int) -> list[Tensor]:
    """Query, key, value [S, b, heads or groups, channels], and the output's gradient."""
    torch.manual_seed(0)
    shapes = [(seq_length, args.batch, n, args.channels) for n in (args.heads, *2 * [args.groups])]
    inputs = [torch.randn(s, dtype=args.dtype, device=args.device) for s in shapes]
    gradient = torch.randn_like(inputs[0]).flatten(2)
    return [*(part.requires_grad_() for part in inputs), gradient]


def run_once(attention: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    *parts, gradient = inputs
    torch.autograd.grad(attention(*parts), parts, gradient)
    if gradient.is_cuda:
        torch.cuda.synchronize()


def kept_bytes(attention: Callable[..., Tensor], inputs: list[Tensor]) -> int:
    """What one forward leaves for its backward, its inputs not counted."""
    own = {part.untyped_storage().data_ptr() for part in inputs}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention(*inputs[:3])
    return sum(kept.values())


def time_versions(args: argparse.Namespace, seq_length: int) -> dict[str, float]:
    """Median seconds of one forward and backward, per version."""
    inputs = make_inputs(args, seq_length)
    attentions = {name: make_attention(name, args, seq_length) for name in VERSIONS}
    seconds: dict[str, list[float]] = {name: [] for name in VERSIONS}
    for repeat in range(args.repeats + 1):
        for name, attention in attentions.items():
            start = time.perf_counter()
            run_once(attention, inputs)
            if repeat > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_memory(name: str, args: argparse.Namespace, seq_length: int) -> tuple[float, float]:
    """Kept and peak MiB of one version, in this fresh process."""
    warm_up = 16  # loads libraries and starts threads without memory of the scores' size
    run_once(make_attention(name, args, warm_up), make_inputs(args, warm_up))
    attention, inputs = make_attention(name, args, seq_length), make_inputs(args, seq_length)
    before = peak_bytes(args, reset=True)
    run_once(attention, inputs)
    peak = peak_bytes(args) - before
    return kept_bytes(attention, inputs) / MIB, peak / MIB


def peak_bytes(args: argparse.Namespace, reset: bool = False) -> int:
    """The most held since the last reset: by torch on a GPU, by this process on a CPU (Linux)."""
    if args.device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def memory_in_fresh_process(
    name: str, args: argparse.Namespace, seq_length: int
) -> tuple[float, float]:
    command = [sys.executable, __file__, "--memory-of", name, "--seq-length", str(seq_length)]
    for option in ("batch", "heads", "groups", "channels", "threads"):
        command += [f"--{option}", str(getattr(args, option))]
    command += ["--dtype", str(args.dtype).removeprefix("torch.")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kept, peak = json.loads(printed.splitlines()[-1])
    return kept, peak


def measure(args: argparse.Namespace, seq_length: int) -> list[dict[str, Any]]:
    """A row per version, with its ratios to megatron-core's attention."""
    seconds = time_versions(args, seq_length)
    memory = {name: memory_in_fresh_process(name, args, seq_length) for name in VERSIONS}
    baseline = (seconds["megatron"], *memory["megatron"])
    rows = []
    for name in VERSIONS:
        values = (seconds[name], *memory[name])
        row: dict[str, Any] = {"seq_length": seq_length, "version": name}
        row |= zip(("seconds", "kept_mib", "peak_mib"), values, strict=True)
        ratios = [value / base for value, base in zip(values, baseline, strict=True)]
        row |= zip(("time_ratio", "kept_ratio", "peak_ratio"), ratios, strict=True)
        rows.append(row)
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    lengths = {"type": lambda text: [int(part) for part in text.split(",")], "default": [512, 1024]}
    parser.add_argument("--seq-length", help="one or more, with commas", **lengths)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the table there as JSON")
    parser.add_argument("--memory-of", metavar="VERSION", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    log.quiet_megatron()
    cpu_engine.install()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(measure_memory(args.memory_of, args, args.seq_length[0])))
        return
    rows = [row for seq_length in args.seq_length for row in measure(args, seq_length)]
    shape = f"b {args.batch}, {args.heads} heads, {args.groups} groups, {args.channels} channels"
    print(f"{shape}, {args.dtype}, {args.device.type}, {args.threads} threads")
    print(f"{'S':>6}  {'version':<18}{'seconds':>9}{'ratio':>7}", end="")
    print(f"{'kept':>9}{'ratio':>7}{'peak':>9}{'ratio':>7}")
    for row in rows:
        print(
            f"{row['seq_length']:>6}  {row['version']:<18}"
            f"{row['seconds']:>9.4f}{row['time_ratio']:>7.2f}"
            f"{row['kept_mib']:>9.1f}{row['kept_ratio']:>7.2f}"
            f"{row['peak_mib']:>9.1f}{row['peak_ratio']:>7.2f}"
        )
    if args.json:
        names = ("batch", "heads", "groups", "channels", "threads")
        settings = {name: getattr(args, name) for name in names}
        settings |= {"dtype": str(args.dtype), "device": args.device.type}
        args.json.write_text(
            json.dumps({**settings, "torch": torch.__version__, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()

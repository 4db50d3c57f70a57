"""One optimizer step of the pair, beside the same step by plain transformers models.

    python tests/benchmarks/pair.py [--repeats 15] [--batch 8] [--seq-length 256] ... [--json FILE]

A step is the forward of the teacher and of the student, TAID, backward, gradient clipping, AdamW
and the update of t, in fp32 in one process. `transformers` is what one writes first:
LlamaForCausalLM with torch's attention, softmax, log_softmax, multiply and sum under autograd, the
teacher without gradient, torch's fused AdamW. The CPU engine of `taid-megatron` lets the C library
keep freed memory; `transformers, memory kept` does so too. `taid-megatron` is the trainer's own
step, its data loader included, on a world of one rank: once with every step logged (the default,
which measures KL and cross-entropy as well), once with none.

All versions start from the same weights and see the same tokens; a run whose losses differ fails.
Each lives in a process of its own, so that none slows another. They take turns, and a ratio is that
of one turn's CPU-seconds to `transformers`' of the same round. Memory is the peak resident size of
those processes over what they held when the models were built, gradient buffers not counted as
held. Only the ratios carry over to another machine.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import yaml
from loss import naive_taid
from measure import MIB, peak_bytes, write_json
from torch import Tensor

BASELINE = "transformers"
# Forked after the imports, the processes start at once; nothing has run before.
FORK = multiprocessing.get_context("fork")
SEED = 1
WARM_UP_STEPS = 3
CLIP = 1.0
# Sums run in another order in each version, and after some steps the weights differ as well.
LOSS_TOLERANCE = 1e-3

Step = Callable[[], float | None]
"""Does one optimizer step; its loss, None where it was not logged."""
Weights = dict[str, Tensor]


# ---- what all versions share ---------------------------------------------------------------------


def architectures(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Student and teacher, as the configuration of taid-megatron names their sizes."""
    return {
        role: {
            "vocab_size": args.vocabulary,
            "num_layers": layers,
            "hidden_size": width,
            "num_attention_heads": args.heads,
            "num_query_groups": args.groups,
            "ffn_hidden_size": 2 * width,
        }
        for role, (layers, width) in {"student": args.student, "teacher": args.teacher}.items()
    }


def write_config(args: argparse.Namespace, folder: Path, steps: int) -> None:
    """A run of so many steps in `folder`, on tokens drawn at random."""
    from data_tools.indexed_writer import IndexedWriter

    generator = torch.Generator().manual_seed(SEED)
    with IndexedWriter(folder / "tokens", vocab_size=args.vocabulary) as writer:
        for number in range(2 * args.batch):
            tokens = torch.randint(1, args.vocabulary, (args.seq_length,), generator=generator)
            writer.add_document(tokens.numpy(), name=str(number))
        writer.finish()
    shapes = architectures(args)
    config = {
        "run": {"folder": str(folder / "run"), "seed": SEED},
        "student": {"architecture": shapes["student"]},
        # logits of a spread that makes the loss worth lowering
        "teacher": {"architecture": {**shapes["teacher"], "init_method_std": 0.1}},
        "training": {
            "micro_batch_size": args.batch,
            "global_batch_size": args.batch,
            "seq_length": args.seq_length,
            "steps": steps,
            "precision": "fp32",
        },
        "optimizer": {"lr": 1e-3, "decay": "constant", "clip_grad": CLIP},
        "data": {"blend": str(folder / "tokens"), "eod_id": 0},
        "logging": {"tensorboard": False, "progress": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def work(connection: Connection, version: str, args: argparse.Namespace, folder: Path) -> None:
    """A version's process: builds it, then does as many steps as it is told, as long as it is."""
    torch.set_num_threads(args.threads)
    step, built = VERSIONS[version](folder)
    gc.collect()
    gc.disable()  # as the trainer does
    before = peak_bytes(reset=True) - built
    while True:
        count = connection.recv()
        start = time.process_time()
        losses = [step() for _ in range(count)]
        seconds = (time.process_time() - start) / count
        connection.send((seconds, losses, (peak_bytes() - before) / MIB))


# ---- taid-megatron -------------------------------------------------------------------------------


def prepare(args: argparse.Namespace, folder: Path, steps: int) -> None:
    """Write what all versions start from: a configuration, its weights, and the tokens it reads."""
    from taid_megatron.training.setup import build_batches

    write_config(args, folder, steps)
    trainer = build_trainer(folder)
    (pair,) = trainer.pairs
    shapes = architectures(args)
    for role, stage in {"student": pair.student, "teacher": pair.teacher}.items():
        weights = as_llama(dict(stage.named_parameters()), shapes[role])
        torch.save(weights, folder / f"{role}.pt")
    batches, _ = build_batches(trainer)
    with batches:
        tokens = [batches.step(args.batch)[0]["tokens"] for _ in range(steps)]
    torch.save(torch.stack(tokens), folder / "tokens.pt")


def build_trainer(folder: Path, *overrides: str) -> Any:
    """The parts of a run, as the `train` command builds them."""
    from taid_megatron.runtime import log

    log.quiet_megatron()
    from taid_megatron.config.load import load
    from taid_megatron.runtime import distributed
    from taid_megatron.training import setup

    config = load(folder / "config.yaml", overrides)
    world = distributed.start(config.parallel, config.run.seed)
    return setup.build_trainer(config, world, distributed.abilities())


def build_ours(folder: Path, *overrides: str) -> tuple[Step, int]:
    """The trainer's step, and the bytes of the gradients that it holds from the start."""
    from taid_megatron.training import loop, setup

    trainer = build_trainer(folder, *overrides)
    batches, _ = setup.build_batches(trainer)

    def step() -> float | None:
        return loop._optimizer_step(trainer, batches).get("loss")

    buffers = [buffer for stage in trainer.stages for buffer in stage.buffers]
    return step, sum(buffer.grad_data.nbytes for buffer in buffers)


def build_ours_unlogged(folder: Path) -> tuple[Step, int]:
    """As build_ours, no step of it logged."""
    return build_ours(folder, "logging.every=1000000")


# ---- transformers --------------------------------------------------------------------------------


def build_plain(folder: Path) -> tuple[Step, int]:
    """The same step as one writes it first; of its gradients nothing is held from the start."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from taid_megatron.config.load import load
    from taid_megatron.schedules import TAIDSchedule

    config = load(folder / "config.yaml")

    def load_model(role: str) -> torch.nn.Module:
        shape = getattr(config, role).architecture
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.vocab_size,
                num_hidden_layers=shape.num_layers,
                hidden_size=shape.hidden_size,
                num_attention_heads=shape.num_attention_heads,
                num_key_value_heads=shape.query_groups,
                intermediate_size=shape.ffn_width,
                rms_norm_eps=shape.layernorm_epsilon,
                max_position_embeddings=config.training.seq_length,
                tie_word_embeddings=False,
                use_cache=False,
                attn_implementation="sdpa",
            )
        )
        model.load_state_dict(torch.load(folder / f"{role}.pt"))
        return model

    student, teacher = load_model("student").train(), load_model("teacher").eval()
    decayed = [parameter for parameter in student.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in student.parameters() if parameter.dim() == 1]
    settings, taid = config.optimizer, config.taid
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    schedule = TAIDSchedule(taid.t_start, taid.t_end, taid.alpha, taid.beta, config.training.steps)
    batches = iter(torch.load(folder / "tokens.pt"))

    def step() -> float:
        tokens = next(batches)
        optimizer.zero_grad()
        with torch.no_grad():
            target = teacher(tokens).logits
        loss = naive_taid(student(tokens).logits, target, schedule.t).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), settings.clip_grad)
        optimizer.step()
        schedule.update(loss.item())
        return loss.item()

    return step, 0


def build_plain_memory_kept(folder: Path) -> tuple[Step, int]:
    """As build_plain, with the C library told what the CPU engine tells it."""
    from taid_megatron.runtime import cpu_engine

    cpu_engine._keep_freed_memory()
    return build_plain(folder)


def as_llama(weights: Weights, shape: dict[str, Any]) -> Weights:
    """A stage's weights under transformers' names."""
    names = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        "output_layer.weight": "lm_head.weight",
    }
    parts = {
        "input_layernorm": "input_layernorm",
        "self_attention.linear_proj": "self_attn.o_proj",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "mlp.linear_fc2": "mlp.down_proj",
    }
    groups, width = shape["num_query_groups"], shape["hidden_size"]
    channels = width // shape["num_attention_heads"]
    queries = shape["num_attention_heads"] // groups * channels
    found = {}
    for name, weight in weights.items():
        if name in names:
            found[names[name]] = weight[: shape["vocab_size"]]
            continue
        layer, _, part = name.removeprefix("decoder.layers.").removesuffix(".weight").partition(".")
        whole = f"model.layers.{layer}"
        if part == "self_attention.linear_qkv":
            # Megatron keeps each group's queries, key and value together
            grouped = weight.view(groups, queries + 2 * channels, width)
            for letter, rows in zip(
                "qkv", grouped.split([queries, channels, channels], 1), strict=True
            ):
                found[f"{whole}.self_attn.{letter}_proj.weight"] = rows.reshape(-1, width)
        elif part == "mlp.linear_fc1":
            gate, up = weight.chunk(2)
            found |= {f"{whole}.mlp.gate_proj.weight": gate, f"{whole}.mlp.up_proj.weight": up}
        else:
            found[f"{whole}.{parts[part]}.weight"] = weight
    return {name: weight.detach().clone() for name, weight in found.items()}


# ---- the comparison ------------------------------------------------------------------------------

VERSIONS: dict[str, Callable[[Path], tuple[Step, int]]] = {
    BASELINE: build_plain,
    "transformers, memory kept": build_plain_memory_kept,
    "taid-megatron": build_ours,
    "taid-megatron, unlogged": build_ours_unlogged,
}


class Worker:
    """A version in a process of its own. Use as a context manager."""

    def __init__(self, version: str, args: argparse.Namespace, folder: Path) -> None:
        self._connection, self._theirs = FORK.Pipe()
        self._process = FORK.Process(
            target=work, args=(self._theirs, version, args, folder), daemon=True
        )
        self.version = version
        self.cpu_seconds: list[float] = []
        self.losses: list[float | None] = []
        self.peak_mib = 0.0

    def __enter__(self) -> Worker:
        self._process.start()
        self._theirs.close()  # else nobody would notice the end of a process that fails
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.join()

    def run(self, steps: int) -> float:
        """CPU-seconds per step."""
        self._connection.send(steps)
        try:
            seconds, losses, self.peak_mib = self._connection.recv()
        except EOFError:
            raise SystemExit(f"{self.version} has failed, see above") from None
        self.losses += losses
        return seconds


def import_what_is_forked() -> None:
    """Import once what every process needs."""
    from transformers import LlamaForCausalLM  # noqa: F401

    from taid_megatron.training import loop  # noqa: F401


def compare(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row per version, with its ratios to the baseline."""
    import_what_is_forked()
    steps = WARM_UP_STEPS + args.repeats * args.steps + 1
    preparation = FORK.Process(target=prepare, args=(args, folder, steps))
    preparation.start()
    preparation.join()
    if preparation.exitcode != 0:
        raise SystemExit("the preparation failed, see above")
    with ExitStack() as running:
        workers = [running.enter_context(Worker(name, args, folder)) for name in VERSIONS]
        for worker in workers:
            worker.run(WARM_UP_STEPS)
        for repeat in range(args.repeats):
            # each comes first, last and between as often as the others
            for index in range(len(workers)):
                worker = workers[(repeat + index) % len(workers)]
                worker.cpu_seconds.append(worker.run(args.steps))
        for worker in workers:
            worker.run(1)  # the last step is always logged
    baseline = workers[0]
    refuse_other_losses(baseline, workers)
    return [row(worker, baseline) for worker in workers]


def refuse_other_losses(baseline: Worker, workers: list[Worker]) -> None:
    """Stop where a version has computed something else than the baseline."""
    for worker in workers:
        for step, (loss, other) in enumerate(zip(worker.losses, baseline.losses, strict=True), 1):
            if loss is not None and abs(loss - other) > LOSS_TOLERANCE * abs(other):
                raise SystemExit(
                    f"step {step}: loss {loss} of {worker.version}, {other} of {baseline.version}"
                )


def row(worker: Worker, baseline: Worker) -> dict[str, Any]:
    """What was measured of a version."""
    seconds = worker.cpu_seconds
    ratios = [own / other for own, other in zip(seconds, baseline.cpu_seconds, strict=True)]
    return {
        "version": worker.version,
        "cpu_seconds": seconds,
        "cpu_seconds_median": statistics.median(seconds),
        "cpu_seconds_min": min(seconds),
        "cpu_seconds_max": max(seconds),
        "ratio_of_medians": statistics.median(seconds) / statistics.median(baseline.cpu_seconds),
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "peak_mib": worker.peak_mib,
        "peak_ratio": worker.peak_mib / baseline.peak_mib,
        "last_loss": worker.losses[-1],
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def shape(text: str) -> tuple[int, int]:
        layers, width = map(int, text.split("x"))
        return layers, width

    parser.add_argument("--student", type=shape, default=(4, 128), help="layers x width: 4x128")
    parser.add_argument("--teacher", type=shape, default=(6, 256), help="layers x width: 6x256")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2, help="steps per turn")
    parser.add_argument("--json", type=Path, help="write the table there as JSON")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(args, Path(folder))
    sizes = ", ".join(
        "{} {}x{}".format(role, *getattr(args, role)) for role in ("student", "teacher")
    )
    print(f"{sizes}, vocabulary {args.vocabulary}, {args.batch} x {args.seq_length} tokens, fp32")
    print(f"{'CPU-seconds per step':<27}{'median':>8}{'min':>8}{'max':>8}{'ratio':>7}", end="")
    print(f"{'of each pair':>20}{'peak MiB':>10}{'ratio':>7}")
    for r in rows:
        spread = f"{r['ratio']:.2f} ({min(r['ratios']):.2f}-{max(r['ratios']):.2f})"
        print(
            f"{r['version']:<27}{r['cpu_seconds_median']:>8.4f}{r['cpu_seconds_min']:>8.4f}"
            f"{r['cpu_seconds_max']:>8.4f}{r['ratio_of_medians']:>7.2f}{spread:>20}"
            f"{r['peak_mib']:>10.1f}{r['peak_ratio']:>7.2f}"
        )
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    write_json(args.json, {**settings, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()

"""The `taid-megatron` command: parses, calls, prints; no logic.

Exit codes: 0 done; 2 bad arguments, configuration or input, with one line on stderr; 1 an internal
failure, with a traceback; 75 stopped on a signal with a checkpoint saved, to be resumed; 130
interrupted from the keyboard. Commands import what they run when they run: reading a bad
configuration takes no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from taid_megatron import __version__
from taid_megatron.config.errors import UserError
from taid_megatron.config.schema import HFFamily

app = typer.Typer(
    help="Pre-training distillation: teacher and student in one Megatron pipeline.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# typer's parser is click, its own copy or the package, by version: reached by its base class.
_UsageError: Any = typer.BadParameter.__bases__[0]

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="SECTION.KEY=VALUE", help="Settings that replace the file's."),
]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration of a run.")],
    overrides: Overrides = None,
) -> int:
    """Train a student as CONFIG says.

    On several ranks: torchrun --nproc-per-node N -m taid_megatron train CONFIG
    """
    from taid_megatron.config.load import load

    settings = load(config, overrides or ())
    from taid_megatron.training.loop import run

    return run(settings)


@app.command()
def index(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration of a run.")],
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that the run will have.")] = 1,
) -> int:
    """Build the sample index of a run beforehand, on one machine without a GPU."""
    from taid_megatron.config.load import load

    settings = load(config, overrides or ())
    from taid_megatron.training.prebuild import prebuild

    print(f"sample index: {prebuild(settings, ranks)}")
    return 0


@app.command()
def quickstart(
    folder: Annotated[Path, typer.Option(help="Where the run lives.")] = Path("runs/quickstart"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over, do not resume.")] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=20, help="Students per method, for a spread.")
    ] = None,
    long: Annotated[bool, typer.Option("--long", help="About an hour, three seeds.")] = False,
) -> int:
    """Train a teacher on this machine, distil it by several methods, export and report."""
    from dataclasses import replace

    from taid_megatron.quickstart import LONG, Sizes, run

    sizes = LONG if long else Sizes()
    return run(folder=folder, fresh=fresh, sizes=replace(sizes, seeds=seeds or sizes.seeds))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[Path, typer.Option(help="The page; .md and .json go beside it.")] = Path(
        "report.html"
    ),
) -> int:
    """Compare runs: one HTML page, the same table as Markdown and JSON."""
    from taid_megatron.reporting.compare import report as write

    try:
        paths = write(runs, out)
    except ValueError as error:
        raise UserError(str(error)) from error
    for path in paths:
        print(path)
    return 0


@app.command(name="import")
def import_(
    hf: Annotated[str, typer.Option(help="Folder of a Hugging Face model, or a hub name.")],
    out: Annotated[Path, typer.Option(help="The checkpoint's folder.")],
    dtype: Annotated[
        Literal["fp32", "bf16"] | None, typer.Option(help="Of the weights; none: the source's.")
    ] = None,
) -> int:
    """Turn a Hugging Face model into a checkpoint."""
    from taid_megatron.conversion.commands import import_folder

    return import_folder(Path(hf), out, dtype)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A step_* folder, or a run's.")],
    out: Annotated[Path, typer.Option(help="The Hugging Face folder to write.")],
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        typer.Option(help="Of the weights; none: as they are stored."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, such as 5GB.")] = "5GB",
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder, tokenizer.json or .model; none: the one kept with it."),
    ] = None,
    family: Annotated[
        HFFamily | None, typer.Option(help="model_type to write; none: the architecture's.")
    ] = None,
    max_position_embeddings: Annotated[
        int | None, typer.Option(help="Longest sequence; none: the architecture's, or seq_length.")
    ] = None,
) -> int:
    """Turn a checkpoint into a Hugging Face model."""
    from taid_megatron.conversion.commands import export_checkpoint

    return export_checkpoint(
        checkpoint,
        out,
        dtype=dtype,
        max_shard_size=max_shard_size,
        tokenizer=tokenizer,
        family=family,
        max_position_embeddings=max_position_embeddings,
    )


@app.command()
def evaluate(
    model: Annotated[
        Path, typer.Argument(help="A step_* folder, a run's, or a Hugging Face model's.")
    ],
    overrides: Overrides = None,
    last_word: Annotated[
        Path | None, typer.Option(help='JSON lines {"text": ...}: guess the last word.')
    ] = None,
    suite: Annotated[
        list[str] | None, typer.Option(help="Public tasks by lm-eval: leaderboard, smollm.")
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option(help="Folder of lm-eval's task files that --suite may name.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder, tokenizer.json or .model; none: the one kept.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.json and evaluation.md.")
    ] = None,
) -> int:
    """Measure a model: held-out text, its teacher, last words, public suites.

    A run's teacher, held-out data and length are taken from its config.yaml; settings replace them,
    such as teacher.hf=FOLDER data.validation=PREFIX training.seq_length=512 evaluation.samples=256
    parallel.tensor=2.
    """
    from taid_megatron.evaluation.run import evaluate as run

    return run(
        model,
        overrides or (),
        last_word=last_word,
        suites=suite or (),
        tasks=tasks,
        tokenizer=tokenizer,
        out=out,
    )


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration of a run.")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="GPUs of the whole run.")] = 8,
    gpu: Annotated[str, typer.Option(help="Kind of GPU, such as h100.")] = "h100",
    efficiency: Annotated[
        float | None,
        typer.Option(help="Share of the peak rate that matrix products reach; none: 0.45."),
    ] = None,
    balance: Annotated[
        bool, typer.Option("--balance", help="Choose layers per stage for even stages.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Write the timeline.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write tables and timeline.")
    ] = None,
) -> int:
    """Say what CONFIG will need and how long it will take; no GPU is needed.

    taid-megatron plan launch/recipes/taid_phi3_tinyllama.yaml --gpus 80 --gpu h100
    """
    import json

    from taid_megatron.config.load import load
    from taid_megatron.planning import plan as planning

    settings = load(config, overrides or ())
    share = planning.EFFICIENCY if efficiency is None else efficiency
    made = planning.make(settings, world_size=gpus, gpu=gpu, efficiency=share, balance=balance)
    if picture or page:
        from taid_megatron.planning import page as pages

        if picture:
            pages.write(picture, pages.picture(made))
        if page:
            pages.write(page, pages.page(made, f"Plan of {config.name}"))
    if as_json:
        print(json.dumps(made.figures, indent=1))
        return 0
    from taid_megatron.planning.show import show

    show(made.figures)
    return 0


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="YAML configuration of a run.")
    ] = None,
    overrides: Overrides = None,
    network: Annotated[
        bool, typer.Option("--network", help="Time the links between torchrun's ranks.")
    ] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Read a checkpoint, or all of a run's, whole."),
    ] = None,
) -> int:
    """Say whether this machine is ready, and whether what CONFIG needs is there.

    With the network: torchrun --nproc-per-node N -m taid_megatron doctor --network
    """
    from taid_megatron.config.load import load
    from taid_megatron.planning import doctor as examination

    settings = load(config, overrides or ()) if config else None
    findings = examination.checkpoints(checkpoint) if checkpoint else []
    if checkpoint is None or settings is not None:
        findings += examination.examine(settings)
    if network:
        findings += examination.network()
    if os.environ.get("RANK", "0") == "0":
        from taid_megatron.planning.show import show_findings

        show_findings(findings)
    return 0 if examination.passed(findings) else 2


def _print_version(asked: bool) -> None:
    if asked:
        print(f"taid-megatron {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show it.")
    ] = False,
) -> None:
    """Options before the command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. arguments: default sys.argv[1:]."""
    try:
        code = app(arguments, prog_name="taid-megatron", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except _UsageError as error:
        return _refuse(f"{error.format_message().rstrip('.')}; see taid-megatron --help")
    except Exception as error:
        if not _is_mendable(error):
            raise
        return _refuse(str(error))
    return code or 0


def _is_mendable(error: Exception) -> bool:
    """Whether the error is the user's to mend, its text the one line to show."""
    if isinstance(error, UserError):
        return True
    from data_tools.manifest import DataError

    return isinstance(error, DataError)


def _refuse(message: str) -> int:
    # All ranks of a run find the same fault: the first one says it, all of them end.
    if os.environ.get("RANK", "0") == "0":
        print(f"taid-megatron: {' '.join(message.splitlines())}", file=sys.stderr)
    return 2

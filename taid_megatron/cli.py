"""The `taid-megatron` command: parses, calls, prints; no logic.

Exit codes: 0 done; 2 bad arguments, configuration or input, with one line on stderr; 1 an internal
failure, with a traceback; 75 stopped on a signal with a checkpoint saved, to be resumed; 130
interrupted from the keyboard. Commands import what they run when they run: reading a bad
configuration takes no torch.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from taid_megatron import __version__
from taid_megatron.config.errors import UserError
from taid_megatron.config.schema import HFFamily
from taid_megatron.config.secrets import hidden
from taid_megatron.manual import OVERVIEW, examples
from taid_megatron.runtime.refusal import tell_launcher

app = typer.Typer(
    help="Pre-training distillation: teacher and student in one Megatron pipeline.",
    epilog=OVERVIEW,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# typer's parser is click, its own copy or the package, by version: reached by its base class.
_UsageError: Any = typer.BadParameter.__bases__[0]


def _keys(incomplete: str) -> list[str]:
    """For shell completion: the configuration's keys that go on like this."""
    from taid_megatron.config.explain import dotted_keys
    from taid_megatron.config.schema import Config

    return [f"{key}=" for key in dotted_keys(Config) if key.startswith(incomplete)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SECTION.KEY=VALUE",
        help="Settings that replace the file's.",
        autocompletion=_keys,
    ),
]


@app.command(epilog=examples("train"))
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration of a run.")],
    overrides: Overrides = None,
) -> int:
    """Train a student as CONFIG says.

    Everything is checked before anything is built. The run goes into run.folder: config.yaml,
    metrics.jsonl, tensorboard/, checkpoints/. The same command goes on from the newest checkpoint
    there, also on another layout or number of ranks. Without CUDA it runs on the CPU over gloo.
    """
    from taid_megatron.config.load import load

    settings = load(config, overrides or ())
    from taid_megatron.training.loop import run

    return run(settings)


@app.command(epilog=examples("index"))
def index(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration of a run.")],
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that the run will have.")] = 1,
) -> int:
    """Build a run's sample index beforehand, without a GPU.

    Else the first rank builds it at the start of the run, while the GPUs wait: minutes for large
    corpora. The index goes into data.cache, or into the run's folder.
    """
    from taid_megatron.config.load import load

    settings = load(config, overrides or ())
    from taid_megatron.training.prebuild import prebuild

    print(f"sample index: {prebuild(settings, ranks)}")
    return 0


@app.command(epilog=examples("quickstart"))
def quickstart(
    folder: Annotated[Path, typer.Option(help="Where the run lives.")] = Path("runs/quickstart"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over, do not resume.")] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=20, help="Students per method, for a spread.")
    ] = None,
    long: Annotated[bool, typer.Option("--long", help="About an hour, three seeds.")] = False,
) -> int:
    """See all of it in small on this machine.

    Collects text, trains a tokenizer and a teacher, distils students by four methods, compares two
    layouts, evaluates, exports to Hugging Face's format, and writes report.html. It needs neither a
    GPU nor a network, and takes some ten minutes on two cores. A second call goes on from what is
    there.
    """
    from dataclasses import replace

    from taid_megatron.quickstart import LONG, Sizes, run

    sizes = LONG if long else Sizes()
    return run(folder=folder, fresh=fresh, sizes=replace(sizes, seeds=seeds or sizes.seeds))


@app.command(epilog=examples("report"))
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders.")],
    out: Annotated[Path, typer.Option(help="The page; .md and .json go beside it.")] = Path(
        "report.html"
    ),
) -> int:
    """Compare runs by what they logged.

    Writes one HTML page that needs no network: last figures side by side, loss, KL, t beside its
    straight line, learning rate, gradient norm, held-out curves, mass on the teacher's head and
    tail where a run was evaluated, throughput, skipped steps, restarts. The table goes beside it as
    .md and .json. Runs may still be running.
    """
    from taid_megatron.reporting.compare import report as write

    try:
        paths = write(runs, out)
    except ValueError as error:
        raise UserError(str(error)) from error
    for path in paths:
        print(path)
    return 0


@app.command(name="import", epilog=examples("import"))
def import_(
    hf: Annotated[str, typer.Option(help="Folder of a Hugging Face model, or a hub name.")],
    out: Annotated[Path, typer.Option(help="The checkpoint's folder.")],
    dtype: Annotated[
        Literal["fp32", "bf16"] | None, typer.Option(help="Of the weights; none: the source's.")
    ] = None,
) -> int:
    """Turn a Hugging Face model into a checkpoint.

    Not needed for training: student.hf and teacher.hf read the folder as it is. Under torchrun the
    ranks share the layers.
    """
    from taid_megatron.conversion.commands import import_folder

    return import_folder(Path(hf), out, dtype)


@app.command(epilog=examples("export"))
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
    """Turn a checkpoint into a Hugging Face model.

    Writes weights, config.json, generation_config.json and a tokenizer.json; the folder appears
    under its name when it is complete. Under torchrun the ranks share the files.
    """
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


@app.command(epilog=examples("evaluate"))
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
    """Measure a model on held-out text and tasks.

    Perplexity, KL to the teacher, agreement, mass on the teacher's head and tail, last words, and
    public suites by lm-eval.

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


@app.command(epilog=examples("plan"))
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
    """Say what a run will need, and how long it takes.

    Needs neither a GPU nor the models' weights. Refuses what cannot run; prints parameters per
    stage of both models, memory per GPU by part, time and traffic of a step, days for the run, and
    the best layouts, each with the reason why it is not the first. Times are computed from the
    GPU's peak rates and an assumed share of them.
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


@app.command(epilog=examples("doctor"))
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
    """Say whether this machine is ready for a run.

    Versions, GPUs, compiler, limits, ports; with CONFIG also its values, data, tokenizers, teacher
    and disk. What failed comes with its mend. Exit code 0: nothing is missing. --network, under
    torchrun, times the links between the ranks.
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
    if examination.passed(findings):
        return 0
    tell_launcher(examination.summary(findings))
    return 2


def _print_version(asked: bool) -> None:
    if asked:
        from taid_megatron.planning.stack import versions

        for name, version in (("taid-megatron", __version__), *versions()):
            print(f"{name:<20}{version}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Versions of all parts."
        ),
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
        return _refuse(_usage(error))
    except Exception as error:
        if not _is_mendable(error):
            print(hidden(traceback.format_exc()), end="", file=sys.stderr)
            return 1
        return _refuse(str(error))
    return code or 0


def _usage(error: Any) -> str:
    """What is wrong with the command line, what may have been meant, and where to read on."""
    text = error.message or error.format_message()
    near = getattr(error, "possibilities", None)
    if near and "mean" not in text:
        text = f"{text}. Did you mean {' or '.join(sorted(near))}?"
    command = getattr(error.ctx, "command_path", "taid-megatron")
    return f"{text.rstrip('.')}{'' if text.endswith('?') else ';'} see {command} --help"


def _is_mendable(error: Exception) -> bool:
    """Whether the error is the user's to mend, its text the one line to show."""
    if isinstance(error, UserError):
        return True
    from data_tools.manifest import DataError

    return isinstance(error, DataError)


def _refuse(message: str) -> int:
    # All ranks of a run find the same fault: the first one says it, all of them end.
    line = hidden(" ".join(message.splitlines()))
    if os.environ.get("RANK", "0") == "0":
        print(f"taid-megatron: {line}", file=sys.stderr)
    tell_launcher(line)
    return 2

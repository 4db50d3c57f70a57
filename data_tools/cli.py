"""The `taid-data` command: parses, calls, prints; no logic.

Exit codes: 0 done; 2 bad arguments or input, with one line on stderr; 1 an internal failure; 130
interrupted by Ctrl-C. Commands import what they run when they run.
"""

from __future__ import annotations

import errno
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from data_tools.manifest import DataError
from data_tools.manual import OVERVIEW, examples

app = typer.Typer(
    help="Prepare, check and look at token files for training.",
    epilog=OVERVIEW,
    rich_markup_mode=None,
)

Inputs = Annotated[
    list[str],
    typer.Argument(
        help="Files, folders, globs or hf://datasets/OWNER/NAME: text, .jsonl (.gz, .zst), "
        ".parquet, .arrow."
    ),
]
TextColumn = Annotated[str, typer.Option(help="Column that holds the text.")]
Prefix = Annotated[Path, typer.Argument(help="The files' common path, without .bin or .idx.")]
TokenizerFile = Annotated[
    Path, typer.Option(help="A sentencepiece .model, a tokenizer.json or a .tiktoken rank file.")
]
EodToken = Annotated[
    str | None, typer.Option(help="End-of-document token, where the tokenizer names none.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

# typer's parser is click, its own copy or the package, by version: reached by its base class.
_UsageError: Any = typer.BadParameter.__bases__[0]
_WRONG_PATH = {
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
}
_MOST_MEGABYTES = 1 << 20
_INTERRUPTED = 130  # the shell's code for Ctrl-C
_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def _print_version(asked: bool) -> None:
    if asked:
        from data_tools.prepare import versions

        for name, version in versions().items():
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


@app.command("prepare", epilog=examples("prepare"))
def prepare_command(
    inputs: Inputs,
    tokenizer: TokenizerFile,
    out: Annotated[Path, typer.Option(help="Prefix of the files to write; a preset's folder.")],
    text_column: TextColumn = "text",
    no_eod: Annotated[
        bool, typer.Option("--no-eod", help="Do not end documents with the end-of-document id.")
    ] = False,
    eod_token: EodToken = None,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Special tokens written in a text become ids.")
    ] = False,
    engine: Annotated[
        str,
        typer.Option(help="auto: tiktoken where it gives the same ids; tokenizers; tiktoken."),
    ] = "auto",
    workers: Annotated[
        int, typer.Option(min=0, help="Processes; 0: one per CPU. The bytes are the same.")
    ] = 0,
    on_error: Annotated[
        str, typer.Option(help="stop at the first bad row, or skip, count and list bad rows.")
    ] = "stop",
    max_document_mb: Annotated[
        float, typer.Option(min=0.001, help="A longer document is a bad row. MiB.")
    ] = 32.0,
    fraction: Annotated[
        float | None, typer.Option(help="The first share of the inputs, 0.1 for a tenth.")
    ] = None,
    token_budget: Annotated[
        str | None, typer.Option(help="Stop after so many tokens: 500M, 20B.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="i/n: this machine's part of the work; merge them later.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="smollm-corpus: INPUTS are its folders, OUT a folder.")
    ] = None,
    weight: Annotated[
        list[str] | None, typer.Option(help="PART=WEIGHT of a preset; none given: by size.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop what an unfinished run has left.")
    ] = False,
    log: Annotated[Path | None, typer.Option(help="File that gets lines of progress.")] = None,
    as_json: AsJson = False,
) -> None:
    """Turn texts into token files.

    Writes OUT.bin, OUT.idx and OUT.manifest.json. Goes on where it was stopped.
    """
    from data_tools.display import progress_display, report
    from data_tools.prepare import Settings, prepare
    from data_tools.presets import prepare_preset

    if on_error not in ("stop", "skip"):
        raise DataError(f"--on-error {on_error}; choose stop or skip")
    settings = Settings(
        text_column=text_column,
        append_eod=not no_eod,
        eod_token=eod_token,
        parse_special=parse_special,
        engine=engine,
        workers=workers,
        skip_faults=on_error == "skip",
        max_document_bytes=_bytes("--max-document-mb", max_document_mb, 1 << 20),
        fraction=fraction,
        token_budget=None if token_budget is None else _number(token_budget),
        shard=None if shard is None else _shard(shard),
        restart=restart,
    )
    with progress_display(log) as (show, say):
        if preset is None:
            if weight:
                raise DataError("--weight goes with --preset; see taid-data blend")
            made = {
                "": prepare(
                    inputs,
                    tokenizer,
                    out,
                    settings,
                    progress=lambda state: show("", state),
                    say=say,
                )
            }
        else:
            made = prepare_preset(
                preset,
                inputs,
                tokenizer,
                out,
                settings,
                weights=_weights(weight or []),
                progress=show,
                say=say,
            )
    lines, values = [], {}
    for name, manifest in made.items():
        prefix = str(out / name) if name else str(out)
        left_out = f" ({manifest.skipped:,} left out)" if manifest.skipped else ""
        lines.append(
            f"{prefix}: {manifest.documents:,} documents{left_out}, {manifest.tokens:,} tokens"
        )
        lines += [f"  {row}" for row in manifest.skipped_rows[:3]]
        values[prefix] = manifest.model_dump()
    report(as_json, "\n".join(lines), values)


@app.command("fetch-python-edu", epilog=examples("fetch-python-edu"))
def fetch_command(
    inputs: Annotated[list[str], typer.Argument(help="python-edu's Parquet files.")],
    out: Annotated[Path, typer.Option(help="Folder for text/ and left-out/.")],
    endpoint: Annotated[
        str | None, typer.Option(help="Address below which the contents lie by their ids.")
    ] = None,
    connections: Annotated[int, typer.Option(min=1, help="Fetches at the same time.")] = 64,
    tries: Annotated[int, typer.Option(min=1, help="Per content, with growing waits.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Fetch python-edu's contents by their ids.

    Of SmolLM-Corpus. Goes on where it was stopped.
    """
    from data_tools.display import report
    from data_tools.python_edu import ENDPOINT, FetchProgress, FetchSettings, fetch_python_edu

    def show(state: FetchProgress) -> None:
        print(
            f"part {state.parts:,} of {state.parts_total:,}, {state.contents:,} contents, "
            f"{state.left_out:,} left out",
            file=sys.stderr,
        )

    settings = FetchSettings(
        endpoint=ENDPOINT if endpoint is None else endpoint, connections=connections, tries=tries
    )
    done = fetch_python_edu(inputs, out, settings, show)
    report(
        as_json,
        f"{out / 'text'}: {done.contents:,} contents; {done.left_out:,} are named in "
        f"{out / 'left-out'}",
        {"contents": done.contents, "left_out": done.left_out, "parts": done.parts},
    )


@app.command("tokenizer", epilog=examples("tokenizer"))
def tokenizer_command(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="*.model: sentencepiece BPE; *.json: byte-level BPE.")],
    vocab_size: Annotated[int, typer.Option(min=1, max=1 << 24, help="Number of tokens.")],
    text_column: TextColumn = "text",
    sample_mb: Annotated[
        float, typer.Option(min=0.001, help="Text to learn from, spread over the inputs. MB.")
    ] = 4.0,
    as_json: AsJson = False,
) -> None:
    """Train a BPE that reproduces every text exactly."""
    from data_tools.display import report
    from data_tools.sources import Corpus, sample_texts
    from data_tools.tokenizers import trainer_for

    train = trainer_for(out)
    texts = sample_texts(Corpus(inputs, text_column), _bytes("--sample-mb", sample_mb, 10**6))
    train(texts, out, vocab_size)
    report(
        as_json,
        f"{out}: {vocab_size:,} tokens, learned from {len(texts):,} documents",
        {"tokenizer": str(out), "vocab_size": vocab_size, "documents": len(texts)},
    )


@app.command("corpus", epilog=examples("corpus"))
def corpus_command(
    out: Annotated[Path, typer.Argument(help="Folder for train.jsonl and held_out.jsonl.")],
) -> None:
    """Write a small corpus without a download.

    It is the sources of Python's standard library: train.jsonl and held_out.jsonl.
    """
    from data_tools.corpus import write_stdlib_corpus
    from data_tools.display import report

    lines = [
        f"{path}: {documents:,} documents, {path.stat().st_size / 1e6:.1f} MB"
        for path, documents in write_stdlib_corpus(out).values()
    ]
    report(False, "\n".join(lines), {})


@app.command("inspect", epilog=examples("inspect"))
def inspect_command(
    prefix: Prefix,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Decode with this tokenizer; without it ids are shown.")
    ] = None,
    documents: Annotated[int, typer.Option(min=0, help="Number of documents to show.")] = 1,
    first: Annotated[int, typer.Option(min=0, help="The first one to show.")] = 0,
    eod_token: EodToken = None,
    histogram: Annotated[
        Path | None, typer.Option(help="Draw the documents' lengths into this PNG.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show counts, lengths and some documents."""
    from data_tools.display import report
    from data_tools.inspection import describe

    text, values = describe(
        prefix,
        tokenizer,
        eod_token=eod_token,
        shown=range(first, first + documents),
        histogram=histogram,
    )
    report(as_json, text, values)


@app.command("verify", epilog=examples("verify"))
def verify_command(
    prefix: Prefix,
    fast: Annotated[
        bool, typer.Option("--fast", help="Structure, sizes and counts only; reads no tokens.")
    ] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Has to be the tokenizer that made the files.")
    ] = None,
    eod_token: EodToken = None,
    as_json: AsJson = False,
) -> None:
    """Check that the files are whole and right.

    Structure, index, counts, sizes, hashes, ids in the vocabulary, ends of documents.
    """
    from data_tools.display import report
    from data_tools.tokenizers import load_tokenizer
    from data_tools.verify import verify

    model = load_tokenizer(tokenizer, eod_token=eod_token) if tokenizer else None
    verdict = verify(prefix, fast=fast, tokenizer=model)
    files = verdict.files
    text = (
        f"{prefix}: {files.num_documents:,} documents, {files.num_tokens:,} tokens; good: "
        f"{', '.join(verdict.checked)}"
    )
    if verdict.unchecked:
        text += f"; not known, so not checked: {', '.join(verdict.unchecked)}"
    report(
        as_json,
        text,
        {
            "prefix": str(prefix),
            "documents": files.num_documents,
            "tokens": files.num_tokens,
            "checked": verdict.checked,
            "unchecked": verdict.unchecked,
        },
    )


@app.command("merge", epilog=examples("merge"))
def merge_command(
    prefixes: Annotated[list[Path], typer.Argument(help="Prefixes, in order.")],
    out: Annotated[Path, typer.Option(help="Prefix of the files to write.")],
    as_json: AsJson = False,
) -> None:
    """Join token files, one after the other.

    Shards of one run give what the run without shards writes; or other corpora of one tokenizer.
    """
    from data_tools.display import report
    from data_tools.merge import merge

    merged = merge(prefixes, out)
    text = f"{out}: {merged.documents:,} documents, {merged.tokens:,} tokens"
    report(as_json, text, {str(out): merged.model_dump()})


@app.command("split", epilog=examples("split"))
def split_command(
    prefix: Prefix,
    shares: Annotated[list[str], typer.Argument(help="NAME=SHARE ..., adding up to 1.")],
    out: Annotated[Path, typer.Option(help="OUT-NAME is the prefix of each part.")],
    seed: Annotated[int, typer.Option(min=0, help="Another seed is another split.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Deal documents out by their hashes.

    Equal documents go the same way, and none changes sides when others come or go.
    """
    from data_tools.display import report
    from data_tools.merge import split

    chosen = {name: value or 0.0 for name, value in _weights(shares).items()}
    made = split(prefix, chosen, out, seed=seed)
    lines = [
        f"{out}-{name}: {manifest.documents:,} documents, {manifest.tokens:,} tokens"
        for name, manifest in made.items()
    ]
    values = {f"{out}-{name}": manifest.model_dump() for name, manifest in made.items()}
    report(as_json, "\n".join(lines), values)


@app.command("blend", epilog=examples("blend"))
def blend_command(
    parts: Annotated[list[str], typer.Argument(help="PREFIX=WEIGHT ..., or PREFIX ... by tokens.")],
    out: Annotated[Path, typer.Option(help="The YAML file to write.")],
    as_json: AsJson = False,
) -> None:
    """Write weights as the trainer takes them."""
    from data_tools.blend import write_blend
    from data_tools.display import report

    used = write_blend(_weights(parts), out)
    total = sum(used.values())
    lines = [f"{prefix}: {100 * weight / total:.2f}%" for prefix, weight in used.items()]
    report(as_json, "\n".join([f"{out}:", *lines]), {"blend": used})


def _weights(parts: Sequence[str]) -> dict[str, float | None]:
    """NAME=NUMBER or NAME."""
    found: dict[str, float | None] = {}
    for part in parts:
        name, equals, number = part.rpartition("=") if "=" in part else (part, "", "")
        if name in found:
            raise DataError(f"{name}: given twice; name it once")
        try:
            found[name] = float(number) if equals else None
        except ValueError:
            raise DataError(f"{part}: {number!r} is no number; give NAME=NUMBER") from None
    return found


def _bytes(option: str, megabytes: float, unit: int) -> int:
    if not math.isfinite(megabytes) or megabytes > _MOST_MEGABYTES:
        raise DataError(f"{option} {megabytes}; give at most {_MOST_MEGABYTES}")
    return int(megabytes * unit)


def _number(text: str) -> int:
    suffix = text[-1:].upper()
    try:
        return int(float(text[:-1]) * _SUFFIXES[suffix]) if suffix in _SUFFIXES else int(text)
    except (ValueError, OverflowError):
        raise DataError(f"{text!r} is no number of tokens; write 500M or 20B") from None


def _shard(text: str) -> Any:
    from data_tools.units import Shard

    index, _, count = text.partition("/")
    if not all(part.isdecimal() and len(part) < 10 for part in (index, count)):
        raise DataError(f"shard {text!r}; give i/n, such as 1/4")
    return Shard(int(index), int(count))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits with its code. arguments: default sys.argv[1:]."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without UTF-8 shows escapes
        sys.stdout.reconfigure(errors="backslashreplace")
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="taid-data", standalone_mode=False)
    except DataError as error:
        _fail(2, str(error))
    except OSError as error:
        if error.errno in _WRONG_PATH:
            _fail(2, f"{error}; give another path")
        mend = "" if error.errno is None else "; give the same command again once that is mended"
        _fail(1, f"{error}{mend}")
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except _UsageError as error:
        _fail(2, f"{error.format_message().rstrip('.')}; see taid-data --help")
    if code == _INTERRUPTED:
        _fail(code, "interrupted; nothing was published, and the same command goes on")
    sys.exit(code or 0)


def _fail(code: int, message: str) -> None:
    line = message.replace("\n", "\\n").replace("\r", "\\r")  # names of files may hold such
    print(f"taid-data: {line}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()

"""The `taid-data` command: parses, calls, prints; no logic.

Exit codes: 0 done; 2 bad arguments or input, with one line on stderr; 1 an internal failure; 130
interrupted by Ctrl-C.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import rich.console
import rich.progress
import typer

from data_tools.corpus import write_stdlib_corpus
from data_tools.manifest import DataError, check_indexed, read_manifest
from data_tools.prepare import Progress, prepare
from data_tools.sources import Corpus, sample_texts
from data_tools.tokenizers import Tokenizer, load_tokenizer, train_sentencepiece
from data_tools.verify import verify

app = typer.Typer(
    help="Prepare, check and look at token files for training.",
    add_completion=False,
    rich_markup_mode=None,
)

Inputs = Annotated[
    list[str], typer.Argument(help="Files, folders or globs: text, .jsonl or .jsonl.gz.")
]
TextColumn = Annotated[str, typer.Option(help="Column of JSON lines that holds the text.")]
Prefix = Annotated[Path, typer.Argument(help="The files' common path, without .bin or .idx.")]
EodToken = Annotated[
    str | None, typer.Option(help="End-of-document token, where the tokenizer names none.")
]

# typer's parser is click, its own copy or the package, by version: reached by its base class.
_UsageError: Any = typer.BadParameter.__bases__[0]
_INTERRUPTED = 130  # the shell's code for Ctrl-C


@app.command("prepare")
def prepare_command(
    inputs: Inputs,
    tokenizer: Annotated[Path, typer.Option(help="A sentencepiece .model or a tokenizer.json.")],
    out: Annotated[Path, typer.Option(help="Prefix of the files to write.")],
    text_column: TextColumn = "text",
    no_eod: Annotated[
        bool, typer.Option("--no-eod", help="Do not end documents with the end-of-document id.")
    ] = False,
    eod_token: EodToken = None,
) -> None:
    """Tokenize texts into OUT.bin, OUT.idx and OUT.manifest.json."""
    model = load_tokenizer(tokenizer, eod_token=eod_token)
    with _progress_display() as show:
        manifest = prepare(
            inputs, model, out, text_column=text_column, append_eod=not no_eod, progress=show
        )
    left_out = f" ({manifest.empty_documents:,} empty)" if manifest.empty_documents else ""
    print(f"{out}: {manifest.documents:,} documents{left_out}, {manifest.tokens:,} tokens")


@app.command("tokenizer")
def tokenizer_command(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="The sentencepiece model to write, *.model.")],
    vocab_size: Annotated[int, typer.Option(min=1, help="Number of tokens.")],
    text_column: TextColumn = "text",
    sample_mb: Annotated[
        float, typer.Option(min=0.001, help="Text to learn from, spread over the inputs. MB.")
    ] = 4.0,
) -> None:
    """Train a sentencepiece BPE that reproduces every text exactly."""
    texts = sample_texts(Corpus(inputs, text_column), int(sample_mb * 1e6))
    train_sentencepiece(texts, out, vocab_size)
    print(f"{out}: {vocab_size:,} tokens, learned from {len(texts):,} documents")


@app.command("corpus")
def corpus_command(
    out: Annotated[Path, typer.Argument(help="Folder for train.jsonl and held_out.jsonl.")],
) -> None:
    """Write a small real corpus without a download: the standard library's own sources."""
    for path, documents in write_stdlib_corpus(out).values():
        print(f"{path}: {documents:,} documents, {path.stat().st_size / 1e6:.1f} MB")


@app.command("inspect")
def inspect_command(
    prefix: Prefix,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Decode with this tokenizer; without it ids are shown.")
    ] = None,
    documents: Annotated[int, typer.Option(min=0, help="Number of documents to show.")] = 1,
    eod_token: EodToken = None,
) -> None:
    """Show counts, token type and the first documents."""
    files = check_indexed(prefix)
    manifest = read_manifest(prefix)
    model = load_tokenizer(tokenizer, eod_token=eod_token) if tokenizer else None
    if model and manifest and model.fingerprint != manifest.tokenizer.fingerprint:
        raise DataError(
            f"{tokenizer}: not the tokenizer that made {prefix} ({manifest.tokenizer.name}, xxh3 "
            f"{manifest.tokenizer.fingerprint}); give that one"
        )
    print(f"documents: {files.num_documents:,}")
    print(f"sequences: {files.num_sequences:,}")
    print(f"tokens: {files.num_tokens:,}")
    print(f"token type: {files.dtype}")
    if manifest:
        made_by = manifest.tokenizer
        print(f"tokenizer: {made_by.name} ({made_by.kind}, {made_by.vocab_size:,} ids)")
        print(f"end of document: {made_by.eod_id if manifest.options.append_eod else 'none'}")
    for number in range(min(documents, files.num_documents)):
        print(f"--- document {number}")
        print(_shown(files.document(number).tolist(), model))


def _shown(ids: list[int], model: Tokenizer | None) -> str:
    if model is None:
        return " ".join(map(str, ids))
    if ids and ids[-1] == model.eod_id:
        ids = ids[:-1]
    return model.decode(ids)


@app.command("verify")
def verify_command(prefix: Prefix) -> None:
    """Check the files' structure, and their counts and hashes against the manifest."""
    files, manifest = verify(prefix)
    hashes = "hashes match" if manifest else "no manifest, so hashes were not checked"
    print(f"{prefix}: {files.num_documents:,} documents, {files.num_tokens:,} tokens, {hashes}")


@contextmanager
def _progress_display() -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal; a line every ten seconds where stderr is piped."""
    if not sys.stderr.isatty():
        yield _plain_progress()
        return
    with rich.progress.Progress(
        *rich.progress.Progress.get_default_columns(),
        rich.progress.TextColumn("{task.fields[tokens]:,} tokens"),
        console=rich.console.Console(stderr=True),
    ) as bar:
        task = bar.add_task("preparing", total=None, tokens=0)
        yield lambda state: bar.update(
            task, completed=state.bytes_read, total=state.bytes_total, tokens=state.tokens
        )


def _plain_progress(every_seconds: float = 10.0) -> Callable[[Progress], None]:
    last = time.monotonic()

    def show(state: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= every_seconds:
            last = time.monotonic()
            percent = 100 * state.bytes_read / max(1, state.bytes_total)
            print(
                f"{percent:.0f}%, {state.documents:,} documents, {state.tokens:,} tokens",
                file=sys.stderr,
            )

    return show


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits with its code. arguments: default sys.argv[1:]."""
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="taid-data", standalone_mode=False)
    except (DataError, FileNotFoundError, PermissionError, NotADirectoryError) as error:
        _fail(2, str(error))
    except OSError as error:
        _fail(1, f"{error}; nothing was published")
    except typer.Abort:  # what an interrupt becomes in older versions of typer
        code = _INTERRUPTED
    except _UsageError as error:
        _fail(2, f"{error.format_message().rstrip('.')}; see taid-data --help")
    if code == _INTERRUPTED:
        _fail(code, "interrupted; nothing was published")
    sys.exit(code or 0)


def _fail(code: int, message: str) -> None:
    print(f"taid-data: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()

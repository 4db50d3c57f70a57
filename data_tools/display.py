"""What the commands print: progress with rate and time left, results as text or JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import rich.console
import rich.progress

from data_tools.prepare import Progress

Show = Callable[[str, Progress], None]


def report(as_json: bool, text: str, values: dict[str, Any]) -> None:
    """A command's result on stdout: for people, or one JSON object. Exits where that fails."""
    try:
        print(json.dumps(values) if as_json else text, flush=True)
    except BrokenPipeError:  # whoever reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        sys.exit(f"taid-data: the work is done, but this could not be printed: {error}")


def eta_seconds(state: Progress) -> float | None:
    """Time left at the rate of this run so far; None before anything was done."""
    done = state.bytes_read - state.bytes_resumed
    if not done or not state.seconds:
        return None
    return (state.bytes_total - state.bytes_read) * state.seconds / done


def line(name: str, state: Progress) -> str:
    """Progress in a line."""
    percent = 100 * state.bytes_read / max(1, state.bytes_total)
    rate = (state.bytes_read - state.bytes_resumed) / max(1e-9, state.seconds)
    left = eta_seconds(state)
    parts = [
        *([name] if name else []),
        f"{percent:.0f}%",
        f"{state.bytes_read / 1e6:,.0f} of {state.bytes_total / 1e6:,.0f} MB",
        f"{rate / 1e6:.1f} MB/s",
        f"{state.documents:,} documents",
        f"{state.tokens:,} tokens",
        "" if left is None else f"{_duration(left)} left",
    ]
    return ", ".join(part for part in parts if part)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


@contextmanager
def progress_display(log: Path | None = None) -> Iterator[tuple[Show, Callable[[str], None]]]:
    """(show progress, say a line): a bar on a terminal, else a line every ten seconds on stderr.

    What is said without a terminal waits for the end, so that an error stays the only line. log:
    gets all lines at once, with the time, in any case.
    """
    with ExitStack() as stack:
        shows: list[Show] = []
        says: list[Callable[[str], None]] = []
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context(log.open("a", encoding="utf-8", errors="backslashreplace"))

            def note(text: str) -> None:
                now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
                print(f"{now} {text}", file=stream, flush=True)

            shows.append(_every(10.0, note))
            says.append(note)
        waiting: list[str] = []
        if sys.stderr.isatty():
            shows.append(stack.enter_context(_bar()))
        else:
            shows.append(_every(10.0, _to(sys.stderr), waiting.append))
        says.append(_to(sys.stderr) if sys.stderr.isatty() else waiting.append)

        def show(name: str, state: Progress) -> None:
            for one in shows:
                one(name, state)

        def say(text: str) -> None:
            for one in says:
                one(text)

        yield show, say
        for text in waiting:
            print(text, file=sys.stderr)


def _to(stream: TextIO) -> Callable[[str], None]:
    return lambda text: print(text, file=stream)


def _every(
    seconds: float, say: Callable[[str], None], say_last: Callable[[str], None] | None = None
) -> Show:
    last = time.monotonic()

    def show(name: str, state: Progress) -> None:
        nonlocal last
        if state.bytes_read == state.bytes_total:
            (say_last or say)(line(name, state))
        elif time.monotonic() - last >= seconds:
            last = time.monotonic()
            say(line(name, state))

    return show


@contextmanager
def _bar() -> Iterator[Show]:
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TextColumn("{task.fields[rate]}"),
        rich.progress.TextColumn("{task.fields[tokens]:,} tokens"),
        rich.progress.TextColumn("{task.fields[left]}"),
        console=rich.console.Console(stderr=True),
    ) as bar:
        tasks: dict[str, rich.progress.TaskID] = {}

        def show(name: str, state: Progress) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name or "preparing", tokens=0, rate="", left="")
            left = eta_seconds(state)
            rate = (state.bytes_read - state.bytes_resumed) / max(1e-9, state.seconds)
            bar.update(
                tasks[name],
                total=state.bytes_total,
                completed=state.bytes_read,
                tokens=state.tokens,
                rate=f"{rate / 1e6:.1f} MB/s",
                left="" if left is None else f"{_duration(left)} left",
            )

        yield show

"""A process that is given damaged files, one after the other, and says what became of each.

Libraries end the process over some damage: here that is noticed, and costs one process.
"""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from data_tools.engines import choose_engine
from data_tools.inspection import describe
from data_tools.manifest import DataError
from data_tools.readers import FORMATS, kind_of
from data_tools.rows import Fault, ReadOptions
from data_tools.tokenizers import TextError, load_tokenizer
from data_tools.verify import verify

LONGEST_SECONDS = 30.0


def read(path: Path) -> list[str]:
    """The faults of a file of documents."""
    reader = FORMATS[kind_of(path)]
    pieces = reader.pieces(path, ReadOptions())
    rows = (row for piece in pieces for row in reader.read(path, piece, ReadOptions()))
    return [str(row) for row in rows if isinstance(row, Fault)]


def load(path: Path) -> list[str]:
    """A tokenizer is loaded and used; of FILE.tiktoken.json, the one that it belongs to."""
    if path.suffixes[-2:] == [".tiktoken", ".json"]:
        path = path.with_suffix("")
    tokenizer, _ = choose_engine(load_tokenizer(path), "auto", lambda: ["def f(x): return 12"])
    try:
        tokenizer.decode(tokenizer.encode_batch(["hello  world\n", "漢字"])[0].tolist())
    except TextError as error:  # the place is the caller's to add
        return [f"{path}: {error}"]
    return []


def check(path: Path) -> list[str]:
    """Prepared files are looked at, then verified."""
    prefix = Path(str(path).removesuffix(".json").removesuffix(".manifest")).with_suffix("")
    describe(prefix, shown=range(3))
    verify(prefix)
    return []


USES: dict[str, Callable[[Path], list[str]]] = {"read": read, "load": load, "check": check}


class ReadingProcess:
    """Started anew when the last one ended. A context manager."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "ReadingProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()

    def use(self, use: str, path: Path) -> None:
        """Raises AssertionError for anything but lines that name the file."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
            )
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([use, str(path)]).encode() + b"\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], LONGEST_SECONDS)
        answer = self._process.stdout.readline() if ready else b""
        if not answer:
            self._process.kill()
            self._process.communicate()
            code, self._process = self._process.returncode, None
            raise AssertionError(f"{use}: {signal.Signals(-code).name}" if code < 0 else code)
        lines, error = json.loads(answer)
        assert error is None, error
        # Files that belong together share the name up to its first dot.
        named = str(path.parent / path.name.partition(".")[0])
        for line in lines:
            assert line.startswith(named), line
            assert "\n" not in line, line


def main() -> None:
    """Answers [lines for the user, other exception] to each [use, path]."""
    # What libraries print by themselves does not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        use, path = json.loads(line)
        error = None
        try:
            lines = USES[use](Path(path))
        except DataError as one:
            lines = [str(one)]
        except BaseException as other:
            lines, error = [], f"{type(other).__name__}: {other}"
        print(json.dumps([lines, error]), file=answers, flush=True)


if __name__ == "__main__":
    main()

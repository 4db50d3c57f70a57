"""The command: what it prints, one line where the input is bad, and its exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_tools import cli


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `main`, as the installed command runs it."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return int(stopped.value.code or 0), output.out, output.err


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("def f():\n\treturn 1\n")
    return path


def test_from_text_to_checked_files(
    tmp_path: Path, text: Path, model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data" / "a"
    code, printed, _ = run(capsys, "prepare", text, "--tokenizer", model_path, "--out", out)
    assert (code, "1 documents" in printed) == (0, True)
    code, printed, _ = run(capsys, "inspect", out, "--tokenizer", model_path, "--documents", 3)
    assert code == 0
    assert printed.endswith(f"--- document 0\n{text.read_text()}\n")
    assert "token type: uint16" in printed
    code, printed, _ = run(capsys, "inspect", out)
    assert printed.splitlines()[-1].endswith(" 0")  # ids, the end of document last
    code, printed, _ = run(capsys, "verify", out)
    assert (code, "good: structure, index, counts, sizes, hashes, ids" in printed) == (0, True)


def test_training_a_tokenizer(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.model"
    code, _, error = run(capsys, "tokenizer", text, "--out", out, "--vocab-size", 9)
    assert (code, out.exists()) == (2, False)
    assert error.count("\n") == 1
    text.write_text("some words to learn, some other words\n" * 20)
    code, printed, _ = run(capsys, "tokenizer", text, "--out", out, "--vocab-size", 290)
    assert (code, out.exists()) == (0, True)
    assert "290 tokens" in printed


def test_bad_input_is_one_line_and_code_2(
    tmp_path: Path, text: Path, model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"body": "x"}) + "\n")
    options = ("--tokenizer", model_path, "--out", tmp_path / "a")
    cases = {
        ("prepare", tmp_path / "none", *options): "none: no such file",
        ("prepare", bad, *options): "bad.jsonl, row 1: no column 'text'",
        ("prepare", text, "--tokenizer", text, "--out", tmp_path / "a"): "unknown kind",
        ("verify", tmp_path / "a"): "a.bin: no such file",
        ("inspect", tmp_path / "a"): "a.bin: no such file",
        ("prepare", text): "Missing option",
        ("nonsense",): "nonsense",
        (): "Missing command",
    }
    for arguments, message in cases.items():
        code, printed, error = run(capsys, *arguments)
        assert (code, printed, error.count("\n")) == (2, "", 1), error
        assert error.startswith("taid-data: ")
        assert message in error
    code, _, _ = run(capsys, "prepare", bad, *options, "--text-column", "body", "--no-eod")
    assert code == 0


def test_another_tokenizer_is_not_used_to_decode(
    tmp_path: Path, text: Path, model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "prepare", text, "--tokenizer", model_path, "--out", tmp_path / "a")
    text.write_text("other words for another model " * 20)
    run(capsys, "tokenizer", text, "--out", tmp_path / "b.model", "--vocab-size", 280)
    code, _, error = run(capsys, "inspect", tmp_path / "a", "--tokenizer", tmp_path / "b.model")
    assert (code, "not the tokenizer that made" in error) == (2, True)


@pytest.mark.parametrize(
    ("failure", "expected", "fault"),
    [
        (OSError(28, "No space left on device"), 1, "No space left on device; nothing was"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was published"),
    ],
)
def test_a_full_disk_and_an_interrupt_are_one_line(
    text: Path,
    model_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: BaseException,
    expected: int,
    fault: str,
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise failure

    monkeypatch.setattr("data_tools.prepare.prepare", fail)
    out = text.parent / "a"
    code, _, error = run(capsys, "prepare", text, "--tokenizer", model_path, "--out", out)
    assert (code, fault in error, error.count("\n")) == (expected, True, 1)


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    assert all(name in result.output for name in ("prepare", "tokenizer", "inspect", "verify"))


def test_as_a_process(tmp_path: Path, text: Path, model_path: Path) -> None:
    """Neither a traceback nor anything else besides the one line, and the shell's exit code."""
    text.write_bytes(b"\xff")
    command = [sys.executable, "-m", "data_tools.cli", "prepare", str(text)]
    command += ["--tokenizer", str(model_path), "--out", str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"taid-data: {text}: not UTF-8 (byte 0); convert the file or leave it out\n"
    )

"""The command: what it prints, one line where the input is bad, and its exit codes."""

import functools
import gzip
import json
import os
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from data_tools import cli, rows
from data_tools.manifest import DataError


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
        ("prepare", text, *options, "--max-document-mb", "inf"): "--max-document-mb inf; give at",
        (
            "prepare",
            text,
            *options,
            "--max-document-mb",
            "nan",
        ): "Invalid value for '--max-document-mb'",
        ("prepare", text, *options, "--max-document-mb", "1e300"): "--max-document-mb 1e+300; give",
        ("prepare", text, *options, "--shard", f"1/{'9' * 5000}"): "give i/n, such as 1/4",
        ("prepare", text, *options, "--fraction", "nan"): "fraction nan; give a number above 0",
        (
            "tokenizer",
            text,
            "--out",
            "x.json",
            "--vocab-size",
            10**23,
        ): "less than or equal to 16777216",
        ("tokenizer", text, "--out", "x.json", "--vocab-size", 9, "--sample-mb", "inf"): "inf; gi",
        ("tokenizer", tmp_path / "no", "--out", "x.txt", "--vocab-size", 9): "x.txt: unknown kind",
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
        (OSError(28, "No space left on device"), 1, "No space left on device; give the same"),
        (
            FileExistsError(17, "File exists", "a\nb"),
            2,
            "File exists: 'a\\nb'; give another path",
        ),
        (ChildProcessError("a worker died; mend it"), 1, "taid-data: a worker died; mend it\n"),
        (IsADirectoryError(21, "Is a directory"), 2, "Is a directory; give another path"),
        (OSError(36, "File name too long"), 2, "File name too long; give another path"),
        (DataError("a\nb.txt: bad\r"), 2, "a\\nb.txt: bad\\r"),
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
    assert all(
        name in result.output
        for name in ("prepare", "fetch-python-edu", "verify", "merge", "split", "blend")
    )


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


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    code, printed, error = run(capsys, *arguments, "--json")
    assert code == 0, error
    assert printed.count("\n") == 1
    return json.loads(printed)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines.jsonl"
    rows = [json.dumps({"text": f"document {number} has words"}) for number in range(40)]
    path.write_text("\n".join([*rows, '{"text": null}', '{"text": ""}']) + "\n")
    return path


def test_bad_rows_stop_or_are_listed(
    tmp_path: Path, lines: Path, model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--tokenizer", model_path, "--out", tmp_path / "a", "--log", tmp_path / "log")
    code, _, error = run(capsys, "prepare", lines, *options)
    assert (code, error.count("\n")) == (2, 1)
    assert "lines.jsonl, row 41: column 'text' is null" in error
    code, printed, _ = run(capsys, "prepare", lines, *options, "--on-error", "skip")
    assert code == 0
    assert "40 documents (2 left out)" in printed
    assert f"  {lines}, row 42: empty text" in printed
    assert "engine: sentencepiece" in (tmp_path / "log").read_text()
    assert "100%, 0 of 0 MB" in (tmp_path / "log").read_text()
    for arguments, fault in (
        (("--on-error", "ignore"), "choose stop or skip"),
        (("--shard", "2"), "give i/n"),
        (("--token-budget", "many"), "no number of tokens"),
        (("--weight", "a=1"), "--weight goes with --preset"),
        (("--engine", "fast", "--on-error", "skip"), None),
    ):
        code, _, error = run(capsys, "prepare", lines, *options, *arguments)
        assert fault is None or (code == 2 and fault in error)


def test_shards_merge_split_blend_for_machines(
    tmp_path: Path,
    lines: Path,
    model_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ("--tokenizer", model_path, "--on-error", "skip", "--out")
    monkeypatch.setattr(rows, "PIECE_BYTES", 300)
    given = ("prepare", lines, "--workers", 1, *options)
    whole = run_json(capsys, *given, tmp_path / "whole")[str(tmp_path / "whole")]
    for index in (1, 2):
        run(capsys, *given, tmp_path / f"part{index}", "--shard", f"{index}/2")
    parts = (tmp_path / "part1", tmp_path / "part2")
    merged = run_json(capsys, "merge", *parts, "--out", tmp_path / "all")[str(tmp_path / "all")]
    assert merged["outputs"][0]["xxh3"] == whole["outputs"][0]["xxh3"]
    made = run_json(capsys, "split", tmp_path / "all", "a=0.5", "b=0.5", "--out", tmp_path / "s")
    assert sum(manifest["documents"] for manifest in made.values()) == 40
    blend = tmp_path / "blend.yaml"
    used = run_json(
        capsys, "blend", f"{tmp_path / 's-a'}=3", f"{tmp_path / 's-b'}=1", "--out", blend
    )
    assert list(used["blend"].values()) == [3.0, 1.0]
    verdict = run_json(capsys, "verify", tmp_path / "s-a", "--tokenizer", model_path)
    assert "tokenizer" in verdict["checked"]
    assert "index" not in run_json(capsys, "verify", tmp_path / "s-a", "--fast")["checked"]
    values = run_json(capsys, "inspect", tmp_path / "whole", "--tokenizer", model_path)
    assert values["texts"] == {"0": "document 0 has words"}
    assert values["lengths"]["largest"] > 5
    code, printed, _ = run(capsys, "inspect", tmp_path / "whole", "--first", 38, "--documents", 9)
    assert printed.count("--- document") == 2
    assert "\n    tokens  documents\n" in printed


def test_the_histogram_is_a_picture(
    tmp_path: Path, lines: Path, model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--tokenizer", model_path, "--out", tmp_path / "a", "--on-error", "skip")
    run(capsys, "prepare", lines, *options)
    code, _, error = run(capsys, "inspect", tmp_path / "a", "--histogram", tmp_path / "a.jpg")
    assert (code, "ends in .png" in error) == (2, True)
    code, _, error = run(capsys, "inspect", tmp_path / "a", "--histogram", tmp_path / "a.png")
    assert code == 0, error
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_byte_level_bpe_is_trained_and_used(
    tmp_path: Path, lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:40]))
    for name in ("a", "b"):
        out = tmp_path / f"{name}.json"
        code, printed, error = run(capsys, "tokenizer", lines, "--out", out, "--vocab-size", 270)
        assert code == 0, error
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    code, _, error = run(capsys, "tokenizer", lines, "--out", out, "--vocab-size", 5000)
    assert (code, "5000 tokens cannot be learned" in error) == (2, True)
    code, _, error = run(capsys, "tokenizer", lines, "--out", "a.txt", "--vocab-size", 270)
    assert (code, "end the name in .model" in error) == (2, True)
    manifest = run_json(capsys, "prepare", lines, "--tokenizer", out, "--out", tmp_path / "p")
    assert manifest[str(tmp_path / "p")]["engine"] == "tiktoken"


@pytest.fixture
def smollm(tmp_path: Path) -> Path:
    """The data set's folders in miniature."""
    root = tmp_path / "smollm-corpus"
    for part, count in (("cosmopedia-v2", 30), ("fineweb-edu-dedup", 200)):
        for number in (0, 1):
            path = root / part / f"train-{number}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            texts = [f"{part} {number} {row} some words" for row in range(count)]
            pq.write_table(pa.table({"prompt": texts, "text": texts}), path, row_group_size=10)
    (root / "python-edu").mkdir()
    pq.write_table(pa.table({"blob_id": ["aa"]}), root / "python-edu" / "ids.parquet")
    (root / "README.md").write_text("about")
    return root


def test_the_smollm_preset(
    tmp_path: Path, smollm: Path, model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = (
        "prepare",
        smollm,
        "--preset",
        "smollm-corpus",
        "--tokenizer",
        model_path,
        "--out",
        out,
    )
    code, _, error = run(capsys, *given)
    assert (code, "hold ids only: taid-data fetch-python-edu" in error) == (2, True), error
    contents = smollm / "python-edu/text/part-00000.jsonl.gz"
    contents.parent.mkdir()
    contents.write_bytes(gzip.compress(json.dumps({"text": "print(1)"}).encode()))
    made = run_json(capsys, *given, "--fraction", 0.1)
    assert [manifest["documents"] for manifest in made.values()] == [6, 40, 1]
    assert [
        Path(record["name"]).name for record in made[str(out / "cosmopedia-v2")]["sources"]
    ] == ["train-0.parquet"]
    blend = yaml.safe_load((out / "blend.yaml").read_text())
    assert [part["weight"] for part in blend] == [28e9, 220e9, 4e9]
    before = (out / "cosmopedia-v2.bin").stat().st_mtime_ns
    run_json(capsys, *given, "--fraction", 0.1)
    assert (out / "cosmopedia-v2.bin").stat().st_mtime_ns == before  # done, and not done again
    weights = ("--weight", "cosmopedia-v2=3", "--weight", "fineweb-edu-dedup=1")
    made = run_json(capsys, *given, *weights, "--token-budget", "0.4K")
    tokens = [manifest["tokens"] for manifest in made.values()]
    assert len(tokens) == 2
    assert 300 <= tokens[0] < 330
    assert 100 <= tokens[1] < 130
    assert (out / "cosmopedia-v2.bin").stat().st_mtime_ns != before
    for arguments, fault in (
        (("--weight", "web=1"), "no part web in smollm-corpus"),
        (("--preset", "c4"), "preset 'c4'; there is smollm-corpus"),
    ):
        code, _, error = run(capsys, *given, *arguments)
        assert (code, fault in error) == (2, True), error


def test_fetching_is_a_command(
    tmp_path: Path, smollm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = smollm / "python-edu" / "ids.parquet"
    options = ("--out", tmp_path / "f", "--tries", 1, "--endpoint", "http://127.0.0.1:9")
    code, _, error = run(capsys, "fetch-python-edu", ids, *options)
    assert (code, "no content after 1 tries" in error) == (2, True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here, as on macOS")
def test_output_that_is_not_taken(tmp_path: Path, text: Path, model_path: Path) -> None:
    """A full disk, a reader that has read enough, a terminal that knows no such letter."""
    text.write_text("def naïve():\n", encoding="utf-8")
    command = [sys.executable, "-m", "data_tools.cli"]
    given = [str(text), "--tokenizer", str(model_path), "--out", str(tmp_path / "a")]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*command, "prepare", *given], stdout=full, stderr=subprocess.PIPE, check=False
        )
    last = done.stderr.decode().splitlines()[-1]
    assert (done.returncode, "the work is done, but this could not be printed" in last) == (1, True)
    inspect = [*command, "inspect", str(tmp_path / "a"), "--tokenizer", str(model_path)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(inspect, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run(inspect, capture_output=True, check=True, env=environment)
    assert rb"def na\xefve():" in shown.stdout


COMMANDS = [info.name for info in cli.app.registered_commands]


def test_the_examples_of_the_manual_parse(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command has some, and each is a line that the command takes."""
    ran = []
    for info in cli.app.registered_commands:
        assert info.callback
        replaced = functools.wraps(info.callback)(lambda name=info.name, **_: ran.append(name))
        monkeypatch.setattr(info, "callback", replaced)
    for name in COMMANDS:
        code, shown, _ = run(capsys, name, "--help")
        lines = shown.partition("Examples:\n")[2].splitlines()
        assert (code, bool(lines)) == (0, True), name
        ran.clear()
        for line in (line.strip() for line in lines if "taid-data" in line):
            code, _, error = run(capsys, *shlex.split(line)[1:])
            assert code == 0, (line, error)
        assert {*ran} == {name}
        assert all(len(line) <= 100 for line in lines), lines


def test_the_overview_and_the_versions(capsys: pytest.CaptureFixture[str]) -> None:
    _, shown, _ = run(capsys, "--help")
    commands = shown.partition("Commands:")[2].partition("Where")[0]
    assert all(f"  {name} " in commands for name in COMMANDS)
    assert "..." not in commands
    code, shown, _ = run(capsys, "--version")
    found = dict(line.split() for line in shown.splitlines())
    assert (code, found["tiktoken"]) == (0, metadata.version("tiktoken"))

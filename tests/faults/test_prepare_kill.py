"""`taid-data prepare` killed at any moment: the next call goes on, and the bytes are the same."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools import journal, rows
from data_tools.corpus import stdlib_root
from data_tools.journal import Journal
from data_tools.manifest import DataError
from data_tools.prepare import Settings, prepare
from data_tools.sources import Corpus, sample_texts
from data_tools.tokenizers import train_sentencepiece, train_tokenizer
from data_tools.verify import verify

KILLED = 137
# What changes the disk, or makes sure that it did; a kill may come before each of them.
STEPS = (
    (journal.os, "truncate"),
    (journal.os, "fsync"),
    (journal.shutil, "rmtree"),
    (journal, "write_atomically"),
    (journal, "write_index"),
    (journal, "remove_published"),
    (journal, "sync_path"),
    (Path, "replace"),
    (Path, "unlink"),
    (Path, "touch"),
    (Path, "mkdir"),
    (Journal, "add_unit"),
    (Journal, "_write_line"),
    (Journal, "_sync"),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a tokenizer, a corpus of ten small documents)"""
    folder = tmp_path_factory.mktemp("inputs")
    texts = sample_texts(Corpus([stdlib_root() / "json"]), 300_000)
    train_sentencepiece(texts, folder / "a.model", 400)
    lines = [json.dumps({"text": f"document {i} " * 9}) + "\n" for i in range(10)]
    (folder / "a.jsonl").write_text("".join(lines))
    return folder / "a.model", folder / "a.jsonl"


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PIECE_BYTES", 300)


def outputs(prefix: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in prefix.parent.glob(f"{prefix.name}*")}


def in_a_child(work: Callable[[], object]) -> int:
    """Exit code of a forked process that does the work; 0 where it got through."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_before_step(number: int) -> None:
    """Ends this process as a kill would, its buffers lost, before the number-th change of disk."""
    left = [number]

    def counted(function: Callable) -> Callable:
        def wrapped(*args: object, **kwargs: object) -> object:
            left[0] -= 1
            if not left[0]:
                os._exit(KILLED)
            return function(*args, **kwargs)

        return wrapped

    for owner, name in STEPS:
        setattr(owner, name, counted(getattr(owner, name)))


def test_killed_before_every_change_of_the_disk(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    """Killed once at each step, where an earlier output is replaced, then run to the end."""
    tokenizer, corpus = inputs

    def run(**changes: bool) -> None:
        prepare([corpus], tokenizer, tmp_path / "a", Settings(workers=1, **changes))

    def run_and_die(number: int) -> None:
        die_before_step(number)
        run()

    run()
    expected = outputs(tmp_path / "a")
    assert sorted(expected) == ["a.bin", "a.idx", "a.manifest.json"]
    run(append_eod=False)
    earlier = outputs(tmp_path / "a")
    number, code, without_index = 0, KILLED, 0
    while code == KILLED:
        number += 1
        for name, content in earlier.items():
            (tmp_path / name).write_bytes(content)
        code = in_a_child(lambda step=number: run_and_die(step))
        if code == KILLED:
            # An index may be missing; it never lies beside a .bin that it does not describe.
            if (tmp_path / "a.idx").exists():
                verify(tmp_path / "a")
            else:
                without_index += 1
                assert not (tmp_path / "a.manifest.json").exists()
            run()
            assert outputs(tmp_path / "a") == expected, f"killed before step {number}"
    assert code == 0
    assert number > 40
    assert without_index > 1


def test_killed_again_and_again_on_the_way(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    """Each run gets a little further than the one before; the last one finishes."""
    tokenizer, corpus = inputs
    settings = Settings(workers=1)
    prepare([corpus], tokenizer, tmp_path / "whole", settings)
    units_done = []
    code = KILLED
    while code == KILLED:

        def run() -> None:
            die_before_step(16 + len(units_done))
            prepare([corpus], tokenizer, tmp_path / "a", settings)

        code = in_a_child(run)
        lines = tmp_path / "a.work/journal.jsonl"
        units_done.append(len(lines.read_text().splitlines()) if lines.exists() else 0)
        assert len(units_done) < 50
    assert len(units_done) > 3
    for name in ("bin", "idx"):
        whole = (tmp_path / f"whole.{name}").read_bytes()
        assert (tmp_path / f"a.{name}").read_bytes() == whole


def test_a_restart_that_is_killed_leaves_nothing_to_the_next_run(
    tmp_path: Path, inputs: tuple[Path, Path]
) -> None:
    """Work by other settings is not taken up because its plan was the first file to go."""
    tokenizer, corpus = inputs

    def run(**changes: bool) -> None:
        prepare([corpus], tokenizer, tmp_path / "a", Settings(workers=1, **changes))

    def run_and_die(number: int, **changes: bool) -> None:
        die_before_step(number)
        run(**changes)

    run()
    expected = outputs(tmp_path / "a")
    assert in_a_child(lambda: run_and_die(30, append_eod=False)) == KILLED
    assert (tmp_path / "a.work/journal.jsonl").read_bytes()
    (tmp_path / "a.work/plan.json").unlink()  # as far as the restart came
    run()
    assert outputs(tmp_path / "a") == expected


def test_work_of_another_cut_is_not_taken_up(
    tmp_path: Path, inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many units of other rows: another version may cut otherwise."""
    tokenizer, corpus = inputs

    def run_and_die() -> None:
        die_before_step(30)
        prepare([corpus], tokenizer, tmp_path / "a", Settings(workers=1))

    assert in_a_child(run_and_die) == KILLED
    monkeypatch.setattr(rows, "PIECE_BYTES", 301)
    with pytest.raises(DataError, match=r"a\.work: begun with other units; give what it was begun"):
        prepare([corpus], tokenizer, tmp_path / "a", Settings(workers=1))


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    tokenizer, corpus = inputs
    (tmp_path / "notes.work").mkdir()
    (tmp_path / "notes.work/mine.txt").write_text("precious")
    for restart in (False, True):
        settings = Settings(workers=1, restart=restart)
        with pytest.raises(
            DataError, match=r"mine\.txt: no file of a run of prepare, whose folder"
        ):
            prepare([corpus], tokenizer, tmp_path / "notes", settings)
    assert (tmp_path / "notes.work/mine.txt").read_text() == "precious"


def test_a_damaged_plan_is_told(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    tokenizer, corpus = inputs
    for content in (b"", b"[1]", b'{"sources": ', b"\xff"):
        (tmp_path / "a.work").mkdir()
        (tmp_path / "a.work/plan.json").write_bytes(content)
        with pytest.raises(DataError, match=r"plan\.json: damaged; drop the work .*--restart"):
            prepare([corpus], tokenizer, tmp_path / "a", Settings(workers=1))
        prepare([corpus], tokenizer, tmp_path / "a", Settings(workers=1, restart=True))


DAMAGE = {
    "line cut": ("journal.jsonl", lambda raw: raw[:-5]),
    "line changed": ("journal.jsonl", lambda raw: raw.replace(b'"tokens":', b'"tokens":1', 1)),
    "line of a number": ("journal.jsonl", lambda raw: b"5\n" + raw),
    "line of a list": ("journal.jsonl", lambda raw: b"[]\n" + raw),
    "less than none": ("journal.jsonl", lambda raw: raw.replace(b'"documents":', b'"documents":-')),
    "count of 10^14": (
        "journal.jsonl",
        lambda raw: raw.replace(b'"documents":', b'"documents":99999999999999', 1),
    ),
    "count of 10^40": (
        "journal.jsonl",
        lambda raw: raw.replace(b'"documents":', b'"documents":' + b"9" * 40, 1),
    ),
    "tokens cut": ("tokens", lambda raw: raw[:-1]),
    "tokens lost": ("tokens", lambda raw: b""),
    "tokens changed": ("tokens", lambda raw: raw[:50] + bytes([raw[50] ^ 1]) + raw[51:]),
    "tokens of a kill": ("tokens", lambda raw: raw + b"half a unit"),
    "lengths cut": ("lengths", lambda raw: raw[:-1]),
    "lengths changed": ("lengths", lambda raw: raw[:4] + b"\x01\x00\x00\x00" + raw[8:]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_the_disk_did_not_keep_is_done_anew(
    tmp_path: Path, inputs: tuple[Path, Path], case: str
) -> None:
    tokenizer, corpus = inputs
    settings = Settings(workers=1)
    prepare([corpus], tokenizer, tmp_path / "whole", settings)

    def run() -> None:
        die_before_step(30)
        prepare([corpus], tokenizer, tmp_path / "a", settings)

    assert in_a_child(run) == KILLED
    name, damage = DAMAGE[case]
    path = tmp_path / "a.work" / name
    assert path.read_bytes()
    path.write_bytes(damage(path.read_bytes()))
    prepare([corpus], tokenizer, tmp_path / "a", settings)
    for ending in ("bin", "idx"):
        whole = (tmp_path / f"whole.{ending}").read_bytes()
        assert (tmp_path / f"a.{ending}").read_bytes() == whole


def test_workers_and_parent_killed_at_random(tmp_path: Path) -> None:
    """The command with two workers, SIGKILL at moments drawn at random; no worker outlives it."""
    tokenizer, corpus = tmp_path / "bpe.json", tmp_path / "in.jsonl"
    text = (stdlib_root() / "json/decoder.py").read_text()
    train_tokenizer([text], tokenizer, 700)
    corpus.write_text((json.dumps({"text": text}) + "\n") * 1400)  # 3 units of 8 MB
    command = [sys.executable, "-m", "data_tools.cli", "prepare", str(corpus), "--workers", "2"]
    command += ["--tokenizer", str(tokenizer), "--out"]
    started = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    took = time.monotonic() - started
    draw = random.Random(os.urandom(8))
    kills, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        process = subprocess.Popen(
            [*command, str(tmp_path / "a")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            # Early in a whole run, so that at least the first is killed on a fast machine too.
            process.wait(timeout=draw.uniform(0.1, 0.5) * took if kills < 3 else None)
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        # The pipe closes when the last process that holds it has ended.
        try:
            printed = process.communicate(timeout=60)[0].decode()
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail("a worker outlived the run that started it")
        code = process.returncode
    assert code == 0, printed
    assert kills
    for ending in ("bin", "idx"):
        whole = (tmp_path / f"whole.{ending}").read_bytes()
        assert (tmp_path / f"a.{ending}").read_bytes() == whole


@pytest.mark.parametrize("moments", [(0.3,), (0.5,), (0.4, 0.1), (0.8, 0.3)])
def test_interrupted_from_the_keyboard(tmp_path: Path, moments: tuple[float, ...]) -> None:
    """Ctrl-C reaches all processes of a terminal. Twice, while the workers start or work: no
    process stays, and a line is said, not each process' last words."""
    tokenizer, corpus = tmp_path / "bpe.json", tmp_path / "in.jsonl"
    text = (stdlib_root() / "json/decoder.py").read_text()
    train_tokenizer([text], tokenizer, 700)
    corpus.write_text((json.dumps({"text": text}) + "\n") * 3000)
    command = [sys.executable, "-m", "data_tools.cli", "prepare", str(corpus), "--workers", "2"]
    command += ["--tokenizer", str(tokenizer), "--engine", "tokenizers", "--out"]
    process = subprocess.Popen(
        [*command, str(tmp_path / "a")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    while not (tmp_path / "a.work").exists():  # from here on it can tell
        time.sleep(0.001)
    for moment in moments:
        time.sleep(moment)
        os.killpg(process.pid, signal.SIGINT)
    try:
        printed = process.communicate(timeout=60)[0].decode()
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("a process went on")
    assert process.returncode in (130, -signal.SIGINT)  # the second one may meet its last moments
    assert (
        printed == "taid-data: interrupted; nothing was published, and the same command goes on\n"
    )


def test_two_runs_into_one_prefix(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    """The second is refused while the first works; killed, the first is no obstacle."""
    tokenizer, corpus = inputs
    plan = {"dtype": "uint16"}
    with Journal(tmp_path / "a", plan):
        with pytest.raises(DataError, match=r"a\.work: another run is working there"):
            prepare([corpus], tokenizer, tmp_path / "a", Settings(workers=1))
        prepare([corpus], tokenizer, tmp_path / "b", Settings(workers=1))

    def hold() -> None:
        Journal(tmp_path / "a", plan)
        time.sleep(60)

    pid = os.fork()
    if not pid:
        hold()
    while not (tmp_path / "a.work/journal.jsonl").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with pytest.raises(DataError, match="begun with other .*sources.*--restart"):
        prepare([corpus], tokenizer, tmp_path / "a", Settings(workers=1))
    prepare([corpus], tokenizer, tmp_path / "a", Settings(workers=1, restart=True))
    assert not (tmp_path / "a.work").exists()


def test_a_source_that_changed_is_not_mixed_in(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    tokenizer, original = inputs
    corpus = tmp_path / "b.jsonl"
    corpus.write_bytes(original.read_bytes())

    def run() -> None:
        die_before_step(30)
        prepare([corpus], tokenizer, tmp_path / "a", Settings(workers=1))

    assert in_a_child(run) == KILLED
    os.utime(corpus, ns=(1, 1))
    with pytest.raises(DataError, match=r"a\.work: begun with other sources"):
        prepare([corpus], tokenizer, tmp_path / "a", Settings(workers=1))

    def change(state: object) -> None:
        os.utime(corpus, ns=(2, 2))

    settings = Settings(workers=1, restart=True)
    with pytest.raises(DataError, match=r"b\.jsonl: changed while it was read; start over"):
        prepare([corpus], tokenizer, tmp_path / "a", settings, progress=change)
    assert not (tmp_path / "a.bin").exists()


def test_a_full_disk_keeps_what_is_done(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    """As far as a process can be refused by the disk without a disk: its files may not grow."""
    tokenizer, corpus = inputs
    prepare([corpus], tokenizer, tmp_path / "whole", Settings(workers=1))
    size = (tmp_path / "whole.bin").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            prepare([corpus], tokenizer, tmp_path / "a", Settings(workers=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.glob("a*")] == ["a.work"]
    said: list[str] = []
    prepare([corpus], tokenizer, tmp_path / "a", Settings(workers=1), say=said.append)
    assert "going on after unit" in said[-1]
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()

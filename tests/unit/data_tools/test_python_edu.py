"""Contents by blob id from a server that fails on purpose: all come, the deleted are recorded."""

import gzip
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import SimpleQueue

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import cli, python_edu
from data_tools.manifest import DataError
from data_tools.python_edu import FetchProgress, FetchSettings, fetch_python_edu
from data_tools.sources import Corpus

IDS = [f"{number:040x}" for number in range(30)]


class Failing(BaseHTTPRequestHandler):
    """Answers by the last hex digit of the id; a mishap happens on the first two asks only."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer is sent in several pieces
    asked: Counter[str] = Counter()
    broken: frozenset[str] = frozenset()

    def do_GET(self) -> None:
        blob_id = self.path.rpartition("/")[2]
        assert self.path == f"/content/{blob_id}"
        self.asked[blob_id] += 1
        body = gzip.compress(f"print({blob_id})\n".encode())
        special = {IDS[3]: b"", IDS[4]: b"x = '\xff'\n"}
        if blob_id in special:
            body = gzip.compress(special[blob_id])
        mishap = blob_id[-1] if self.asked[blob_id] <= 2 else ""
        if blob_id in self.broken:
            mishap = "a"
        if blob_id[-1] == "9":
            self.answer(404, b"")
        elif mishap == "a":
            self.answer(503, b"slow down")
        elif mishap == "b":
            self.close_connection = True  # no answer at all
        elif mishap == "c":
            self.answer(200, body[:-6], promised=len(body))
            self.close_connection = True
        elif mishap == "d":
            self.answer(200, body[:-6])
        elif mishap == "e":
            self.answer(200, b"not gzip")
        elif mishap == "f":
            self.answer(200, b"")
        else:
            self.answer(200, body)

    def answer(self, status: int, body: bytes, promised: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if promised is None else promised))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Failing, "asked", Counter())
    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/content"
        running.shutdown()


@pytest.fixture
def ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(python_edu, "PART_ROWS", 8)
    path = tmp_path / "ids.parquet"
    pq.write_table(pa.table({"blob_id": IDS, "score": [4.0] * 30}), path, row_group_size=5)
    return path


def settings(server: str, **changes: object) -> FetchSettings:
    values = {"endpoint": server, "connections": 4, "tries": 4, "first_wait": 0.001, **changes}
    return FetchSettings(**values)  # type: ignore[arg-type]


def texts(out: Path) -> list[str]:
    return [document.text for document in Corpus([out / "text"])]


def test_everything_comes_in_order_and_the_rest_is_named(
    tmp_path: Path, ids: Path, server: str
) -> None:
    seen: list[FetchProgress] = []
    done = fetch_python_edu([ids], tmp_path / "out", settings(server), seen.append)
    deleted = [blob_id for blob_id in IDS if blob_id[-1] == "9"]
    wanted = {blob_id: f"print({blob_id})\n" for blob_id in IDS if blob_id not in deleted}
    del wanted[IDS[3]]
    wanted[IDS[4]] = "x = ''\n"
    assert texts(tmp_path / "out") == list(wanted.values())
    notes = [
        json.loads(line)
        for path in sorted((tmp_path / "out/left-out").iterdir())
        for line in path.read_text().splitlines()
    ]
    assert [note["blob_id"] for note in notes] == [IDS[3], IDS[4], IDS[9], IDS[25]]
    assert [note["note"] for note in notes[::2]] == ["empty", "deleted"]
    assert [note["kept"] for note in notes] == [False, True, False, False]
    assert (done.contents, done.left_out, done.parts) == (27, 3, 4)
    assert seen[-1] == done
    assert all(Failing.asked[blob_id] == 1 for blob_id in deleted)
    assert Failing.asked[IDS[10]] == Failing.asked[IDS[15]] == 3


def test_a_second_call_goes_on(
    tmp_path: Path, ids: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_python_edu([ids], tmp_path / "whole", settings(server))
    monkeypatch.setattr(Failing, "asked", Counter())
    monkeypatch.setattr(Failing, "broken", frozenset({IDS[20]}))
    with pytest.raises(DataError, match=f"{IDS[20]}: no content after 4 tries .status 503"):
        fetch_python_edu([ids], tmp_path / "out", settings(server))
    assert len(list((tmp_path / "out/text").iterdir())) == 2
    monkeypatch.setattr(Failing, "broken", frozenset())
    fetch_python_edu([ids], tmp_path / "out", settings(server))
    assert Failing.asked[IDS[0]] == 1
    for path in (tmp_path / "whole").rglob("*.*"):
        other = tmp_path / "out" / path.relative_to(tmp_path / "whole")
        assert other.read_bytes() == path.read_bytes()


def test_bad_inputs_are_named(tmp_path: Path, ids: Path, server: str) -> None:
    (tmp_path / "a.txt").write_text("x")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"blob_id": ["ab", "../secret"]}), tmp_path / "evil.parquet")
    for name, fault in (
        ("a.txt", "not a Parquet file"),
        ("other.parquet", r"no column 'blob_id' \(it has: text\); give python-edu's Parquet"),
        ("evil.parquet", r"row 2: '../secret' is no blob id"),
    ):
        with pytest.raises(DataError, match=fault):
            fetch_python_edu([tmp_path / name], tmp_path / name[0], settings(server))
    with pytest.raises(DataError, match="not an http"):
        fetch_python_edu([ids], tmp_path / "b", settings("file:///etc"))
    fetch_python_edu([ids], tmp_path / "c", settings(server))
    with pytest.raises(DataError, match="begun with other inputs"):
        fetch_python_edu([tmp_path / "evil.parquet"], tmp_path / "c", settings(server))


def test_an_address_that_has_nothing_is_not_taken_for_deletions(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = [f"{number:039x}9" for number in range(16)]
    pq.write_table(pa.table({"blob_id": [*IDS[:8], *gone]}), tmp_path / "ids.parquet")
    monkeypatch.setattr(python_edu, "PART_ROWS", 8)
    monkeypatch.setattr(python_edu, "_ALL_GONE", 8)
    with pytest.raises(
        DataError, match=r"/content: none of 8 contents is there .deleted.; check --endpoint"
    ):
        fetch_python_edu([tmp_path / "ids.parquet"], tmp_path / "out", settings(server))
    assert len(list((tmp_path / "out/left-out").iterdir())) == 1
    monkeypatch.setattr(python_edu, "_ALL_GONE", 9)
    done = fetch_python_edu([tmp_path / "ids.parquet"], tmp_path / "out", settings(server))
    assert done.left_out == 17


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def parts_asked() -> set[int]:
    return {int(blob_id, 16) // 8 for blob_id in Failing.asked}


@pytest.mark.parametrize(
    "damage", ["no texts", "zero bytes", "cut off", "not JSON", "no object", "too many"]
)
def test_a_part_that_is_not_whole_is_fetched_again(
    tmp_path: Path, ids: Path, server: str, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    out = tmp_path / "out"
    done = fetch_python_edu([ids], out, settings(server))
    whole = content(out)
    left_out = out / "left-out/part-00001.jsonl"
    if damage == "no texts":
        (out / "text/part-00001.jsonl.gz").unlink()
    elif damage == "zero bytes":
        (out / "text/part-00001.jsonl.gz").write_bytes(b"")
    else:
        line = left_out.read_bytes()
        damaged = {"cut off": line[:-5], "not JSON": b"\xff\n", "no object": b"[1]\n"}
        left_out.write_bytes(damaged.get(damage, line * 9))
    monkeypatch.setattr(Failing, "asked", Counter())
    assert fetch_python_edu([ids], out, settings(server)) == done
    assert (content(out), parts_asked()) == (whole, {1})
    monkeypatch.setattr(Failing, "asked", Counter())
    assert fetch_python_edu([ids], out, settings(server)) == done
    assert not Failing.asked


def test_a_part_without_contents_is_done_without_texts(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of a part that is fetched again, texts that have gone since do not stay."""
    gone = [f"{number:039x}9" for number in range(3)]
    pq.write_table(pa.table({"blob_id": gone}), tmp_path / "ids.parquet")
    out = tmp_path / "out"
    fetch_python_edu([tmp_path / "ids.parquet"], out, settings(server))
    assert {*content(out)} == {"parts.json", "left-out/part-00000.jsonl"}
    monkeypatch.setattr(Failing, "asked", Counter())
    assert fetch_python_edu([tmp_path / "ids.parquet"], out, settings(server)).left_out == 3
    assert not Failing.asked
    (out / "text/part-00000.jsonl.gz").write_bytes(b"old")
    (out / "left-out/part-00000.jsonl").write_bytes(b"damaged")
    fetch_python_edu([tmp_path / "ids.parquet"], out, settings(server))
    assert {*content(out)} == {"parts.json", "left-out/part-00000.jsonl"}


def test_an_answer_of_zero_bytes_is_not_an_empty_content(
    tmp_path: Path, ids: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Failing, "do_GET", lambda request: request.answer(200, b""))
    with pytest.raises(DataError, match=r"no content after 4 tries \(status 200, 0 bytes\)"):
        fetch_python_edu([ids], tmp_path / "out", settings(server))


PLANS = {
    "missing": None,
    "empty": b"",
    "cut off": b"[[",
    "not UTF-8": b"\xff",
    "a number": b"7",
    "an object": b"{}",
    "short": b'[["a", 0]]',
    "deep": b"[" * 10**5,
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_parts_of_unknown_inputs_are_not_taken_up(
    tmp_path: Path, ids: Path, server: str, plan: bytes | None
) -> None:
    out = tmp_path / "out"
    fetch_python_edu([ids], out, settings(server))
    (out / "parts.json").unlink()
    if plan is not None:
        (out / "parts.json").write_bytes(plan)
    for folder in ("text", "left-out"):  # one of them is enough
        copy = shutil.copytree(out, tmp_path / folder)
        shutil.rmtree(out / folder)
        for held in (copy, out):
            before = content(held)
            with pytest.raises(DataError, match=r"parts.json: missing or damaged, so whose parts"):
                fetch_python_edu([ids], held, settings(server))
            assert content(held) == before
        shutil.rmtree(out)
        copy.rename(out)
    shutil.rmtree(out)
    assert fetch_python_edu([ids], out, settings(server)).contents == 27


def test_a_plan_without_parts_yet_stays(
    tmp_path: Path, ids: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Failing, "broken", frozenset(IDS))
    with pytest.raises(DataError, match="no content after"):
        fetch_python_edu([ids], tmp_path / "out", settings(server))
    assert {*content(tmp_path / "out")} == {"parts.json"}
    pq.write_table(pa.table({"blob_id": ["ab"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="begun with other inputs"):
        fetch_python_edu([tmp_path / "other.parquet"], tmp_path / "out", settings(server))


def test_parts_do_not_lie_among_the_inputs(tmp_path: Path, ids: Path, server: str) -> None:
    """The second call would take them for inputs."""
    folder = tmp_path / "in"
    folder.mkdir()
    ids.rename(folder / ids.name)
    for out in (folder, folder / "out"):
        with pytest.raises(DataError, match="lies in the input folder"):
            fetch_python_edu([folder], out, settings(server))
    assert [*content(folder)] == [ids.name]
    for _ in range(2):
        assert fetch_python_edu([str(folder / "*.parquet")], folder, settings(server)).parts == 4


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://127.0.0.1:abc",
        "http://127.0.0.1:99999/content",
        "http://[::1",
        "http://127.0.0.1/größe",
        "http://127.0.0.1/two words",
        f"http://{'a' * 64}.org/content",
        "http://a..org/content",
        "http://a b/content",
        "http://user:secret@127.0.0.1/content",
        "http://127.0.0.1/content?key=1",
        "http://127.0.0.1/content#part",
        "ftp://127.0.0.1/content",
        "127.0.0.1/content",
        "http:///content",
        "http://a\x00b/content",
        "",
    ],
)
def test_an_address_that_cannot_be_is_refused_at_once(
    tmp_path: Path, ids: Path, capsys: pytest.CaptureFixture[str], endpoint: str
) -> None:
    out = tmp_path / "out"
    command = ["fetch-python-edu", str(ids), "--out", str(out), "--endpoint", endpoint]
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n"), out.exists()) == (2, 1, False), error
    assert error.startswith(f"taid-data: {endpoint!r}: not an http(s) address (")
    assert error.endswith("); give another --endpoint\n")


@pytest.mark.parametrize(
    ("endpoint", "host", "port", "path"),
    [
        ("http://[::1]/a%20b/~c/", "::1", 80, "/a%20b/~c"),
        ("https://[fe80::1]:8443", "fe80::1", 8443, ""),
        ("HTTPS://müller.example/c", "xn--mller-kva.example", 443, "/c"),
    ],
)
def test_addresses_are_taken_as_they_are(endpoint: str, host: str, port: int, path: str) -> None:
    open_one, found = python_edu._opened(FetchSettings(endpoint=endpoint))
    connection = open_one()
    assert (connection.host, connection.port, found) == (host, port, path)


def test_no_threads_or_tries_are_refused(tmp_path: Path, ids: Path, server: str) -> None:
    for name in ("connections", "tries"):
        with pytest.raises(DataError, match="give numbers above 0"):
            fetch_python_edu([ids], tmp_path / "out", settings(server, **{name: 0}))


def test_after_a_failure_for_good_nothing_more_is_asked_for(
    tmp_path: Path, ids: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SlowForTheCaller(SimpleQueue):
        def get(self) -> object:
            answer = super().get()
            if threading.current_thread() is threading.main_thread():
                time.sleep(0.1)
            return answer

    monkeypatch.setattr(python_edu, "SimpleQueue", SlowForTheCaller)
    monkeypatch.setattr(Failing, "broken", frozenset({IDS[1]}))
    with pytest.raises(DataError, match=f"{IDS[1]}: no content after 4 tries"):
        fetch_python_edu([ids], tmp_path / "out", settings(server, connections=1))
    assert Failing.asked == {IDS[0]: 1, IDS[1]: 4}


def test_what_is_amiss_in_a_thread_is_told(
    tmp_path: Path, ids: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("decoding")

    monkeypatch.setattr(python_edu, "_decoded", fail)
    with pytest.raises(MemoryError, match="decoding"):
        fetch_python_edu([ids], tmp_path / "out", settings(server))


def test_an_interrupt_wakes_those_that_wait_for_another_try(
    tmp_path: Path, ids: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Failing, "broken", frozenset(IDS))
    before = {*threading.enumerate()}
    interrupted = threading.Event()

    def interrupt() -> None:
        while len(Failing.asked) < 4:
            time.sleep(0.01)
        interrupted.set()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        fetch_python_edu([ids], tmp_path / "out", settings(server, first_wait=60.0))
    began = time.monotonic()
    for thread in {*threading.enumerate()} - before:
        if thread.name.startswith("fetching"):
            thread.join(10)
    assert interrupted.is_set()
    assert time.monotonic() - began < 2
    assert sum(Failing.asked.values()) == 4


def interrupt_command(ids: Path, endpoint: str, is_time: Callable[[], bool]) -> None:
    """Ctrl-C ends the command within moments, with its code and one line."""
    command = [sys.executable, "-m", "data_tools.cli", "fetch-python-edu", str(ids)]
    command += ["--out", str(ids.parent / "out"), "--endpoint", endpoint]
    running = subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=os.environ)
    try:
        end = time.monotonic() + 60
        while not is_time() and time.monotonic() < end:
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        printed, error = running.communicate(timeout=5)
    finally:
        running.kill()
        running.communicate()
    assert (running.returncode, printed) == (130, "")
    assert error.startswith("taid-data: interrupted; ")
    assert error.count("\n") == 1


def test_ctrl_c_while_a_server_does_not_answer(ids: Path) -> None:
    """Some wait for an answer, the others for a connection: more than these are not queued."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}/content"

        def is_asked() -> bool:
            return bool(select.select([silent], [], [], 0)[0]) and time.sleep(0.5) is None

        interrupt_command(ids, endpoint, is_asked)


def test_ctrl_c_while_a_server_is_busy(
    ids: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Failing, "broken", frozenset(IDS))
    interrupt_command(ids, server, lambda: sum(Failing.asked.values()) > 100)

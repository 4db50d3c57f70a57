"""Contents by blob id from a server that fails on purpose: all come, the deleted are recorded."""

import gzip
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import python_edu
from data_tools.manifest import DataError
from data_tools.python_edu import FetchProgress, FetchSettings, fetch_python_edu
from data_tools.sources import Corpus

IDS = [f"{number:040x}" for number in range(30)]


class Failing(BaseHTTPRequestHandler):
    """Answers by the last hex digit of the id; a mishap happens on the first two asks only."""

    protocol_version = "HTTP/1.1"
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
        thread = threading.Thread(target=running.serve_forever, daemon=True)
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
    assert Failing.asked[IDS[10]] == 3


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
        ("other.parquet", "no column 'blob_id'"),
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

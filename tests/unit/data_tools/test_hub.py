"""A data set by name is its local copy; of a share, the files that hold it are fetched."""

import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from data_tools.hub import fetch_first_rows
from data_tools.manifest import DataError
from data_tools.prepare import Settings, prepare
from data_tools.presets import prepare_preset
from data_tools.sources import Corpus, find_sources
from data_tools.tokenizers import SentencePieceTokenizer, train_tokenizer

ADDRESS = "hf://datasets/owner/name"
REVISION = "5ha1"


class Hub:
    """Stands in for the client: a folder with the data set, and the cache that it fills."""

    def __init__(self, folder: Path):
        self.dataset, self.cache = folder / "dataset", folder / "cache"
        self.fetched: list[str] = []
        self.is_cut = False

    def dataset_info(self, name: str) -> SimpleNamespace:
        assert name == "owner/name"
        files = (path for path in self.dataset.rglob("*") if path.is_file())
        names = [path.relative_to(self.dataset).as_posix() for path in files]
        siblings = [SimpleNamespace(rfilename=name) for name in sorted(names, reverse=True)]
        return SimpleNamespace(sha=REVISION, siblings=siblings)

    def open(self, place: str) -> BinaryIO:
        return (self.dataset / place.removeprefix(f"datasets/owner/name@{REVISION}/")).open("rb")

    def download(
        self, name: str, repo_type: str, allow_patterns: list[str], revision: str | None
    ) -> str:
        """As the client: names are patterns. Without an answer it takes what its cache holds."""
        assert (name, repo_type) == ("owner/name", "dataset")
        assert revision == REVISION
        for path in sorted(self.dataset.rglob("*")):
            file = path.relative_to(self.dataset).as_posix()
            is_wanted = any(fnmatch(file, pattern) for pattern in allow_patterns)
            if path.is_file() and is_wanted and not self.is_cut:
                (self.cache / file).parent.mkdir(parents=True, exist_ok=True)
                (self.cache / file).write_bytes(path.read_bytes())
                self.fetched.append(file)
        return str(self.cache)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Nine files of 4, 5, ... 12 rows, below part/; one has brackets in its name."""
    hub = Hub(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.download)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.HfFileSystem", lambda: hub)
    (hub.dataset / "part").mkdir(parents=True)
    (hub.dataset / "README.md").write_text("about")
    for number in range(9):
        texts = [f"file {number} row {row}" for row in range(4 + number)]
        name = f"part/{number}.parquet" if number else "part/0-[v1].parquet"
        pq.write_table(pa.table({"text": texts}), hub.dataset / name)
    return hub


def test_a_data_set_is_fetched_by_name(hub: Hub) -> None:
    documents = [document.text for document in Corpus([f"{ADDRESS}/part"])]
    assert documents == [document.text for document in Corpus([hub.dataset / "part"])]
    assert [Path(name).suffix for name in hub.fetched] == [".parquet"] * 9


@pytest.mark.parametrize(("fraction", "files"), [(1e-9, 1), (4 / 72, 1), (0.0556, 2), (1.0, 9)])
def test_of_a_share_only_the_files_that_hold_it_are_fetched(
    hub: Hub, tokenizer: SentencePieceTokenizer, tmp_path: Path, fraction: float, files: int
) -> None:
    made = {}
    for name, given in (("local", hub.dataset / "part"), ("hub", f"{ADDRESS}/part")):
        settings = Settings(workers=1, fraction=fraction)
        manifest = prepare([given], tokenizer.path, tmp_path / name, settings)
        made[name] = [output.xxh3 for output in manifest.outputs]
        assert len(manifest.sources) == files
    assert made["hub"] == made["local"]
    assert len(hub.fetched) == files


def test_what_is_not_all_parquet_is_fetched_whole(hub: Hub) -> None:
    (hub.dataset / "part/.hidden.jsonl").write_text("x")
    assert fetch_first_rows([f"{ADDRESS}/part"], 0.01)[1] == 68
    (hub.dataset / "part/z.jsonl").write_text('{"text": "a"}\n')
    for inputs, fraction in (
        ([f"{ADDRESS}/part"], 0.01),
        ([f"{ADDRESS}/part"], None),
        ([f"{ADDRESS}/part", "x"], 0.01),
        ([hub.dataset], 0.01),
    ):
        assert fetch_first_rows(inputs, fraction) == (inputs, 0)


def test_a_preset_takes_each_part_from_where_it_is(
    hub: Hub, tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    for part in ("cosmopedia-v2", "fineweb-edu-dedup"):
        (hub.dataset / "part").rename(hub.dataset / part)
        (hub.dataset / part / "part").mkdir()  # of which nothing may be taken
        (hub.dataset / "part").mkdir()
        for number in range(3):
            pq.write_table(pa.table({"text": ["a"] * 9}), hub.dataset / f"part/{number}.parquet")
    local = tmp_path / "local"

    def run() -> dict:
        return prepare_preset(
            "smollm-corpus",
            [ADDRESS, local],
            tokenizer.path,
            tmp_path / "out",
            Settings(workers=1, fraction=0.1),
        )

    missing = f"fetch-python-edu {ADDRESS}/python-edu --out {local}/python-edu, or name the other"
    with pytest.raises(DataError, match=missing):
        run()
    with pytest.raises(DataError, match="out smollm-corpus/python-edu, and give smollm-corpus bes"):
        prepare_preset("smollm-corpus", [ADDRESS], tokenizer.path, tmp_path / "out", Settings())
    assert not hub.fetched
    (local / "python-edu/text").mkdir(parents=True)
    import gzip

    text = gzip.compress(b'{"text": "print(1)"}\n')
    (local / "python-edu/text/part-00000.jsonl.gz").write_bytes(text)
    assert [manifest.documents for manifest in run().values()] == [8, 3, 1]
    assert len(hub.fetched) == 3
    blend = yaml.safe_load((tmp_path / "out/blend.yaml").read_text())
    assert [Path(part["prefix"]).name for part in blend][2] == "python-edu"


def test_what_cannot_be_fetched_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="not hf://datasets/OWNER/NAME"):
        find_sources(["hf://datasets/owner"])
    (hub.dataset / "part/3.parquet").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"could not be fetched \(ArrowInvalid: .*or give a local"):
        fetch_first_rows([f"{ADDRESS}/part"], 0.01)

    def fail(*_: object, **__: object) -> str:
        raise OSError("no\nroute")

    monkeypatch.setattr(hub, "dataset_info", fail)
    for work in (lambda: find_sources([ADDRESS]), lambda: fetch_first_rows([ADDRESS], 0.1)):
        with pytest.raises(DataError, match=r"could not be fetched \(OSError: no route\)"):
            work()


def test_a_cache_of_some_files_is_not_the_data_set(hub: Hub) -> None:
    """Where the network goes in the middle, the client hands out what it has."""
    find_sources([f"{ADDRESS}/part"])
    (hub.cache / "part/5.parquet").unlink()
    hub.is_cut = True
    missing = r"1 files are missing after the download, part/5\.parquet among them; give the same"
    with pytest.raises(DataError, match=missing):
        find_sources([f"{ADDRESS}/part"])
    fetch_first_rows([f"{ADDRESS}/part"], 0.01)
    with pytest.raises(DataError, match=missing):
        fetch_first_rows([f"{ADDRESS}/part"], 0.9)


@pytest.mark.parametrize("share", [[], ["--fraction", "0.1"]])
def test_the_real_client_without_a_hub(tmp_path: Path, share: list[str]) -> None:
    """Nobody has imported any part of it before; no port answers at that address."""
    command = [sys.executable, "-m", "data_tools.cli", "prepare", f"{ADDRESS}/part", *share]
    command += ["--tokenizer", str(tmp_path / "a.json"), "--out", str(tmp_path / "a")]
    train_tokenizer(["some text"], tmp_path / "a.json", 258)
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"taid-data: {ADDRESS}/part: could not be fetched (")
    assert "AttributeError" not in last
    assert "or give a local copy" in last

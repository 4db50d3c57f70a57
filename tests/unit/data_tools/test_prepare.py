"""From texts to token files: right, described, repeatable, whoever does the work."""

import gzip
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import rows
from data_tools.engines import CheckedTokenizer
from data_tools.manifest import DataError, check_indexed, hash_file, idx_path, read_manifest
from data_tools.merge import split
from data_tools.prepare import Progress, Settings, prepare
from data_tools.tokenizers import SentencePieceTokenizer, TextError
from data_tools.units import Shard
from data_tools.verify import verify
from tests.unit.data_tools.test_engines import train as train_bpe

TEXTS = ["first\n\tdocument", "", "second <|endoftext|> document", "漢字 third"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "corpus.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose files are cut into some 40 units."""
    monkeypatch.setattr(rows, "PIECE_BYTES", 300)
    folder = tmp_path / "many"
    folder.mkdir()
    texts = [f"document {i}\n" + "some words to count " * (i % 7) for i in range(120)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    pq.write_table(pa.table({"text": texts}), folder / "c.parquet", row_group_size=5)
    return folder


def run(corpus: Path, tokenizer: SentencePieceTokenizer, out: Path, **options):
    settings = Settings(**{"text_column": "body", "skip_faults": True, "workers": 1, **options})
    return prepare([corpus], tokenizer.path, out, settings)


def content(prefix: Path) -> dict[str, bytes]:
    names = ("bin", "idx", "manifest.json")
    return {name: Path(f"{prefix}.{name}").read_bytes() for name in names}


def texts_of(prefix: Path, tokenizer: SentencePieceTokenizer) -> list[str]:
    files = check_indexed(prefix)
    documents = (files.document(number).tolist() for number in range(files.num_documents))
    return [tokenizer.decode(ids) for ids in documents]


@pytest.mark.parametrize("append_eod", [True, False])
def test_documents_come_back(
    corpus: Path, tokenizer: SentencePieceTokenizer, append_eod: bool
) -> None:
    out = corpus.parent.parent / "out" / "a.v1"
    run(corpus, tokenizer, out, append_eod=append_eod)
    files = verify(out).files
    texts = []
    for number in range(files.num_documents):
        ids = files.document(number).tolist()
        if append_eod:
            assert ids.pop() == tokenizer.eod_id
        assert tokenizer.eod_id not in ids
        texts.append(tokenizer.decode(ids))
    assert texts == [text for text in TEXTS if text]


def test_the_manifest_describes_the_run(corpus: Path, tokenizer: SentencePieceTokenizer) -> None:
    out = corpus.parent.parent / "a"
    manifest = run(corpus, tokenizer, out)
    assert manifest == read_manifest(out)
    assert (manifest.documents, manifest.empty_documents, manifest.skipped) == (3, 1, 1)
    assert manifest.skipped_rows == [f"{corpus}, row 2: empty text; mend or remove the row"]
    assert manifest.tokens == verify(out).files.num_tokens
    assert manifest.tokenizer == tokenizer.record()
    assert manifest.sources[0].xxh3 == hash_file(corpus)
    assert [output.name for output in manifest.outputs] == ["a.bin", "a.idx"]
    assert (manifest.engine, manifest.options.max_document_bytes) == ("sentencepiece", 32 << 20)
    assert sorted(path.name for path in out.parent.glob("a*")) == [
        "a.bin",
        "a.idx",
        "a.manifest.json",
    ]


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_the_workers(
    many: Path, tokenizer: SentencePieceTokenizer, tmp_path: Path, workers: int
) -> None:
    one = run(many, tokenizer, tmp_path / "one" / "a", text_column="text")
    run(many, tokenizer, tmp_path / "more" / "a", text_column="text", workers=workers)
    assert content(tmp_path / "one" / "a") == content(tmp_path / "more" / "a")
    texts = texts_of(tmp_path / "one" / "a", tokenizer)
    assert len(texts) == one.documents == 360
    assert [text.split("\n")[0] for text in texts] == [f"document {i}" for i in range(120)] * 3


@pytest.mark.parametrize("workers", [1, 2])
def test_a_token_budget_ends_with_the_document_that_reaches_it(
    many: Path, tokenizer: SentencePieceTokenizer, tmp_path: Path, workers: int
) -> None:
    run(many, tokenizer, tmp_path / "all", text_column="text")
    lengths = check_indexed(tmp_path / "all").sequence_lengths()
    budget = int(lengths[:99].sum()) + 1
    out = tmp_path / "some"
    manifest = run(many, tokenizer, out, text_column="text", token_budget=budget, workers=workers)
    assert manifest.documents == 100
    assert manifest.tokens == lengths[:100].sum()
    whole = Path(f"{tmp_path / 'all'}.bin").read_bytes()
    assert Path(f"{out}.bin").read_bytes() == whole[: 2 * manifest.tokens]
    assert [Path(record.name).name for record in manifest.sources] == ["a.jsonl"]
    exactly = run(many, tokenizer, out, text_column="text", token_budget=int(lengths[:100].sum()))
    assert exactly.documents == 100
    for bad, message in (({"token_budget": 0}, "above 0"), ({"shard": Shard(1, 2)}, "leave one")):
        with pytest.raises(DataError, match=message):
            run(many, tokenizer, out, **{"token_budget": 5, **bad})


@pytest.mark.parametrize(
    ("name", "fraction", "documents"),
    [
        ("c.parquet", 0.1, 12),
        ("c.parquet", 0.101, 13),
        ("c.parquet", 1.0, 120),
        ("a.jsonl", 0.5, 60),
    ],
)
def test_the_first_share_of_the_documents(
    many: Path,
    tokenizer: SentencePieceTokenizer,
    tmp_path: Path,
    name: str,
    fraction: float,
    documents: int,
) -> None:
    """Of tables exactly, rounded up; of lines those that start in that share of the bytes."""
    out = tmp_path / "a"
    manifest = run(many / name, tokenizer, out, text_column="text", fraction=fraction)
    assert abs(manifest.documents - documents) <= (2 if name == "a.jsonl" else 0)
    found = [text.split("\n")[0] for text in texts_of(out, tokenizer)]
    assert found == [f"document {i}" for i in range(manifest.documents)]
    with pytest.raises(DataError, match="tables together with other files"):
        run(many, tokenizer, out, text_column="text", fraction=0.5)
    with pytest.raises(DataError, match="fraction 0; give a number above 0"):
        run(many / name, tokenizer, out, text_column="text", fraction=0)


def test_the_default_stops_at_a_fault_and_a_second_call_may_skip_it(
    many: Path, tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    """Nothing of what was done before is lost."""
    with (many / "a.jsonl").open("a") as stream:
        stream.write('{"text": null}\n')
    out = tmp_path / "a"
    options = {"text_column": "text", "skip_faults": False}
    with pytest.raises(DataError, match=r"a\.jsonl, row 121: column 'text' is null"):
        run(many, tokenizer, out, **options)
    assert not Path(f"{out}.bin").exists()
    done = len(Path(f"{out}.work/journal.jsonl").read_text().splitlines())
    assert done > 10
    seen: list[Progress] = []
    settings = Settings(skip_faults=True, workers=1)
    manifest = prepare([many], tokenizer.path, out, settings, progress=seen.append)
    assert seen[0].bytes_resumed > 300 * 10
    assert (manifest.documents, manifest.skipped, manifest.empty_documents) == (360, 1, 0)
    assert "row 121: column 'text' is null" in manifest.skipped_rows[0]
    run(many, tokenizer, tmp_path / "b", text_column="text")
    assert Path(f"{out}.bin").read_bytes() == Path(f"{tmp_path / 'b'}.bin").read_bytes()


def test_unreadable_files_are_skipped_and_listed(
    many: Path, tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    (many / "d.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(DataError, match=r"d\.parquet: not a Parquet file"):
        run(many, tokenizer, tmp_path / "a", text_column="text", skip_faults=False)
    manifest = run(many, tokenizer, tmp_path / "a", text_column="text")
    assert manifest.skipped == 1
    assert "d.parquet: not a Parquet file" in manifest.skipped_rows[0]


def test_a_document_of_50_megabytes(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    """Above the limit that holds unless another is given: named with its size, or left out."""
    texts = ["before", "x" * 50_000_000, "after"]
    lines, table, file = (tmp_path / name for name in ("a.jsonl", "b.parquet", "c.txt"))
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pq.write_table(pa.table({"text": texts}), table)
    file.write_text(texts[1])
    for path, place in ((lines, ", row 2"), (table, ", row 2"), (file, "")):
        with pytest.raises(DataError) as caught:
            prepare([path], tokenizer.path, tmp_path / "a", Settings(workers=1, restart=True))
        assert str(caught.value) == (
            f"{path}{place}: a document of 50,000,000 bytes, above --max-document-mb 32; cut it, "
            "or raise the limit"
        )
    settings = Settings(workers=1, restart=True, skip_faults=True)
    manifest = prepare([lines, table, file], tokenizer.path, tmp_path / "a", settings)
    assert (manifest.documents, manifest.skipped, manifest.empty_documents) == (4, 3, 0)
    assert texts_of(tmp_path / "a", tokenizer) == ["before", "after"] * 2


def test_ids_beyond_the_vocabulary_are_never_written(
    many: Path, tokenizer: SentencePieceTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vocabulary decides the tokens' type: such an id might not even fit it."""
    encode = SentencePieceTokenizer.encode_batch

    def broken(self: SentencePieceTokenizer, texts: list[str]) -> list[np.ndarray]:
        found = encode(self, texts)
        seventh = ["document 7\n" in text for text in texts]
        return [ids + 70_000 * is_it for ids, is_it in zip(found, seventh, strict=True)]

    monkeypatch.setattr(SentencePieceTokenizer, "encode_batch", broken)
    with pytest.raises(DataError, match=r"a\.jsonl, row 8: token id 7\d+ lies outside the vocab"):
        run(many / "a.jsonl", tokenizer, tmp_path / "a", text_column="text")
    assert not list(tmp_path.glob("a.[!w]*"))


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_run_changes_nothing(
    corpus: Path, tokenizer: SentencePieceTokenizer, earlier: bool, workers: int
) -> None:
    folder = corpus.parent.parent
    if earlier:
        run(corpus, tokenizer, folder / "a")
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    with corpus.open("a") as stream:
        stream.write('{"body": "cut o')
    corpus.write_text(corpus.read_text().replace('""', '"not empty"'))
    with pytest.raises(DataError, match="row 5"):
        run(corpus, tokenizer, folder / "a", skip_faults=False, workers=workers)
    assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == before


def test_progress_reaches_the_end(
    many: Path, tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    lines: list[str] = []
    settings = Settings(workers=1)
    manifest = prepare(
        [many], tokenizer.path, tmp_path / "a", settings, progress=seen.append, say=lines.append
    )
    assert len(seen) > 30
    assert [state.tokens for state in seen] == sorted(state.tokens for state in seen)
    total = sum(path.stat().st_size for path in many.glob("*.jsonl*"))
    assert seen[-1].bytes_read == seen[-1].bytes_total > total
    assert (seen[-1].documents, seen[-1].tokens) == (manifest.documents, manifest.tokens)
    assert lines == ["engine: sentencepiece"]


def test_nothing_to_prepare(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"empty\.txt: zero bytes"):
        prepare([tmp_path / "empty.txt"], tokenizer.path, tmp_path / "a", Settings(workers=1))
    with pytest.raises(DataError, match=r"empty\.txt: no text in the inputs"):
        run(tmp_path / "empty.txt", tokenizer, tmp_path / "a")
    assert not list(tmp_path.glob("a.*[!k]"))


def test_a_forged_end_of_document_is_refused(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    """As where --eod-token names an ordinary token."""
    (tmp_path / "a.jsonl").write_text('{"text": "xyz"}\n{"text": "banana"}\n')
    piece = tokenizer.model.id_to_piece(int(tokenizer.encode_batch(["banana"])[0][0]))
    with pytest.raises(DataError, match=r"a\.jsonl, row 2: its text contains the end-of-document"):
        run(tmp_path / "a.jsonl", tokenizer, tmp_path / "a", text_column="text", eod_token=piece)


def test_both_engines_give_the_same_bytes(tmp_path: Path, corpus: Path) -> None:
    path = train_bpe(tmp_path / "bpe.json", "smollm")
    settings = {"text_column": "body", "skip_faults": True, "workers": 1}
    found = {}
    for engine in ("tokenizers", "tiktoken", "auto"):
        manifest = prepare([corpus], path, tmp_path / engine, Settings(**settings, engine=engine))
        found[engine] = [
            manifest.engine,
            *(content(tmp_path / engine)[name] for name in ("bin", "idx")),
        ]
    assert found["tiktoken"][1:] == found["tokenizers"][1:]
    assert found["auto"] == found["tiktoken"]
    assert [found[engine][0] for engine in ("tokenizers", "tiktoken")] == ["tokenizers", "tiktoken"]


def test_special_tokens_in_texts_are_parsed_where_asked(tmp_path: Path, corpus: Path) -> None:
    path = train_bpe(tmp_path / "bpe.json", "gpt2")
    counts = {}
    for parse in (False, True):
        settings = Settings(text_column="body", skip_faults=True, workers=1, parse_special=parse)
        prepare([corpus], path, tmp_path / "a", settings)
        tokens = np.fromfile(tmp_path / "a.bin", np.uint16)
        counts[parse] = int((tokens == 0).sum())
    assert counts == {False: 3, True: 4}


def test_a_difference_between_engines_stops_a_worker(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differ(self: CheckedTokenizer, texts: list[str]) -> list[np.ndarray]:
        raise TextError(0, "different ids")

    path = train_bpe(tmp_path / "bpe.json", "gpt2")
    monkeypatch.setattr(CheckedTokenizer, "encode_batch", differ)
    first = r"corpus\.jsonl, row 1: different ids"
    with pytest.raises(DataError, match=first):
        prepare([corpus], path, tmp_path / "a", Settings(text_column="body", workers=1))


def test_what_is_taken_as_made_before(
    corpus: Path, tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    """Sources of the same content by whatever time stamps; none that was left out in part."""
    out = tmp_path / "a"

    def is_reused(**changes: object) -> bool:
        said: list[str] = []
        options = {"text_column": "body", "workers": 1, "reuse": True, "skip_faults": True}
        settings = Settings(**{**options, **changes})  # type: ignore[arg-type]
        prepare([corpus], tokenizer.path, out, settings, say=said.append)
        return said == [f"{out}: already prepared"]

    assert not is_reused()
    assert is_reused()
    os.utime(corpus)  # later than the output
    assert is_reused()
    with pytest.raises(DataError, match="row 2: empty text"):
        is_reused(skip_faults=False)
    other = corpus.read_text().replace("third", "other")
    time.sleep(0.01)
    corpus.write_text(other)
    os.utime(corpus, ns=(1, 1))  # as a copy that keeps its original's times
    assert not is_reused()
    assert is_reused()
    assert "other" in texts_of(out, tokenizer)[-1]


@pytest.mark.parametrize("share", [{"fraction": 0.1}, {"token_budget": 10**9}, {}])
def test_files_that_came_later_are_not_left_out(
    tokenizer: SentencePieceTokenizer, tmp_path: Path, share: dict[str, object]
) -> None:
    """A tenth of more rows may lie in the same first file; a budget was not reached before."""
    out, folder = tmp_path / "a", tmp_path / "in"
    folder.mkdir()

    def documents() -> int:
        settings = Settings(workers=1, reuse=True, **share)  # type: ignore[arg-type]
        return prepare([folder], tokenizer.path, out, settings).documents

    for name, rows_there in (("a", 60), ("b", 256)):
        texts = [f"{name} {row}" for row in range(rows_there)]
        pq.write_table(pa.table({"text": texts}), folder / f"{name}.parquet")
        found = documents()
    assert found == (32 if "fraction" in share else 316)
    idx_path(out).unlink()
    assert documents() == found  # written anew
    verify(out)
    split(out, {"x": 0.5, "y": 0.5}, tmp_path / "s")
    for name in ("bin", "idx", "manifest.json"):
        Path(f"{tmp_path}/s-x.{name}").rename(f"{out}.{name}")
    assert documents() == found  # half of it is no part


def test_names_that_are_not_utf8(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    """Of a file, of the output, of a column in a fault: recorded escaped, never a traceback."""
    source, out = tmp_path / "in\udcff.jsonl", tmp_path / "out\udcfe"
    source.write_bytes(b'{"text": "good"}\n{"\\ud800": 1}\n')
    for _ in range(2):
        manifest = run(source, tokenizer, out, text_column="text", reuse=True)
    assert manifest == read_manifest(out)
    assert manifest.sources[0].name == str(source).replace("\udcff", "\\udcff")
    assert "in\\udcff.jsonl, row 2: no column 'text' (it has: \\ud800)" in manifest.skipped_rows[0]
    verify(out)


def test_where_the_output_cannot_be(
    corpus: Path, tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    """Told before any work, and nothing is left."""
    (tmp_path / "a.bin").mkdir()
    with pytest.raises(DataError, match=r"a\.bin: is a folder; give another --out"):
        run(corpus, tokenizer, tmp_path / "a")
    with pytest.raises(DataError, match="lies in the input folder .*; give an --out elsewhere"):
        run(corpus.parent, tokenizer, corpus.parent / "data" / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "in"]


def test_a_worker_that_dies_is_told(
    many: Path, tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    def kill_a_worker(state: Progress) -> None:
        for process in multiprocessing.active_children()[:1]:
            process.kill()

    settings = Settings(workers=2)
    with pytest.raises(ChildProcessError, match="a worker process died.*the same command goes on"):
        prepare([many], tokenizer.path, tmp_path / "a", settings, progress=kill_a_worker)
    assert not list((tmp_path / "a.work").glob("unit-*"))
    run(many, tokenizer, tmp_path / "a", text_column="text")
    run(many, tokenizer, tmp_path / "b", text_column="text")
    assert content(tmp_path / "a")["idx"] == content(tmp_path / "b")["idx"]


def test_a_worker_that_dies_at_work_names_its_files(
    tokenizer: SentencePieceTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a library ends the process over one file, the line leads to that file."""
    monkeypatch.setattr(rows, "PIECE_BYTES", 300)  # a unit each
    line = json.dumps({"text": "some words to count\n" * 400}) + "\n"
    for name in "ab":
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(line.encode() * 2000))

    def kill_the_workers() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until and not list(tmp_path.glob("out.work/unit-*.tokens")):
            time.sleep(0.01)
        for process in multiprocessing.active_children():
            process.kill()

    thread = threading.Thread(target=kill_the_workers, daemon=True)
    thread.start()
    with pytest.raises(ChildProcessError, match=r"\(at work on [^)]*[ab]\.jsonl\.gz\); the same"):
        prepare([tmp_path / "*.gz"], tokenizer.path, tmp_path / "out", Settings(workers=2))
    thread.join()


def test_memory_does_not_follow_the_corpus(
    tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    """Eight times the text, a few megabytes more at the most."""
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from data_tools import rows\n"
        "from data_tools.prepare import Settings, prepare\n"
        "rows.PIECE_BYTES = 1 << 18\n"
        "def peak(name, lines):\n"
        "    text = Path(json.__file__).read_text()\n"
        "    line = json.dumps({'text': text}) + '\\n'\n"
        "    with open(name, 'w') as stream:\n"
        "        stream.writelines(line for _ in range(lines))\n"
        "    prepare([name], sys.argv[1], name + '.out', Settings(workers=1))\n"
        "    status = Path('/proc/self/status').read_text()\n"
        "    return int(status.split('VmHWM:')[1].split()[0])\n"
        "first = peak(sys.argv[2] + '/a.jsonl', 60)\n"
        "print(peak(sys.argv[2] + '/b.jsonl', 480) - first)\n"
    )
    command = [sys.executable, "-c", code, str(tokenizer.path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 5 << 10  # KiB, where the text alone is 5.9 MB more

"""From texts to token files: right, described, repeatable, all or nothing."""

import json
from pathlib import Path

import pytest

from data_tools import prepare as prepare_module
from data_tools.manifest import DataError, hash_file, read_manifest
from data_tools.prepare import Progress, prepare
from data_tools.tokenizers import SentencePieceTokenizer
from data_tools.verify import verify

TEXTS = ["first\n\tdocument", "", "second <|endoftext|> document", "漢字 third"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "corpus.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    return path


def run(corpus: Path, tokenizer: SentencePieceTokenizer, out: Path, **options):
    return prepare([corpus], tokenizer, out, text_column="body", **options)


@pytest.mark.parametrize("append_eod", [True, False])
@pytest.mark.parametrize("batch_documents", [1, 3, 500])
def test_documents_come_back(
    corpus: Path, tokenizer: SentencePieceTokenizer, append_eod: bool, batch_documents: int
) -> None:
    out = corpus.parent.parent / "out" / "a.v1"
    run(corpus, tokenizer, out, append_eod=append_eod, batch_documents=batch_documents)
    files, _ = verify(out)
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
    assert (manifest.documents, manifest.empty_documents) == (3, 1)
    assert manifest.tokens == verify(out)[0].num_tokens
    assert manifest.tokenizer == tokenizer.record()
    assert manifest.sources[0].xxh3 == hash_file(corpus)
    assert [output.name for output in manifest.outputs] == ["a.bin", "a.idx"]


def test_the_same_inputs_give_the_same_bytes(
    corpus: Path, tokenizer: SentencePieceTokenizer
) -> None:
    folder = corpus.parent.parent
    found = []
    for _ in range(2):
        run(corpus, tokenizer, folder / "a")
        found.append({path.name: path.read_bytes() for path in folder.glob("a.*")})
    assert found[0] == found[1]
    assert set(found[0]) == {"a.bin", "a.idx", "a.manifest.json"}


@pytest.mark.parametrize("earlier", [True, False])
def test_a_failed_run_changes_nothing(
    corpus: Path, tokenizer: SentencePieceTokenizer, earlier: bool
) -> None:
    folder = corpus.parent.parent
    if earlier:
        run(corpus, tokenizer, folder / "a")
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    with corpus.open("a") as stream:
        stream.write('{"body": "cut o')
    with pytest.raises(DataError, match="row 5"):
        run(corpus, tokenizer, folder / "a", batch_documents=1)
    assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == before


def test_progress_reaches_the_end(corpus: Path, tokenizer: SentencePieceTokenizer) -> None:
    seen: list[Progress] = []
    manifest = run(corpus, tokenizer, corpus.parent / "a", batch_documents=1, progress=seen.append)
    assert len(seen) == len(TEXTS)
    assert seen[-1].bytes_read == seen[-1].bytes_total == corpus.stat().st_size
    assert (seen[-1].documents, seen[-1].tokens) == (manifest.documents, manifest.tokens)


def test_long_documents_end_a_batch(
    corpus: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "_BATCH_CHARACTERS", 10)
    seen: list[Progress] = []
    run(corpus, tokenizer, corpus.parent / "a", progress=seen.append)
    assert [state.documents for state in seen] == [1, 2, 3]


def test_nothing_to_prepare(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"empty\.txt: no text in the inputs"):
        prepare([tmp_path / "empty.txt"], tokenizer, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_a_forged_end_of_document_is_refused(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where --eod-token names an ordinary token."""
    monkeypatch.setattr(tokenizer, "eod_id", int(tokenizer.encode_batch(["a"])[0][0]))
    (tmp_path / "a.txt").write_text("banana")
    with pytest.raises(DataError, match=r"a\.txt: its text contains the end-of-document token"):
        prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "a")

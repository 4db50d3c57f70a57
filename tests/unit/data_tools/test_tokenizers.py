"""Texts come back exactly, special tokens cannot be forged, the end of document is not guessed."""

import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_tools.corpus import stdlib_root
from data_tools.manifest import DataError
from data_tools.tokenizers import (
    JsonTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)

AWKWARD = [
    "",
    "\n",
    "   ",
    "\n\n\n",
    "\tif x:\n\t\treturn 1\n",
    "def f(a):\n    if a:\n\n        return  a   # two  spaces \r\n",
    " leading and trailing ",
    "naïve façade, 漢字, 😀, e\u0301, \ufeff, \u2028, \x85, \xa0",
    "\x00 zero",
    "\u2581 the mark \u2581\u2581of a space\u2581",
    "<|endoftext|> <unk> <0x41> </s>",
]


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
@example(text="\u2581")
def test_any_text_round_trips(tokenizer: SentencePieceTokenizer, text: str) -> None:
    """Characters that were never seen become bytes."""
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod_id not in ids


def test_awkward_texts_and_source_files_round_trip(tokenizer: SentencePieceTokenizer) -> None:
    texts = AWKWARD + [
        path.read_bytes().decode() for path in sorted((stdlib_root() / "json").glob("*.py"))
    ]
    batch = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in batch] == texts
    assert not any((ids == tokenizer.eod_id).any() for ids in batch)
    assert max(ids.max(initial=0) for ids in batch) < tokenizer.vocab_size


def test_training_is_deterministic_and_says_what_it_made(
    tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    texts = ["one two three\n\tfour five\n" * 50, "six seven eight " * 50]
    for name in ("a.model", "b.model"):
        train_sentencepiece(iter(texts), tmp_path / name, 290)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    model = load_tokenizer(tmp_path / "a.model")
    assert (model.vocab_size, model.eod_id) == (290, 0)
    assert model.record().fingerprint != tokenizer.record().fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.model", "b.model"]


@pytest.mark.parametrize(
    ("texts", "vocab_size", "fault"),
    [
        ([], 300, "no text to train on"),
        ([""], 300, "no text to train on"),
        (["hello"], 100, "100 tokens cannot be learned"),
        (["hello"], 5000, "5000 tokens cannot be learned"),
    ],
)
def test_impossible_trainings_are_explained(
    tmp_path: Path, texts: list[str], vocab_size: int, fault: str
) -> None:
    with pytest.raises(DataError, match=fault) as caught:
        train_sentencepiece(texts, tmp_path / "a.model", vocab_size)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def foreign_model(path: Path, **options: object) -> Path:
    """A model made by other choices than ours, as a published one would be."""
    with path.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some words to learn, some other words " * 20]),
            model_writer=stream,
            vocab_size=300,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
            **options,
        )
    return path


def test_the_end_of_document_is_the_models_own(tmp_path: Path) -> None:
    path = foreign_model(tmp_path / "a.model", eos_id=5)
    assert load_tokenizer(path).eod_id == 5
    path = foreign_model(tmp_path / "b.model", eos_id=-1)
    with pytest.raises(DataError, match="no end-of-sentence id; name one: --eod-token"):
        load_tokenizer(path)
    assert load_tokenizer(path, eod_token="<s>").eod_id == 1
    with pytest.raises(DataError, match="no token '<nothing>'"):
        load_tokenizer(path, eod_token="<nothing>")


def test_foreign_models_encode_as_sentencepiece_does(tmp_path: Path) -> None:
    """Where a model adds a space of its own, texts are not cut around the mark of a space."""
    path = foreign_model(tmp_path / "a.model")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in ("some words", "some \u2581words\u2581"):
        (ids,) = load_tokenizer(path).encode_batch([text])
        assert ids.tolist() == reference.encode(text)


def json_tokenizer(path: Path, specials: list[str], max_length: int | None = None) -> Path:
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["some words to learn " * 20], trainer)
    if max_length:
        model.enable_truncation(max_length)
        model.enable_padding(length=max_length)
    model.save(str(path))
    return path


def test_json_tokenizers_keep_texts_whole(tmp_path: Path) -> None:
    """Special tokens stay text, and a stored truncation or padding is not applied."""
    model = load_tokenizer(json_tokenizer(tmp_path / "a.json", ["<|endoftext|>"], max_length=4))
    assert isinstance(model, JsonTokenizer)
    batch = model.encode_batch(AWKWARD)
    assert [model.decode(ids) for ids in batch] == AWKWARD
    assert not any((ids == model.eod_id).any() for ids in batch)
    assert model.vocab_size == len(json.loads(model.path.read_text())["model"]["vocab"])


@pytest.mark.parametrize(
    ("specials", "known"), [(["<bos>"], "none"), (["</s>", "<|endoftext|>"], "endoftext")]
)
def test_json_tokenizers_end_of_document_is_not_guessed(
    tmp_path: Path, specials: list[str], known: str
) -> None:
    path = json_tokenizer(tmp_path / "a.json", specials)
    with pytest.raises(DataError, match=f"which token ends a document.*{known}.*--eod-token"):
        load_tokenizer(path)
    assert load_tokenizer(path, eod_token=specials[0]).eod_id == 0
    with pytest.raises(DataError, match="no token '<nothing>'"):
        load_tokenizer(path, eod_token="<nothing>")


def test_a_bpe_that_would_leave_out_text_is_refused(tmp_path: Path) -> None:
    """Without a token for a character, and none for the unknown, it says nothing at all."""
    path = json_tokenizer(tmp_path / "a.json", ["<|endoftext|>"])
    written = json.loads(path.read_text())
    vocab, merges = written["model"]["vocab"], written["model"]["merges"]
    written["model"]["merges"] = [merge for merge in merges if "b" not in "".join(merge)]
    for token in [token for token in vocab if "b" in token]:
        del vocab[token]
    path.write_text(json.dumps(written))
    with pytest.raises(DataError, match=r"a\.json: a BPE without an unknown token that lacks 1 of"):
        load_tokenizer(path)
    written["model"]["unk_token"] = "<|endoftext|>"
    path.write_text(json.dumps(written))
    assert load_tokenizer(path).encode_batch(["b"])[0].size == 1
    written["model"] |= {"unk_token": None, "byte_fallback": True}
    path.write_text(json.dumps(written))
    with pytest.raises(DataError, match="lacks 243 of UTF-8's bytes, so it leaves out text"):
        load_tokenizer(path)


def test_a_blank_may_end_documents(tmp_path: Path) -> None:
    path = json_tokenizer(tmp_path / "a.json", ["\n"])
    assert load_tokenizer(path, eod_token="\n").eod_id == 0


def test_ids_are_no_matter_of_chance(tmp_path: Path) -> None:
    """A dropout that a training script has left in the file is not applied."""
    path = json_tokenizer(tmp_path / "a.json", ["<|endoftext|>"])
    whole = load_tokenizer(path).encode_batch(AWKWARD)
    written = json.loads(path.read_text())
    written["model"]["dropout"] = 0.9
    path.write_text(json.dumps(written))
    for _ in range(3):
        batch = load_tokenizer(path).encode_batch(AWKWARD)
        assert [ids.tolist() for ids in batch] == [ids.tolist() for ids in whole]


def test_unusable_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zero.model").touch()
    for eod_token in (None, "</s>"):
        with pytest.raises(DataError, match=r"zero\.model: zero bytes; give another"):
            load_tokenizer(tmp_path / "zero.model", eod_token=eod_token)
    with pytest.raises(DataError, match=r"--eod-token '\\udcff': not UTF-8; give another"):
        load_tokenizer(tmp_path / "zero.model", eod_token="\udcff")
    for name, fault in [("a.model", "not a sentencepiece"), ("a.json", "not a tokenizer.json")]:
        (tmp_path / name).write_text("nonsense")
        with pytest.raises(DataError, match=f"{name}: {fault}"):
            load_tokenizer(tmp_path / name)
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match="unknown kind of tokenizer"):
        load_tokenizer(tmp_path / "a.txt")
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(tmp_path / "b.model")
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(DataError, match="pip install tokenizers"):
        load_tokenizer(tmp_path / "a.json")

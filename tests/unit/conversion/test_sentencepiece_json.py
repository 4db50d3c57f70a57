"""A sentencepiece model as tokenizer.json: the same ids, the same text back."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers

from data_tools.tokenizers import END_OF_TEXT, train_sentencepiece
from taid_megatron.config.errors import UserError
from taid_megatron.conversion.companions import write_companions
from taid_megatron.conversion.sentencepiece_json import convert

TEXTS = [
    path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py"))
]
TEXTS += [Path(__file__).read_text(encoding="utf-8")]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as `taid-data tokenizer` trains it."""
    model = tmp_path_factory.mktemp("own") / "tokenizer.model"
    train_sentencepiece(TEXTS, model, 800)
    return model


def trained(path: Path, **options) -> Path:
    """A model with sentencepiece's own defaults, as Llama 2 and T5 have them."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXTS for line in text.splitlines()),
        model_writer=model,
        vocab_size=700,
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


def pieces(text: str) -> list[str]:
    """Lines, and windows that begin and end anywhere, white space included."""
    windows = [text[start : start + 97] for start in range(0, len(text), 89)]
    return [*text.splitlines(), *windows]


@pytest.mark.parametrize("kind", ["own", "bpe", "unigram", "bpe, plain"])
def test_the_same_ids(own: Path, tmp_path: Path, kind: str):
    options = {"model_type": kind.split(",")[0]}
    if kind == "bpe, plain":
        options |= {
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "add_dummy_prefix": False,
            "user_defined_symbols": "<tool>,<|end|>",
        }
    model = own if kind == "own" else trained(tmp_path / "other.model", **options)
    convert(model, tmp_path / "tokenizer.json")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ours = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    compared = 0
    for text in (piece for whole in TEXTS for piece in pieces(whole)):
        if "\u2581" in text:
            continue  # stands for a space in one, for itself in the other
        ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False).ids == ids, text
        assert ours.decode(ids) == theirs.decode(ids)
        compared += 1
    assert compared > 500


def test_transformers_reads_it_with_its_special_tokens(own: Path, tmp_path: Path):
    ids = write_companions(own, tmp_path, vocab_size=800)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert ids == {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(own))
    text = "for name in names:\n    print(name)"
    assert tokenizer(text).input_ids == processor.encode(text)
    assert tokenizer.eos_token == END_OF_TEXT
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 0


def test_what_would_give_other_ids_is_refused(own: Path, tmp_path: Path, monkeypatch):
    from taid_megatron.conversion import sentencepiece_json

    monkeypatch.setattr(sentencepiece_json, "_merges", lambda *args: [])
    with pytest.raises(UserError, match=r"has no equal tokenizer.json \('The quick brown fox"):
        convert(own, tmp_path / "tokenizer.json")
    assert not (tmp_path / "tokenizer.json").exists()
    monkeypatch.undo()
    # the space in front of a text would come again behind every symbol
    symbols = trained(tmp_path / "s.model", model_type="bpe", user_defined_symbols="<tool>")
    with pytest.raises(UserError, match=r"no equal tokenizer.json \('before<tool>after"):
        convert(symbols, tmp_path / "tokenizer.json")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        convert(tmp_path / "bad.model", tmp_path / "tokenizer.json")

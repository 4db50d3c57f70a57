from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import torch

from taid_megatron.config.errors import UserError
from taid_megatron.evaluation.figures import NOT_ASKED
from taid_megatron.evaluation.last_word import LastWords, read_texts


@pytest.fixture
def tokenizer() -> tokenizers.Tokenizer:
    """One token per letter, a space belonging to the letter behind it."""
    letters = [f"{space}{chr(97 + i)}" for space in ("", "_") for i in range(26)]
    model = tokenizers.models.WordLevel({letter: i for i, letter in enumerate(letters)}, "a")
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.Replace(" ", "_")
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("_?[a-z]"), "isolated")
    return made


def ids(text: str) -> list[int]:
    return [
        ord(letter) - 97 + (26 if text[place - 1 : place] == " " else 0)
        for place, letter in enumerate(text)
        if letter != " "
    ]


def test_labels_are_on_the_last_word(tokenizer):
    sample = LastWords(["ab cd efg\n"], tokenizer, seq_length=10)[0]
    whole = ids("ab cd efg")
    assert sample["tokens"].tolist() == whole[:-1] + [0] * 4
    assert sample["labels"].tolist() == [NOT_ASKED] * 3 + whole[-3:] + [NOT_ASKED] * 4
    assert sample["loss_mask"].tolist() == [0.0] * 5 + [1.0] + [0.0] * 4
    assert sample["position_ids"].tolist() == [*range(10)]
    assert {name: part.dtype for name, part in sample.items()} == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.float32,
        "position_ids": torch.int64,
    }


def test_a_long_text_keeps_its_end(tokenizer):
    sample = LastWords(["a b c d e fg"], tokenizer, seq_length=4)[0]
    whole = ids("a b c d e fg")
    assert sample["tokens"].tolist() == whole[-5:-1]
    assert sample["labels"].tolist() == [NOT_ASKED] * 2 + whole[-2:]
    with pytest.raises(UserError, match="'b cdefg' is 5 of 6 tokens; leave this text out"):
        LastWords(["b cdefg"], tokenizer, seq_length=4)


def test_filling_samples_are_not_asked(tokenizer):
    words = LastWords(["a b", "c d", "e f"], tokenizer, seq_length=4, pad_to=4)
    assert (len(words), words.asked) == (4, 3)
    assert words[3]["loss_mask"].sum() == 0
    assert (words[3]["labels"] == NOT_ASKED).all()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "is empty"),
        (['{"text": "a b"}', "{"], "line 2: expected"),
        (['{"words": "a b"}'], "line 1: expected"),
        (["[1]"], "line 1"),
        (['{"text": "alone"}'], "two words or more"),
    ],
)
def test_bad_lines_are_refused(tmp_path: Path, lines: list[str], words: str):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=words):
        read_texts(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_texts(tmp_path / "absent.jsonl")


def test_texts_come_in_order(tmp_path: Path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n\n".join(json.dumps({"text": text}) for text in ("a b", "ü c")))
    assert read_texts(path) == ["a b", "ü c"]

"""Texts whose last word is to be guessed, from local JSON lines (LAMBADA's form: {"text": ...})."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from taid_megatron.config.errors import UserError
from taid_megatron.evaluation.figures import NOT_ASKED


def read_texts(path: Path) -> list[str]:
    """The `text` of each line. Raises UserError naming the line that has none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a file of JSON lines") from None
    texts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str) or len(text.split()) < 2:
            raise UserError(
                f'{path}, line {number}: expected {{"text": "..."}} with two words or more; mend it'
            )
        texts.append(text)
    if not texts:
        raise UserError(f"{path}: is empty; give at least one text")
    return texts


class LastWords(Dataset):
    """Each text as tokens, with labels on its last word alone; `pad_to` texts, the rest unasked.

    As the trainer's samples: tokens, labels, position_ids int64 [S], loss_mask float32 [S]. A text
    that is longer than seq_length keeps its end.
    """

    def __init__(self, texts: list[str], tokenizer: Any, seq_length: int, pad_to: int = 1) -> None:
        self.rows = [_encode(text, tokenizer, seq_length) for text in texts]
        self.seq_length = seq_length
        self.asked = len(texts)
        missing = -len(texts) % pad_to
        self.rows += [([0, 0], 0)] * missing

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """One text, padded at the end, where causal attention does not see it."""
        ids, word = self.rows[number]
        sample = {
            "tokens": torch.zeros(self.seq_length, dtype=torch.int64),
            "labels": torch.full((self.seq_length,), NOT_ASKED),
            "loss_mask": torch.zeros(self.seq_length),
            "position_ids": torch.arange(self.seq_length),
        }
        last = len(ids) - 1
        sample["tokens"][:last] = torch.tensor(ids[:-1])
        if word:
            sample["labels"][last - word : last] = torch.tensor(ids[-word:])
            sample["loss_mask"][last - 1] = 1.0
        return sample


def _encode(text: str, tokenizer: Any, seq_length: int) -> tuple[list[int], int]:
    """Ids of the text's end, at most seq_length + 1, and how many of them are the last word's."""
    text = text.rstrip()
    context = text[: -len(text.split()[-1])].rstrip()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    # as lm-eval does: what the whole text has beyond its context
    word = len(ids) - len(tokenizer.encode(context, add_special_tokens=False).ids)
    if not 0 < word < len(ids) or word > seq_length:
        raise UserError(
            f"the last word of {text[-60:]!r} is {word} of {len(ids)} tokens; leave this text out, "
            "or give a longer --seq-length"
        )
    return ids[-(seq_length + 1) :], word

from pathlib import Path

import pytest

from data_tools.corpus import stdlib_root
from data_tools.sources import Corpus, sample_texts
from data_tools.tokenizers import SentencePieceTokenizer, load_tokenizer, train_sentencepiece


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model of 600 tokens, learned from some of Python's own source files."""
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    texts = sample_texts(Corpus([stdlib_root() / "json", stdlib_root() / "email"]), 300_000)
    train_sentencepiece(texts, path, 600)
    return path


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> SentencePieceTokenizer:
    model = load_tokenizer(model_path, threads=1)
    assert isinstance(model, SentencePieceTokenizer)
    return model

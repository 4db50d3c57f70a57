"""Secrets of the environment and in URLs are known in any text; what only looks like one is not."""

from __future__ import annotations

import pytest

from taid_megatron.config.errors import ConfigError, UserError
from taid_megatron.config.load import from_tree
from taid_megatron.config.secrets import found, hidden

TOKEN = "hf_" + "aB3" * 11


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "w+x/y=z-secret")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "truefalse")
    monkeypatch.setenv("SHORT_TOKEN", "true")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("key 0123456789abcdef, w+x/y=z-secret!", "key ***, ***!"),
        (f"401 for {TOKEN}", "401 for ***"),
        ("https://me:pass@host/model", "https://***@host/model"),
        ("s3://AKIAABCDEFGHIJKLMNOP@bucket", "s3://***@bucket"),
        ("http://h/f?rev=1&token=abc&x=1", "http://h/f?rev=1&***&x=1"),
        ("sk-proj-" + "x1" * 15, "***"),
        ("ghp_" + "A1b2" * 9, "***"),
    ],
)
def test_a_secret_is_blotted_out(text: str, shown: str) -> None:
    assert hidden(text) == shown
    assert str(UserError(text)) == shown


@pytest.mark.parametrize(
    "text",
    [
        "truefalse",
        "true",
        "hf://datasets/OWNER/NAME@main",
        "data/hf_tokenizers_of_many_languages",
        "data/sk-learn-documents-of-2024-in-english",
        "run/monkey=business&token of love",
        "https://host/model?revision=1234567890abcdef",
        "2048 tokens, keys: a, b",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert hidden(text) == text
    assert found({"section": {"key": text}}) is None


def test_a_configuration_with_a_secret_is_refused_by_key_alone() -> None:
    assert (
        found({"a": {"b": [{"c": "x0123456789abcdef"}]}})
        == "a.b.c holds the value of $WANDB_API_KEY"
    )
    tree = {"student": {"hf": "https://me:verysecret@host/model"}}
    with pytest.raises(ConfigError, match=r"student\.hf holds a password or token") as error:
        from_tree(tree, "run.yaml")
    assert "verysecret" not in str(error.value)
    with pytest.raises(ConfigError, match=r"run\.folder holds") as error:
        from_tree({}, "run.yaml", [f"run.folder=runs/{TOKEN}"])
    assert TOKEN not in str(error.value)

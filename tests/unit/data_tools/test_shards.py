"""Parts of the work for several machines: merged, they are what one run writes."""

import shutil
from pathlib import Path

import pytest

from data_tools import rows
from data_tools.manifest import DataError
from data_tools.merge import merge
from data_tools.tokenizers import SentencePieceTokenizer
from data_tools.units import Shard
from data_tools.verify import verify
from tests.unit.data_tools.test_prepare import content, corpus, many, run  # noqa: F401 - fixtures


def test_shards_laid_one_after_the_other_are_the_whole(
    many: Path,  # noqa: F811
    tokenizer: SentencePieceTokenizer,
    tmp_path: Path,
) -> None:
    run(many, tokenizer, tmp_path / "whole", text_column="text")
    joined = b""
    sources = []
    for index in (1, 2, 3):
        out = tmp_path / f"part{index}"
        manifest = run(many, tokenizer, out, text_column="text", shard=Shard(index, 3))
        assert manifest.options.shard == f"{index}/3"
        joined += Path(f"{out}.bin").read_bytes()
        sources += [Path(record.name).name for record in manifest.sources]
    assert joined == Path(f"{tmp_path / 'whole'}.bin").read_bytes()
    assert sorted({*sources}) == ["a.jsonl", "b.jsonl.gz", "c.parquet"]
    assert len(sources) > 3  # a file between two shards is named by both
    for shard in (Shard(0, 2), Shard(3, 2)):
        with pytest.raises(DataError, match="give i/n with i from 1 to n"):
            run(many, tokenizer, tmp_path / "x", shard=shard)


def test_shards_of_other_inputs_are_not_merged(
    many: Path,  # noqa: F811
    tokenizer: SentencePieceTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(many, tokenizer, tmp_path / "a", text_column="text", shard=Shard(1, 2))
    (many / "d.jsonl").write_text('{"text": "new"}\n')
    run(many, tokenizer, tmp_path / "b", text_column="text", shard=Shard(2, 2))
    with pytest.raises(DataError, match="another cut of the sources than .*; give shards of one"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    monkeypatch.setattr(rows, "PIECE_BYTES", 500)  # by another version, say
    run(many, tokenizer, tmp_path / "a", text_column="text", shard=Shard(1, 2))
    with pytest.raises(DataError, match="another cut of the sources than .*; give shards of one"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    monkeypatch.setattr(rows, "PIECE_BYTES", 300)
    shutil.copytree(many, tmp_path / "elsewhere" / "many")
    run(
        tmp_path / "elsewhere/many",
        tokenizer,
        tmp_path / "a",
        text_column="text",
        shard=Shard(1, 2),
    )
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    run(many, tokenizer, tmp_path / "d", text_column="text")
    assert content(tmp_path / "c")["bin"] == content(tmp_path / "d")["bin"]


def test_a_shard_may_have_nothing_to_do(
    corpus: Path,  # noqa: F811
    tokenizer: SentencePieceTokenizer,
    tmp_path: Path,
) -> None:
    """Fewer units than machines: the shards are merged all the same."""
    run(corpus, tokenizer, tmp_path / "whole")
    prefixes = [tmp_path / f"part{index}" for index in (1, 2, 3)]
    documents = [
        run(corpus, tokenizer, prefix, shard=Shard(index, 3), engine="auto").documents
        for index, prefix in enumerate(prefixes, start=1)
    ]
    assert sorted(documents) == [0, 0, 3]
    for prefix in prefixes:
        verify(prefix)
    merge(prefixes, tmp_path / "merged")
    for name in ("bin", "idx"):
        assert content(tmp_path / "merged")[name] == content(tmp_path / "whole")[name]

"""Merged shards are what one run writes; a split loses and doubles nothing; verify checks all."""

import gc
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import yaml

from data_tools import verify as verify_module
from data_tools.blend import write_blend
from data_tools.indexed_writer import IndexedWriter
from data_tools.lengths import document_lengths, histogram_text
from data_tools.manifest import (
    HEADER,
    DataError,
    Manifest,
    check_indexed,
    manifest_path,
    read_manifest,
    write_manifest,
)
from data_tools.merge import merge, split
from data_tools.prepare import Settings, prepare
from data_tools.tokenizers import SentencePieceTokenizer
from data_tools.units import Shard
from data_tools.verify import verify
from taid_megatron.config.load import load
from tests.unit.data_tools.test_indexed_writer import full_disk
from tests.unit.data_tools.test_manifest import HASH
from tests.unit.data_tools.test_prepare import content, many  # noqa: F401 - a fixture


def write(
    prefix: Path,
    documents: list[list[list[int]]],
    *,
    fingerprint: str = HASH,
    options: Mapping[str, object] = MappingProxyType({}),
    **fields: object,
) -> Path:
    """Documents as sequences of ids; 0 ends a document. options, fields: of the manifest."""
    with IndexedWriter(prefix, 100) as writer:
        for sequences in documents:
            tokens = np.array([token for sequence in sequences for token in sequence], dtype=int)
            writer.add_document(tokens, name="x", lengths=[len(part) for part in sequences])
        outputs = writer.finish()
    record = {
        "sources": [{"name": str(prefix), "bytes": 0, "xxh3": HASH}],
        "tokenizer": {
            "kind": "sentencepiece",
            "name": "a.model",
            "fingerprint": fingerprint,
            "vocab_size": 100,
            "eod_id": 0,
        },
        "options": {"text_column": "text", "append_eod": True, **options},
        "dtype": "uint16",
        "documents": len(documents),
        "empty_documents": 1,
        "skipped": 1,
        "skipped_rows": [f"{prefix}: empty"],
        "tokens": writer.num_tokens,
        "outputs": outputs,
        "versions": {},
        **fields,
    }
    write_manifest(prefix, Manifest.model_validate(record))
    return prefix


FIRST = [[[1, 2, 0]], [[3], [4, 0]]]
SECOND = [[[5, 0]], [[6, 7, 8, 0]], [[9, 0]]]


def documents_of(prefix: Path) -> list[list[int]]:
    files = check_indexed(prefix, deep=True)
    return [files.document(number).tolist() for number in range(files.num_documents)]


def test_merged_shards_are_what_one_run_writes(
    many: Path,  # noqa: F811
    tokenizer: SentencePieceTokenizer,
    tmp_path: Path,
) -> None:
    prefixes = []
    whole = prepare([many], tokenizer.path, tmp_path / "whole", Settings(workers=1))
    for index in (1, 2, 3):
        prefixes.append(tmp_path / f"part{index}")
        prepare([many], tokenizer.path, prefixes[-1], Settings(workers=1, shard=Shard(index, 3)))
    merged = merge(prefixes, tmp_path / "merged")
    for name in ("bin", "idx"):
        assert content(tmp_path / "merged")[name] == content(tmp_path / "whole")[name]
    assert merged == read_manifest(tmp_path / "merged")
    assert [output.xxh3 for output in merged.outputs] == [one.xxh3 for one in whole.outputs]
    same = {"sources", "options", "documents", "tokens", "tokenizer", "skipped"}
    assert merged.model_dump(include=same) == whole.model_dump(include=same)
    for wrong in ([0, 2, 1], [0, 1]):
        with pytest.raises(DataError, match="give all of one run, from the first to the last"):
            merge([prefixes[number] for number in wrong], tmp_path / "wrong")


def test_merging_keeps_documents_of_several_sequences(tmp_path: Path) -> None:
    merged = merge([write(tmp_path / "a", FIRST), write(tmp_path / "b", SECOND)], tmp_path / "c")
    assert documents_of(tmp_path / "c") == [[1, 2, 0], [3, 4, 0], [5, 0], [6, 7, 8, 0], [9, 0]]
    assert check_indexed(tmp_path / "c").sequence_lengths().tolist() == [3, 1, 2, 2, 4, 2]
    assert (merged.documents, merged.skipped, merged.empty_documents) == (5, 2, 2)
    assert merged.derived_from == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert len(merged.sources) == 2
    assert "hashes" in verify(tmp_path / "c").checked


SOURCE = {"name": "c.jsonl", "bytes": 9, "xxh3": HASH}
SHARD = {"text_column": "text", "append_eod": True, "max_document_bytes": 100, "fraction": 0.5}


def shard(folder: Path, index: int, **changes: object) -> Path:
    """One of two shards of a run that read one file; with what is other in its manifest."""
    fields = {"sources": [SOURCE], "plan": HASH, "engine": "tokenizers", **changes}
    options = {**SHARD, "shard": f"{index}/2", **fields.pop("options", {})}
    return write(folder / f"part{index}", FIRST, options=options, **fields)


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        ({"plan": "1" * 32}, "another cut of the sources than"),
        ({"plan": None}, "another cut of the sources than"),
        ({"options": {"text_column": "body"}}, "another text_column than"),
        ({"options": {"fraction": 0.25}}, "another fraction than"),
        ({"options": {"max_document_bytes": None}}, "another max_document_bytes than"),
        ({"sources": [{**SOURCE, "xxh3": "1" * 32}]}, "c.jsonl is not what another shard has read"),
    ],
)
def test_shards_of_another_run_are_not_merged(
    tmp_path: Path, changes: dict[str, object], other: str
) -> None:
    parts = [shard(tmp_path, 1), shard(tmp_path, 2, **changes)]
    with pytest.raises(DataError, match=rf"part2\.manifest\.json: {other}"):
        merge(parts, tmp_path / "x")
    assert not list(tmp_path.glob("x*"))


def test_shards_may_differ_in_what_computed_them(tmp_path: Path) -> None:
    """Both computers are named."""
    first = shard(tmp_path, 1, versions={"numpy": "1", "pyarrow": "3"})
    second = shard(tmp_path, 2, engine="tiktoken", versions={"numpy": "2"})
    merged = merge([first, second], tmp_path / "m")
    assert (merged.plan, merged.engine) == (HASH, "tokenizers, tiktoken")
    assert merged.versions == {"numpy": "1, 2", "pyarrow": "3"}
    assert merged.options.model_dump(exclude_defaults=True) == SHARD


def test_of_several_corpora_only_what_is_true_of_all_is_told(tmp_path: Path) -> None:
    first = write(tmp_path / "a", FIRST, options={"fraction": 0.5, "token_budget": 6}, plan=HASH)
    options = {"text_column": "body", "fraction": 0.25, "token_budget": 6}
    merged = merge([first, write(tmp_path / "b", SECOND, options=options)], tmp_path / "m")
    told = {"text_column": "text, body", "append_eod": True, "token_budget": 6}
    assert merged.options.model_dump(exclude_defaults=True) == told
    assert merged.plan is None


def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def test_what_does_not_belong_together_is_not_merged(tmp_path: Path) -> None:
    a = write(tmp_path / "a", FIRST)
    other = write(tmp_path / "other", SECOND, fingerprint="1" * 32)
    without = write(tmp_path / "without", SECOND, options={"append_eod": False})
    special = write(tmp_path / "special", SECOND, options={"parse_special": True})
    damaged = write(tmp_path / "damaged", SECOND)
    flip(Path(f"{damaged}.bin"), 4)
    uncut = write(tmp_path / "uncut", SECOND)
    flip(Path(f"{uncut}.idx"), HEADER.size)  # the length of its first sequence
    bare = write(tmp_path / "bare", SECOND)
    manifest_path(bare).unlink()
    for second, fault in (
        (other, "another tokenizer than"),
        (without, "another end of document than"),
        (special, "another --parse-special than"),
        (damaged, r"damaged\.bin: its content .* is not what the manifest describes"),
        (uncut, r"uncut\.idx: its content .* is not what the manifest describes"),
        (bare, "which tokenizer made the data is not known"),
    ):
        with pytest.raises(DataError, match=fault):
            merge([a, second], tmp_path / "x")
    with pytest.raises(DataError, match=r"damaged\.bin: its content .* is not what the manifest"):
        merge([damaged, a], tmp_path / "x")
    for prefix, name in ((damaged, "bin"), (uncut, "idx")):
        with pytest.raises(DataError, match=rf"\.{name}: its content .* is not what the manifest"):
            split(prefix, {"a": 0.5, "b": 0.5}, tmp_path / "x")
    for prefixes, out, fault in (([a], tmp_path / "x", "two"), ([a, a], a, "another --out")):
        with pytest.raises(DataError, match=fault):
            merge(prefixes, out)
    assert not list(tmp_path.glob("x*"))


def test_a_split_deals_out_every_document_once(tmp_path: Path) -> None:
    documents = [[[i % 90 + 1, i // 90 + 1], [0]] for i in range(2000)]
    prefix = write(tmp_path / "a", documents)
    made = split(prefix, {"train": 0.9, "test": 0.1}, tmp_path / "s")
    parts = {name: documents_of(tmp_path / f"s-{name}") for name in made}
    whole = documents_of(prefix)
    assert sorted(parts["train"] + parts["test"]) == sorted(whole)
    assert 140 < len(parts["test"]) < 260
    assert [document for document in whole if document in parts["test"]] == parts["test"]
    assert verify(tmp_path / "s-test").manifest == made["test"]
    # No document changes sides when others come or go, or when it comes twice.
    fewer = write(tmp_path / "b", documents[::3] + documents[:10])
    split(fewer, {"train": 0.9, "test": 0.1}, tmp_path / "t")
    assert all(document in parts["test"] for document in documents_of(tmp_path / "t-test"))
    split(prefix, {"train": 0.9, "test": 0.1}, tmp_path / "u", seed=1)
    assert documents_of(tmp_path / "u-test") != parts["test"]


@pytest.mark.parametrize("spelt", ["{0}/a", "a", "sub/../a", "linked/a", "./a"])
def test_an_input_is_never_an_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelt: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path)
    write(Path("a"), FIRST)
    write(Path("b"), SECOND)
    write(Path("o-a"), FIRST)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    spelt = spelt.format(tmp_path)
    for inputs, out in ((["b", "a"], spelt), (["b", spelt], "a")):
        with pytest.raises(DataError, match="is the input .*a; give another --out"):
            merge(inputs, out)
    out = spelt.removesuffix("a") + "o"
    with pytest.raises(DataError, match="o-a: is the input o-a; give another --out"):
        split("o-a", {"b": 0.5, "a": 0.5}, out)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before


@pytest.mark.parametrize("name", ["bin", "idx", "manifest.json"])
def test_a_folder_in_the_way_stops_before_any_work(tmp_path: Path, name: str) -> None:
    (tmp_path / f"s-b.{name}").mkdir()
    for act in (
        lambda: split(tmp_path / "none", {"a": 0.5, "b": 0.5}, tmp_path / "s"),
        lambda: merge([tmp_path / "none", tmp_path / "none"], tmp_path / "s-b"),
    ):
        with pytest.raises(DataError, match=rf"s-b\.{name}: is a folder; give another --out"):
            act()
    assert [path.name for path in tmp_path.iterdir()] == [f"s-b.{name}"]


def test_a_full_disk_leaves_nothing_of_a_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it fills up: no part is published before all are on the disk, manifests included."""
    prefix = write(tmp_path / "a", [[[i % 90 + 1] * 1000 + [0]] for i in range(64)])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shares = {"a": 0.5, "b": 0.5}
    for most_bytes in (0, 100, 20_000):
        with full_disk(most_bytes), pytest.raises(OSError, match="File too large"):
            split(prefix, shares, tmp_path / "s")
    left = iter(range(0))

    def full(descriptor: int) -> None:
        if next(left, None) is None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for files in range(len(shares) * 3):
        left = iter(range(files))
        with pytest.raises(OSError, match="No space left"):
            split(prefix, shares, tmp_path / "s")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are UTF-8")
def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """As of files with Latin-1 names: the manifest has their odd bytes escaped."""
    odd = tmp_path / "caf\udce9"
    prefix = write(odd, FIRST)
    merged = merge([prefix, write(tmp_path / "b", SECOND)], tmp_path / "m\udce9")
    assert merged == read_manifest(tmp_path / "m\udce9")
    assert merged.derived_from == [f"{tmp_path}/caf\\udce9", f"{tmp_path}/b"]
    assert merged.skipped_rows[0] == f"{tmp_path}/caf\\udce9: empty"
    made = split(prefix, {"a": 0.5, "b\udce9": 0.5}, tmp_path / "s")
    assert made["b\udce9"] == read_manifest(tmp_path / "s-b\udce9")
    assert made["b\udce9"].outputs[0].name == "s-b\\udce9.bin"


def test_a_split_that_is_cut_leaves_no_old_part_beside_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else documents could be in both."""
    prefix = write(tmp_path / "a", [[[i % 90 + 1, i // 90 + 1], [0]] for i in range(200)])
    split(prefix, {"train": 0.5, "test": 0.5}, tmp_path / "s")
    publish = IndexedWriter.publish
    published: list[IndexedWriter] = []

    def publish_one(writer: IndexedWriter) -> None:
        if published:
            raise OSError("cut")
        published.append(writer)
        publish(writer)

    monkeypatch.setattr(IndexedWriter, "publish", publish_one)
    with pytest.raises(OSError, match="cut"):
        split(prefix, {"train": 0.5, "test": 0.5}, tmp_path / "s", seed=1)
    verify(tmp_path / "s-train")
    with pytest.raises(DataError, match=r"s-test\.idx: no such file"):
        verify(tmp_path / "s-test")


@pytest.mark.parametrize(
    ("shares", "fault"),
    [
        ({"a": 0.5, "b": 0.6}, "add up to 1.1"),
        ({"a": 1.0}, "two or more"),
        ({"a": 1.5, "b": -0.5}, "each between 0 and 1"),
        ({"a": 1 - 1e-6, "b": 1e-6}, "no document falls to b"),
        ({"": 0.5, "b": 0.5}, "'' names no file"),
        ({"a": 0.5, "../s": 0.5}, "'../s' names no file"),
        ({"a": 0.5, "b/": 0.5}, "'b/' names no file"),
    ],
)
def test_impossible_splits(tmp_path: Path, shares: dict[str, float], fault: str) -> None:
    prefix = write(tmp_path / "a", FIRST)
    with pytest.raises(DataError, match=fault):
        split(prefix, shares, tmp_path / "s")
    assert not list(tmp_path.glob("s*"))


def test_the_trainer_takes_a_blend(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", FIRST), write(tmp_path / "b with: blank", SECOND)
    out = tmp_path / "blend.yaml"
    assert write_blend({str(a): None, str(b): None}, out) == {str(a): 6.0, str(b): 8.0}
    write_blend({str(a): 0.8, str(b): 0.2}, out)
    config = {
        "run": {"folder": str(tmp_path)},
        "student": {
            "architecture": {
                "num_layers": 1,
                "hidden_size": 8,
                "num_attention_heads": 1,
                "vocab_size": 100,
            }
        },
        "loss": {"name": "cross_entropy"},
        "training": {
            "micro_batch_size": 1,
            "global_batch_size": 1,
            "seq_length": 4,
            "steps": 1,
        },
        "optimizer": {"lr": 1e-3},
        "data": {"blend": "x"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    loaded = load(tmp_path / "config.yaml", [f"data.blend={out.read_text()}"])
    assert [(part.prefix, part.weight) for part in loaded.data.blend] == [(a, 0.8), (b, 0.2)]
    for weights, fault in (
        ({}, "nothing to blend"),
        ({str(a): 1.0, str(b): None}, "to all or to none"),
        ({str(a): -1.0}, "above 0"),
        ({str(a): 1e308, str(b): 1e308}, "too large to be added"),
        ({str(a): 1e307, str(b): 1e307}, "too large to be added"),
        ({str(tmp_path / "none"): 1.0}, "no such file"),
    ):
        with pytest.raises(DataError, match=fault):
            write_blend(weights, out)  # type: ignore[arg-type]
    other = write(tmp_path / "other", SECOND, fingerprint="1" * 32)
    with pytest.raises(DataError, match="not of one tokenizer"):
        write_blend({str(a): 1.0, str(other): 1.0}, out)


def test_a_blend_is_of_good_files_and_overwrites_none(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", FIRST), write(tmp_path / "b", SECOND)
    empty = write(tmp_path / "empty", [[[]]])
    manifest_path(a).write_bytes(manifest_path(b).read_bytes())
    linked = tmp_path / "linked"
    linked.symlink_to(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    for prefix, out, fault in (
        (a, tmp_path / "x", "do not belong together"),
        (empty, tmp_path / "x", "holds no token; leave it out"),
        (b, linked, "is a folder; give another --out"),
        *((b, linked / f"b.{name}", "is a file of .*b;") for name in ("bin", "idx")),
        (b, manifest_path(b), "is a file of .*b; give another --out"),
    ):
        with pytest.raises(DataError, match=fault):
            write_blend({str(prefix): 1.0}, out)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_a_token_type_that_the_manifest_does_not_name_is_not_copied(tmp_path: Path) -> None:
    a = write(tmp_path / "a", FIRST, dtype="int32")
    for act in (
        lambda: split(a, {"a": 0.5, "b": 0.5}, tmp_path / "x"),
        lambda: merge([a, a], tmp_path / "x"),
    ):
        with pytest.raises(DataError, match=r"uint16.*the manifest says .*int32"):
            act()
    assert not list(tmp_path.glob("x*"))


VERIFIED = ["structure", "index", "counts", "sizes", "hashes", "ids in the vocabulary"]


@pytest.mark.parametrize("block_tokens", [2, 1 << 17])
def test_what_verify_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_tokens: int
) -> None:
    monkeypatch.setattr(verify_module, "_BLOCK_TOKENS", block_tokens)
    monkeypatch.setattr(verify_module, "CHUNK_ROWS", 2)
    documents = [*FIRST, *SECOND]
    prefix = write(tmp_path / "a", documents)
    assert verify(prefix).checked == [*VERIFIED, "ends of documents"]
    assert verify(prefix, fast=True).checked == ["structure", "counts", "sizes"]
    flip(Path(f"{prefix}.bin"), 2)
    with pytest.raises(DataError, match=r"a\.bin: its content"):
        verify(prefix)
    verify(prefix, fast=True)
    for name, changed, fault in (
        ("id", [*documents, [[1, 99, 0]]], None),
        ("late", [*documents, [[1, 2]]], r"token 15 ends a document and is not"),
        ("within", [*FIRST, [[1, 0, 2, 0]], *SECOND], r"token 7 is the end-of-document id within"),
        ("empty first", [[[]], *documents], r"a document without a token, .* before token 0;"),
        ("empty", [*documents, [], [[1, 0]]], r"a document without a token, .* before token 14;"),
        ("several", [*documents, [[1], [0], [3, 0]]], r"token 15 is the end-of-document id"),
    ):
        prefix = write(tmp_path / name, changed)
        if fault is None:
            verify(prefix)
        else:
            with pytest.raises(DataError, match=fault):
                verify(prefix)
    manifest = read_manifest(tmp_path / "id")
    assert manifest
    smaller = manifest.tokenizer.model_copy(update={"vocab_size": 99})
    write_manifest(tmp_path / "id", manifest.model_copy(update={"tokenizer": smaller}))
    with pytest.raises(DataError, match=r"token 15 has id 99, outside the vocabulary of 99"):
        verify(tmp_path / "id")


def test_a_fault_that_verify_finds_is_all_that_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does Python, of an exception that it ignores while it clears up."""
    ignored: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    for name, document in (("late", [1, 2]), ("within", [1, 0, 2, 0])):
        with pytest.raises(DataError, match="token"):
            verify(write(tmp_path / name, [[document]]))
    bare = write(tmp_path / "bare", FIRST)
    manifest = read_manifest(bare)
    assert manifest
    smaller = manifest.tokenizer.model_copy(update={"vocab_size": 2})
    write_manifest(bare, manifest.model_copy(update={"tokenizer": smaller}))
    with pytest.raises(DataError, match="outside the vocabulary"):
        verify(bare)
    gc.collect()
    assert ignored == []


def test_verify_with_a_tokenizer(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    prefix = write(tmp_path / "a", FIRST)
    with pytest.raises(DataError, match="not the tokenizer that made"):
        verify(prefix, tokenizer=tokenizer)
    manifest_path(prefix).unlink()
    verdict = verify(prefix)
    assert verdict.unchecked[1:] == ["ids in the vocabulary", "ends of documents"]
    verdict = verify(prefix, tokenizer=tokenizer)
    assert verdict.checked[2:] == ["ids in the vocabulary", "ends of documents"]


def test_lengths_of_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.lengths.CHUNK_ROWS", 3)
    monkeypatch.setattr("data_tools.lengths._LONGEST_COUNTED", 40)
    sizes = [1, 2, 2, 3, 4, 5, 60, 7, 33, 8]
    prefix = write(
        tmp_path / "a", [[[1] * (size // 2), [1] * (size - size // 2)] for size in sizes]
    )
    lengths = document_lengths(check_indexed(prefix))
    assert (lengths.smallest, lengths.largest, lengths.mean) == (1, 60, sum(sizes) / len(sizes))
    assert lengths.by_powers_of_two() == [(0, 0), (1, 1), (2, 3), (4, 3), (8, 1), (16, 0), (32, 2)]
    assert lengths.percentiles() == {1: 1, 10: 1, 50: 4, 90: 33, 99: 40}
    assert "         4             3  ####" in histogram_text(lengths)
    empty = write(tmp_path / "b", [[[]], [[1]]])
    assert document_lengths(check_indexed(empty)).by_powers_of_two() == [(0, 1), (1, 1)]


def test_memory_does_not_follow_the_number_of_documents(tmp_path: Path) -> None:
    """At most 40 bytes per document, here far below: two million documents in some megabytes."""
    code = (
        "import sys, resource, numpy as np\n"
        "from data_tools.indexed_writer import IndexedWriter\n"
        "lengths = np.full(1 << 16, 2); one = np.ones(1 << 16, np.int64)\n"
        "tokens = np.ones(1 << 17, np.uint16).data\n"
        "def write(name, steps):\n"
        "    with IndexedWriter(name, 100) as writer:\n"
        "        for _ in range(steps):\n"
        "            writer.add_tokens(tokens); writer.add_tables(lengths, one)\n"
        "        writer.finish()\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "first = write(sys.argv[1], 32)\n"
        "print((write(sys.argv[1], 96) - first) / (64 << 16))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 4  # bytes per further document

"""Damaged or foreign data is refused before the first step, file and document named."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.indexed_writer import IndexedWriter
from data_tools.manifest import (
    HEADER,
    DataError,
    Manifest,
    Options,
    TokenizerRecord,
    check_indexed,
    write_manifest,
)
from taid_megatron.config.errors import ConfigError, UserError
from taid_megatron.data import inspection
from taid_megatron.data.inspection import inspect

from ..distributed import toy


def prepare(prefix: Path, documents: list[list[int]], fingerprint: str = "0") -> Path:
    """Files with a manifest that knows their hashes."""
    with IndexedWriter(prefix, vocab_size=toy.VOCABULARY) as writer:
        for number, tokens in enumerate(documents):
            writer.add_document(np.array(tokens), name=str(number))
        outputs = writer.finish()
    tokenizer = TokenizerRecord(
        **{"kind": "sentencepiece", "name": "t", "fingerprint": fingerprint * 32},
        **{"vocab_size": toy.VOCABULARY, "eod_id": 0},
    )
    manifest = Manifest(
        **{"sources": [], "tokenizer": tokenizer, "dtype": "uint16", "empty_documents": 0},
        **{"documents": len(documents), "tokens": sum(map(len, documents)), "outputs": outputs},
        **{"options": Options(text_column="text", append_eod=True), "versions": {}},
    )
    write_manifest(prefix, manifest)
    return prefix


@pytest.fixture
def prefix(tmp_path) -> Path:
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 30, 50)
    return prepare(tmp_path / "data", [[*rng.integers(1, 300, length), 0] for length in lengths])


def _flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_sound_files_pass(prefix) -> None:
    inspect(prefix, vocab_size=toy.VOCABULARY, full=True)


def test_every_flipped_byte_of_the_index_is_found(prefix) -> None:
    index = Path(f"{prefix}.idx")
    sound = index.read_bytes()
    rng = random.Random(5)
    places = {*range(HEADER.size), *rng.sample(range(len(sound)), 100)}
    for place in sorted(places):
        _flip(index, place, rng.randrange(8))
        with pytest.raises((UserError, DataError), match=r"data\.(idx|bin)"):
            inspect(prefix, vocab_size=toy.VOCABULARY, full=False)
        index.write_bytes(sound)


def test_a_flipped_length_is_found_without_a_manifest(prefix) -> None:
    Path(f"{prefix}.manifest.json").unlink()
    _flip(Path(f"{prefix}.idx"), HEADER.size + 4 * 20)
    with pytest.raises(DataError, match=r"data\.idx: sequence 21 does not start where"):
        inspect(prefix, vocab_size=toy.VOCABULARY, full=False)


def test_changed_tokens_are_found_by_full_alone(prefix) -> None:
    _flip(Path(f"{prefix}.bin"), 40)
    inspect(prefix, vocab_size=toy.VOCABULARY, full=False)
    with pytest.raises(UserError, match=r"data\.bin: its content is not what .*manifest\.json"):
        inspect(prefix, vocab_size=toy.VOCABULARY, full=True)


def test_an_id_beyond_the_vocabulary_is_named_with_its_document(tmp_path) -> None:
    documents = [[5, 6, 0], [7, 0], [8, 299, 9, 0]]
    prefix = prepare(tmp_path / "data", documents)
    inspect(prefix, vocab_size=300, full=False)
    with pytest.raises(UserError, match=r"token id 299 in document 2, the models share .* 298;"):
        inspect(prefix, vocab_size=299, full=False)


def test_much_data_is_sampled_at_both_ends_and_read_whole_when_asked(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(inspection, "SAMPLED_BLOCKS", 2)
    monkeypatch.setattr(inspection, "BLOCK_TOKENS", 8)
    for place, found_fast in ((0, True), (50, False), (99, True)):
        tokens = [1] * 100
        tokens[place] = 250
        prefix = prepare(tmp_path / f"data{place}", [tokens[:60], tokens[60:]])
        for full in (True, False):
            if full or found_fast:
                with pytest.raises(UserError, match=f"id 250 in document {int(place >= 60)}"):
                    inspect(prefix, vocab_size=200, full=full)
            else:
                inspect(prefix, vocab_size=200, full=full)


def _copy(config: Path, folder: Path) -> Path:
    prefix = folder / "copy"
    for ending in ("bin", "idx"):
        shutil.copy(config.parent / f"train.{ending}", f"{prefix}.{ending}")
    return prefix


def _cut_bin(prefix: Path) -> None:
    os.truncate(f"{prefix}.bin", os.path.getsize(f"{prefix}.bin") - 2)


def _flip_length(prefix: Path) -> None:
    _flip(Path(f"{prefix}.idx"), HEADER.size + 8)


def _beyond(prefix: Path) -> None:
    start = int(check_indexed(prefix).sequence_pointers()[3])
    with Path(f"{prefix}.bin").open("r+b") as file:
        file.seek(start)
        file.write(np.uint16(300).tobytes())


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_cut_bin, r"copy\.bin: \d+ bytes where copy\.idx describes"),
        (_flip_length, r"copy\.idx: sequence 3 does not start"),
        (_beyond, r"copy\.bin: token id 300 in document 3"),
    ],
)
def test_a_run_refuses_before_its_first_step(config, tmp_path, damage: Any, named) -> None:
    prefix = _copy(config, tmp_path)
    damage(prefix)
    with pytest.raises((UserError, DataError), match=named):
        toy.train(config, tmp_path / "run", 2, f"data.blend={prefix}", "parallel.tensor=2")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_another_tokenizer_than_the_teachers_or_the_checkpoints_is_refused(
    config, tmp_path
) -> None:
    rng = np.random.default_rng(0)
    documents = [[*rng.integers(1, 300, 60), 0] for _ in range(40)]
    ours, theirs = (prepare(tmp_path / name, documents, name) for name in ("a", "b"))
    one_step = ("training.stop_at=1", "data.validation=null")
    taught = ("loss.name=cross_entropy", "teacher=null", *one_step)
    toy.train(config, tmp_path / "teacher", 1, f"data.blend={theirs}", *taught, save=True)
    with pytest.raises(ConfigError, match=r"teacher\.checkpoint: .* of the tokenizer b{32}"):
        toy.train(
            *(config, tmp_path / "student", 1, f"data.blend={ours}", *one_step),
            f"teacher={{checkpoint: {tmp_path / 'teacher'}}}",
        )
    assert not (tmp_path / "student").exists()  # before anything was built
    with pytest.raises(ConfigError, match=r"the tokenizer of data\.blend: other settings"):
        toy.train(config, tmp_path / "teacher", 1, f"data.blend={ours}", *taught, save=True)


def test_a_moved_end_of_a_document_is_found_by_the_hash(prefix) -> None:
    """Its tables stay in order: nothing but the manifest knows better."""
    files = check_indexed(prefix)
    entry = HEADER.size + 12 * files.num_sequences + 8 * 5
    with Path(f"{prefix}.idx").open("r+b") as index:
        index.seek(entry)
        index.write(np.int64(files.document_indices()[4]).tobytes())
    check_indexed(prefix, deep=True)
    with pytest.raises(UserError, match=r"data\.idx: its content is not what .*manifest\.json"):
        inspect(prefix, vocab_size=toy.VOCABULARY, full=False)

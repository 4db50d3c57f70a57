"""Samples hold what the documents hold, document by document; wrong files are refused."""

import json
import multiprocessing
import os
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools.indexed_writer import IndexedWriter
from data_tools.manifest import Manifest, write_manifest
from taid_megatron.data.datasets import build_datasets, document_ids
from taid_megatron.data.loader import DistributedBatches

S, VOCAB, EOD = 16, 50, 3


def write_documents(
    prefix: Path, *, documents: int = 40, first: int = 10, eod_id: int = EOD, **changes: object
) -> str:
    """Documents of 3 to 9 tokens that count upwards from `first`, then the end of document."""
    rng = np.random.default_rng(documents)
    with IndexedWriter(prefix, VOCAB) as writer:
        for _ in range(documents):
            body = np.arange(first, first + rng.integers(3, 10))
            writer.add_document(np.append(body, eod_id), name="made up")
        outputs = writer.finish()
    made_by = {"kind": "sentencepiece", "name": "a.model", "vocab_size": VOCAB, "eod_id": eod_id}
    record = {
        "sources": [],
        "tokenizer": {**made_by, "fingerprint": str(changes.pop("fingerprint", "0")) * 32},
        "options": {"text_column": "text", "append_eod": changes.pop("append_eod", True)},
        "dtype": "uint16",
        "documents": documents,
        "empty_documents": 0,
        "tokens": writer.num_tokens,
        "outputs": outputs,
        "versions": {},
    }
    write_manifest(prefix, Manifest.model_validate({**record, **changes}))
    return str(prefix)


def build(tmp_path: Path, train: list[tuple[str, float]], **options):
    settings = {
        "seq_length": S,
        "seed": 1,
        "num_train_samples": 30,
        "num_valid_samples": None,
        "eod_id": EOD,
        "cache_path": tmp_path / "cache",
    }
    return build_datasets(train_blend=train, **{**settings, **options})


def contents(dataset, count: int | None = None) -> list[list[int]]:
    return [dataset[number]["tokens"].tolist() for number in range(count or len(dataset))]


def test_samples_are_windows_of_the_documents(tmp_path: Path) -> None:
    """Each token's successor is its label; over one epoch no token comes twice."""
    prefix = write_documents(tmp_path / "a")
    train, valid = build(tmp_path, [(prefix, 1)], num_train_samples=5)
    assert valid is None
    sample = train[0]
    assert set(sample) == {"tokens", "labels", "loss_mask", "position_ids"}
    assert sample["labels"][:-1].tolist() == sample["tokens"][1:].tolist()
    assert sample["loss_mask"].tolist() == [1.0] * S
    assert sample["position_ids"].tolist() == list(range(S))
    tokens = np.fromfile(f"{prefix}.bin", np.uint16)
    seen = np.bincount(np.concatenate(contents(train)), minlength=VOCAB)
    assert (seen <= np.bincount(tokens, minlength=VOCAB)).all()
    assert seen.sum() > len(tokens) - 2 * S


def test_documents_are_kept_apart(tmp_path: Path) -> None:
    """document_ids, positions and the loss mask against a plain loop over the tokens."""
    train, _ = build(
        tmp_path,
        [(write_documents(tmp_path / "a"), 1)],
        eod_mask_loss=True,
        reset_position_ids=True,
        reset_attention_mask=True,
    )
    ended = 0
    for number in range(30):
        sample = train[number]
        document, position = 0, 0
        for place, token in enumerate(sample["tokens"].tolist()):
            assert sample["document_ids"][place] == document
            assert sample["position_ids"][place] == position
            assert sample["loss_mask"][place] == (token != EOD)
            position += 1
            if token == EOD:
                document, position = document + 1, 0
        ended += document
    assert sample["document_ids"].dtype == torch.int32
    assert ended > 60


def test_document_ids_of_a_batch() -> None:
    tokens = torch.tensor([[7, EOD, 7, 7, EOD, EOD, 7], [EOD, 7, 7, 7, 7, 7, EOD]])
    assert document_ids(tokens, EOD).tolist() == [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]


def test_a_blend_keeps_its_weights(tmp_path: Path) -> None:
    """And both splits build in a process without ranks, where megatron-core alone cannot cache."""
    low = write_documents(tmp_path / "low", first=10)
    high = write_documents(tmp_path / "high", first=30)
    train, valid = build(
        tmp_path,
        [(low, 3), (high, 1)],
        num_train_samples=400,
        valid_blend=[(low, 1), (high, 9)],
        num_valid_samples=50,
    )
    share = {}
    for name, dataset in (("train", train), ("valid", valid)):
        is_high = [max(tokens) >= 30 for tokens in contents(dataset)]
        share[name] = sum(is_high) / len(is_high)
    assert share == pytest.approx({"train": 0.25, "valid": 0.9}, abs=0.02)
    assert len(train) >= 400
    with DistributedBatches(train, micro_batch_size=2, dp_rank=0, dp_size=2) as batches:
        assert batches.step(8)[0]["tokens"].shape == (2, S)


def test_validation_without_a_number_is_one_epoch(tmp_path: Path) -> None:
    prefixes = [write_documents(tmp_path / name) for name in "ab"]
    tokens = np.fromfile(f"{prefixes[0]}.bin", np.uint16).size
    for count in (1, 2):
        valid_blend = [(prefix, 5) for prefix in prefixes[:count]]
        _, valid = build(tmp_path, [(prefixes[0], 1)], valid_blend=valid_blend)
        assert len(valid) == count * ((tokens - 1) // S)


def test_the_order_is_the_seeds(tmp_path: Path) -> None:
    blend = [(write_documents(tmp_path / "a"), 1)]
    first = contents(build(tmp_path, blend)[0])
    cached = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert len(cached) == 4
    assert contents(build(tmp_path, blend)[0]) == first
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == cached
    elsewhere = build(tmp_path, blend, cache_path=tmp_path / "other")[0]
    assert contents(elsewhere) == first
    assert contents(build(tmp_path, blend, seed=2)[0]) != first


def test_data_prepared_anew_is_not_read_with_the_old_index(tmp_path: Path) -> None:
    """megatron-core names a cached index by path and number of samples alone."""
    blend = [(write_documents(tmp_path / "a", documents=40), 1)]
    build(tmp_path, blend)
    write_documents(tmp_path / "a", documents=17)
    rebuilt = contents(build(tmp_path, blend)[0])
    assert rebuilt == contents(build(tmp_path, blend, cache_path=tmp_path / "fresh")[0])


def test_a_killed_build_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever file it was killed at, the next run neither trusts nor overwrites what is there."""
    blend = [(write_documents(tmp_path / "a"), 1)]
    expected = contents(build(tmp_path, blend, cache_path=tmp_path / "whole")[0])

    def killed(name: object, array: np.ndarray, **options: object) -> None:
        if "shuffle" in str(name):
            Path(str(name)).write_bytes(b"cut o")
            raise KeyboardInterrupt
        save(name, array, **options)

    save = np.save
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, blend)
    assert contents(build(tmp_path, blend)[0]) == expected

    def killed_at_the_third(self: Path, target: Path) -> None:
        published.append(target)
        if len(published) == 3:
            raise KeyboardInterrupt
        os.replace(self, target)

    published: list[Path] = []
    cache = tmp_path / "half published"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, blend, cache_path=cache)
    before = {path.name: path.stat().st_ino for path in cache.iterdir()}
    assert len(before) == 2
    assert contents(build(tmp_path, blend, cache_path=cache)[0]) == expected
    assert all((cache / name).stat().st_ino != before[name] for name in before)


def refused(tmp_path: Path, train: list[tuple[str, float]], **options) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        build(tmp_path, train, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    good = write_documents(tmp_path / "good")
    other = write_documents(tmp_path / "other", fingerprint="1")
    endless = write_documents(tmp_path / "endless", append_eod=False)
    stale = write_documents(tmp_path / "stale", tokens=1)
    short = write_documents(tmp_path / "short", documents=1)
    damaged = write_documents(tmp_path / "damaged")
    with open(f"{damaged}.bin", "ab") as stream:
        stream.write(b"xx")

    assert "none.bin: no such file" in refused(tmp_path, [(str(tmp_path / "none"), 1)])
    assert "damaged.bin: " in refused(tmp_path, [(good, 1), (damaged, 1)])
    assert "damaged.bin: " in refused(tmp_path, [(good, 1)], valid_blend=[(damaged, 1)])
    assert "fewer than one sample of 16 + 1" in refused(tmp_path, [(short, 1)])
    assert "end-of-document id 3, not 4" in refused(tmp_path, [(good, 1)], eod_id=4)
    assert "another tokenizer than" in refused(tmp_path, [(good, 1), (other, 1)])
    assert "do not belong together" in refused(tmp_path, [(stale, 1)])
    message = refused(tmp_path, [(endless, 1)], reset_attention_mask=True)
    assert "without end-of-document ids" in message
    build(tmp_path, [(endless, 1)])


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    good = write_documents(tmp_path / "good")
    (tmp_path / "file").touch()
    assert "train_blend is empty" in refused(tmp_path, [])
    for weight in (0, -1, float("nan"), float("inf")):
        assert f"weight {weight}" in refused(tmp_path, [(good, weight)])
    assert "num_train_samples 0" in refused(tmp_path, [(good, 1)], num_train_samples=0)
    assert "num_valid_samples 0" in refused(tmp_path, [(good, 1)], num_valid_samples=0)
    message = refused(tmp_path, [(good, 1)], cache_path=tmp_path / "file" / "cache")
    assert "give another folder for the cache" in message


def on_rank(rank: int, ranks: int, idle_rank: int, folder: Path) -> None:
    """Builds a blended and a single-prefix split with the other ranks."""
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
        )
        train, valid = build(folder, **blends(folder), is_built_on_rank=lambda: rank != idle_rank)
        found = [train and contents(train, 30), valid and contents(valid, 9)]
    except BaseException:
        found = [traceback.format_exc()]
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    os._exit(0)  # the parent's threads and fixtures are not this process' to clean up


def blends(folder: Path) -> dict[str, object]:
    blend = [(str(folder / "a"), 1.0), (str(folder / "b"), 2.0)]
    return {"train": blend, "valid_blend": blend[:1], "num_valid_samples": 9}


@pytest.mark.parametrize("idle_rank", [0, 1])
def test_ranks_build_together(tmp_path: Path, idle_rank: int) -> None:
    """Over one cache, all at once: every rank that takes data sees one process' samples."""
    for name in "ab":
        write_documents(tmp_path / name)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=on_rank, args=(rank, 3, idle_rank, tmp_path)) for rank in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        process.kill()
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(3)]
    train, valid = build(tmp_path, **blends(tmp_path), cache_path=tmp_path / "alone")
    expected = [contents(train, 30), contents(valid, 9)]
    assert found == [[None, None] if rank == idle_rank else expected for rank in range(3)]


def test_megatron_is_given_no_padding_token(tmp_path: Path) -> None:
    """Id 0 is a token like others: it is neither masked nor taken for padding."""
    prefix = write_documents(tmp_path / "a", first=0)
    train, _ = build(tmp_path, [(prefix, 1)])
    sample = next(train[number] for number in range(30) if (train[number]["labels"] == 0).any())
    assert sample["loss_mask"].all()

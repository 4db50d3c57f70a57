"""data.reader=dali gives the default reader's micro-batches, bit for bit.

DALI is an extra of 1.1 GB: without it the tests of its pipelines are skipped, the refusal is not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from taid_megatron.config.errors import ConfigError
from taid_megatron.config.load import load
from taid_megatron.data.dali_reader import DEPTH, through_dali
from taid_megatron.data.datasets import build_datasets
from taid_megatron.data.loader import DistributedBatches, MicroBatch
from taid_megatron.training import loop

from ...distributed import toy
from .test_loader import Numbers, assert_a_read_error_comes_in_its_turn, batches

WINDOWS = 60


@pytest.fixture
def dali() -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (the extra 'dali')")


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> torch.utils.data.Dataset:
    """Samples of two token files with everything in them that the loader knows."""
    folder = tmp_path_factory.mktemp("windows")
    blend = [(str(toy.write_tokens(folder / f"part{n}", seed=n)), 1.0 + n) for n in range(2)]
    dataset, _ = build_datasets(
        train_blend=blend,
        seq_length=32,
        seed=1,
        num_train_samples=WINDOWS,
        num_valid_samples=None,
        eod_id=0,
        cache_path=folder / "cache",
        eod_mask_loss=True,
        reset_position_ids=True,
        reset_attention_mask=True,
    )
    assert dataset is not None
    return dataset


def assert_equal(found: list[MicroBatch], expected: list[MicroBatch]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert set(one) == set(other) == {*one, "document_ids"}
        for name, tensor in other.items():
            assert one[name].dtype == tensor.dtype, name
            assert torch.equal(one[name], tensor), name


@pytest.mark.usefixtures("dali")
@pytest.mark.parametrize("prefetch", [0, 3])
def test_micro_batches_are_the_default_reader_s(windows, prefetch: int) -> None:
    """On two ranks, with the micro-batches of all steps alive at once, and from a resume on."""
    for rank in range(2):
        place = {"micro_batch_size": 3, "dp_rank": rank, "dp_size": 2}
        with DistributedBatches(windows, **place) as default:
            expected = [default.step(12) for _ in range(5)]
        through = {**place, "transport": through_dali, "prefetch": prefetch}
        with DistributedBatches(windows, **through) as stream:
            found = [stream.step(12) for _ in range(5)]
            for mine, theirs in zip(found, expected, strict=True):
                assert_equal(mine, theirs)
            stream.seek(24)
            assert_equal(stream.step(12), expected[2])
            assert stream.consumed_samples == 36
        with DistributedBatches(windows, **through, consumed_samples=36) as resumed:
            assert_equal(resumed.step(12), expected[3])


@pytest.mark.usefixtures("dali")
@pytest.mark.parametrize("prefetch", [0, 8])
def test_a_read_error_reaches_the_caller_in_its_turn(prefetch: int) -> None:
    assert_a_read_error_comes_in_its_turn(prefetch=prefetch, transport=through_dali)


@pytest.mark.usefixtures("dali")
def test_it_reads_no_further_ahead_than_its_depth() -> None:
    dataset = Numbers(10_000)
    with batches(dataset, prefetch=0, transport=through_dali) as stream:
        stream.step(2)
        assert len(dataset.loaded) <= 2 * (1 + DEPTH)


def test_without_dali_a_run_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what makes its import fail, where it is installed
    monkeypatch.setitem(sys.modules, "nvidia.dali.plugin.pytorch", None)
    config = load(str(toy.write_config(tmp_path)), ["data.reader=dali"])
    mend = "data.reader=dali .* pip install nvidia-dali-cuda130"
    with pytest.raises(ConfigError, match=mend) as refused:
        loop.run(config)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()

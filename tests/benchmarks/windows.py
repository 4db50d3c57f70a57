"""Whether a reader of our own would pay: megatron-core's GPTDataset against the leanest there is.

The lean reader goes over the same sample index: one map of the tokens, slices of it copied into one
array, labels that share it. It gives equal samples, bit for bit, which is checked. Below five times
GPTDataset's samples per CPU-second it is not worth having; data.py prints what it reaches.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_tools.manifest import read_manifest
from taid_megatron.data.datasets import build_datasets

SEQ_LENGTH = 2048
CASES: dict[str, dict[str, bool]] = {
    "plain": {},
    "documents apart": {
        "eod_mask_loss": True,
        "reset_position_ids": True,
        "reset_attention_mask": True,
    },
}


class LeanWindows:
    """A GPTDataset's samples, read by its index."""

    def __init__(self, dataset: Any):
        self.config = dataset.config
        self.eod_id = dataset.config.tokenizer.eod
        index = dataset.dataset.index
        self.item = np.dtype(index.dtype).itemsize
        path = f"{dataset.dataset.path_prefix}.bin"
        self.tokens = np.asarray(np.memmap(path, index.dtype, mode="r"))
        self.pointers, self.lengths = index.sequence_pointers, index.sequence_lengths
        self.documents, self.samples, self.order = (
            np.asarray(table)
            for table in (dataset.document_index, dataset.sample_index, dataset.shuffle_index)
        )
        self.ones, self.positions = torch.ones(SEQ_LENGTH), torch.arange(SEQ_LENGTH)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """As GPTDataset's; tokens and labels share memory, unchanging parts are given again."""
        sample = self.order[number]
        (first, begin), (last, end) = self.samples[sample : sample + 2].tolist()
        rows = self.documents[first : last + 1]
        starts = self.pointers[rows] // self.item
        ends = starts + self.lengths[rows]
        ends[-1] = starts[-1] + end + 1
        starts[0] += begin
        window = np.empty(SEQ_LENGTH + 1, np.int64)
        pieces = zip(starts.tolist(), ends.tolist(), strict=True)
        np.concatenate([self.tokens[start:stop] for start, stop in pieces], out=window)
        text = torch.from_numpy(window)
        found = {"tokens": text[:-1], "labels": text[1:], "loss_mask": self.ones}
        return {**found, "position_ids": self.positions, **self._apart(window[:-1])}

    def _apart(self, tokens: np.ndarray) -> dict[str, torch.Tensor]:
        if not self.config.reset_position_ids:
            return {}
        is_end = tokens == self.eod_id
        firsts = np.flatnonzero(is_end[:-1]) + 1
        steps, jumps = np.ones(SEQ_LENGTH, np.int64), np.zeros(SEQ_LENGTH, np.int32)
        steps[0] = 0
        steps[firsts] = 1 - np.diff(firsts, prepend=0)
        jumps[firsts] = 1
        return {
            "loss_mask": torch.from_numpy((~is_end).astype(np.float32)),
            "position_ids": torch.from_numpy(np.cumsum(steps)),
            "document_ids": torch.from_numpy(np.cumsum(jumps, dtype=np.int32)),
        }


def _dataset(prefix: Path, case: str, samples: int) -> Any:
    manifest = read_manifest(prefix)
    assert manifest
    torch.set_num_threads(1)
    return build_datasets(
        train_blend=[(str(prefix), 1.0)],
        seq_length=SEQ_LENGTH,
        seed=1,
        num_train_samples=samples,
        num_valid_samples=None,
        eod_id=manifest.tokenizer.eod_id,
        cache_path=prefix.parent / "cache",
        **CASES[case],
    )[0]


def measure_windows(prefix: Path, samples: int, rounds: int) -> dict[str, dict[str, float]]:
    """For each case and reader: samples per CPU-second, and how many times GPTDataset's that is.

    Reading alone, in this process: neither the imports nor the building of the index.
    """
    table = {}
    for case in CASES:
        dataset = _dataset(prefix, case, samples)
        lean = LeanWindows(dataset)
        _check_equal(dataset, lean, case, samples)
        pairs = [(_seconds(dataset, samples), _seconds(lean, samples)) for _ in range(rounds)]
        for name, column in (("GPTDataset", 0), ("lean reader", 1)):
            ratios = [pair[0] / pair[column] for pair in pairs]
            table[f"{name}, {case}"] = {
                "seconds": statistics.median(pair[column] for pair in pairs),
                "speed": statistics.median(ratios),
                "slowest_round": min(ratios),
                "fastest_round": max(ratios),
            }
    return table


def _seconds(reader: Any, samples: int) -> float:
    began = time.process_time()
    for number in range(samples):
        reader[number]
    return time.process_time() - began


def _check_equal(dataset: Any, lean: LeanWindows, case: str, samples: int) -> None:
    for number in range(0, samples, 100):
        theirs, ours = dataset[number], lean[number]
        if theirs.keys() != ours.keys():
            raise SystemExit(f"{case}: sample {number} has {list(ours)}, not {list(theirs)}")
        for name, value in theirs.items():
            if value.dtype != ours[name].dtype or not torch.equal(value, ours[name]):
                raise SystemExit(f"{case}: sample {number} differs in {name}")

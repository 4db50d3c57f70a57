"""Training and validation samples from prepared token files, through megatron-core's builders.

A sample is a window of seq_length tokens over the shuffled, joined documents:

    tokens, labels   int64 [S]    labels are the tokens shifted by one
    loss_mask        float32 [S]  0 where the input is the end of a document, if eod_mask_loss
    position_ids     int64 [S]    restarting after each end of document, if reset_position_ids
    document_ids     int32 [S]    0, 0, 0, 1, 1, 2, ...: only if reset_attention_mask

`document_ids` is what attention needs to stay within documents; an [S, S] mask is never built.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from data_tools.manifest import (
    IndexedFiles,
    Manifest,
    check_indexed,
    index_fingerprint,
    manifest_path,
    read_manifest,
)
from taid_megatron.config.errors import UserError

Blend = Sequence[tuple[str, float]]

# Prepared files hold no padding, and windows are never padded: an id that no token has.
_NO_PAD_ID = -1


def build_datasets(
    *,
    train_blend: Blend,
    valid_blend: Blend = (),
    seq_length: int,
    seed: int,
    num_train_samples: int,
    num_valid_samples: int | None,
    eod_id: int,
    cache_path: str | Path,
    eod_mask_loss: bool = False,
    reset_position_ids: bool = False,
    reset_attention_mask: bool = False,
    is_built_on_rank: Callable[[], bool] = lambda: True,
) -> tuple[torch.utils.data.Dataset | None, torch.utils.data.Dataset | None]:
    """(training, validation) datasets; validation is None without a valid_blend.

    train_blend, valid_blend: (prefix, weight) pairs; weights are relative, by samples.
    seq_length: S, tokens in a sample. num_train_samples: samples to draw, over as many epochs as
    that takes; another number is another order, so it stays fixed when a run is resumed.
    num_valid_samples: likewise; None: every validation document once, weights unused.
    eod_id: must be the one the files were prepared with. cache_path: folder for the shuffled
    indices, shared by all ranks; may serve many runs, also at once.
    is_built_on_rank: False where a rank needs no data; it gets (None, None).

    Collective: where torch.distributed is initialised, all ranks call it; rank 0 builds the
    indices, the others then read them. Raises UserError naming file, fault and mend.
    """
    prefixes = _check_weights(train_blend)
    all_prefixes = sorted({*prefixes, *_check_weights(valid_blend)})
    if not prefixes:
        raise UserError("train_blend is empty; give (prefix, weight) pairs")
    _check_files(all_prefixes, seq_length, eod_id, reset_attention_mask or reset_position_ids)
    if num_train_samples < 1 or (num_valid_samples is not None and num_valid_samples < 1):
        raise UserError(
            f"num_train_samples {num_train_samples}, num_valid_samples {num_valid_samples}: "
            "both must be at least 1"
        )
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[
            (prefixes, [float(weight) for _, weight in train_blend]),
            _valid_split(valid_blend, num_valid_samples),
            None,
        ],
        path_to_cache=str(_usable_folder(cache_path)),
        tokenizer=_IndexIdentity(eod_id, all_prefixes),  # type: ignore[arg-type]
        reset_position_ids=reset_position_ids,
        reset_attention_mask=reset_attention_mask,
        eod_mask_loss=eod_mask_loss,
        create_attention_mask=False,
    )
    builder = _Builder(
        DocumentDataset,
        [num_train_samples, num_valid_samples, None],  # type: ignore[list-item]
        # Rank 0 writes the cache that the others read, whether it needs samples or not.
        lambda: _is_first_rank() or is_built_on_rank(),
        config,
    )
    train, valid, _ = builder.build()
    return (train, valid) if is_built_on_rank() else (None, None)


def _valid_split(
    blend: Blend, num_samples: int | None
) -> tuple[list[str], list[float] | None] | None:
    if not blend:
        return None
    # megatron-core takes weights only with a number of samples to share out.
    weights = None if num_samples is None else [float(weight) for _, weight in blend]
    return [str(prefix) for prefix, _ in blend], weights


class DocumentDataset(GPTDataset):
    """megatron-core's GPTDataset, with `document_ids` where reset_attention_mask is asked."""

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """One sample, see the head of this file."""
        sample = super().__getitem__(idx)
        if self.config.reset_attention_mask:
            sample["document_ids"] = document_ids(sample["tokens"], self.config.tokenizer.eod)
        return sample


def document_ids(tokens: torch.Tensor, eod_id: int) -> torch.Tensor:
    """Which document of the window each token belongs to. int64 [..., S] -> int32 [..., S].

    Counts from 0; the end-of-document token belongs to the document that it ends.
    """
    is_end = (tokens == eod_id).to(torch.int32)
    return is_end.cumsum(-1, dtype=torch.int32) - is_end


class _IndexIdentity:
    """What megatron-core asks of a tokenizer: the end-of-document id, and an identity.

    The identity enters the names of the cached indices. megatron-core's own covers a prefix' path
    but not its content: data prepared anew under the same prefix would be read with the old index.
    """

    vocab_size = None
    pad = _NO_PAD_ID

    def __init__(self, eod_id: int, prefixes: list[str]):
        self.eod = eod_id
        self.unique_identifiers = {
            "class": type(self).__name__,
            "eod": eod_id,
            "data": {prefix: index_fingerprint(prefix) for prefix in prefixes},
        }


class _Builder(BlendedMegatronDatasetBuilder):
    """megatron-core's builder, with a cache that survives being killed and being shared.

    megatron-core writes cached indices under their final names and takes a file that exists for
    whole. Here the building rank works in a private folder and renames what it made.
    """

    @staticmethod
    def build_generic_dataset(  # type: ignore[override]
        cls: Any, is_built_on_rank: Callable[[], bool], synchronize_ranks: bool, *args: Any
    ) -> Any:
        """As megatron-core's; `args` ends with the configuration."""
        build = _build_in_private_cache(cls) if _is_first_rank() else cls
        return BlendedMegatronDatasetBuilder.build_generic_dataset(
            build, is_built_on_rank, synchronize_ranks, *args
        )


def _build_in_private_cache(cls: Any) -> Callable[..., Any]:
    def build(*args: Any) -> Any:
        *inputs, config = args
        cache = Path(config.path_to_cache)
        with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as folder:
            _link_complete_entries(cache, Path(folder))
            private_config = copy.copy(config)
            private_config.path_to_cache = folder
            if cls is BlendedDataset and not torch.distributed.is_initialized():
                # It asks for the rank before it writes a cache: without ranks, in memory only.
                private_config.path_to_cache = None
            dataset = cls(*inputs, private_config)
            dataset.config = config
            _publish(Path(folder), cache)
        return dataset

    return build


_LAST_FILE = "description.txt"  # of an entry, HASH-CLASS-SPLIT-*: where it exists, so do the rest


def _link_complete_entries(cache: Path, private: Path) -> None:
    for description in cache.glob(f"*-{_LAST_FILE}"):
        for file in cache.glob(f"{description.name.removesuffix(_LAST_FILE)}*"):
            (private / file.name).symlink_to(file)


def _publish(private: Path, cache: Path) -> None:
    built = [file for file in private.iterdir() if not file.is_symlink()]
    for file in sorted(built, key=lambda file: file.name.endswith(_LAST_FILE)):
        file.replace(cache / file.name)


def _is_first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _usable_folder(cache_path: str | Path) -> Path:
    folder = Path(cache_path).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; give another folder for the cache") from error
    if _is_first_rank() and not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: not writable; give another folder for the cache")
    return folder


def _check_weights(blend: Blend) -> list[str]:
    """The prefixes. Raises UserError for a weight that is no share."""
    for prefix, weight in blend:
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"{prefix}: weight {weight} in the blend; give a number above 0")
    return [str(prefix) for prefix, _ in blend]


def _check_files(prefixes: list[str], seq_length: int, eod_id: int, needs_eod: bool) -> None:
    made_by: tuple[str, str] | None = None
    for prefix in prefixes:
        files = check_indexed(prefix)
        # megatron-core would add epochs for ever to reach a sample from nothing.
        if files.num_tokens <= seq_length:
            raise UserError(
                f"{prefix}.bin: {files.num_tokens} tokens, fewer than one sample of {seq_length} "
                "+ 1; give more data or a smaller seq_length"
            )
        manifest = read_manifest(prefix)
        if manifest is None:
            continue  # made by another tool: the caller's eod_id is all that is known
        _check_manifest(files, manifest, eod_id, needs_eod)
        made_by = made_by or (prefix, manifest.tokenizer.fingerprint)
        if manifest.tokenizer.fingerprint != made_by[1]:
            raise UserError(
                f"{manifest_path(prefix)}: another tokenizer than {made_by[0]}'s; prepare both "
                "with the same"
            )


def _check_manifest(files: IndexedFiles, manifest: Manifest, eod_id: int, needs_eod: bool) -> None:
    path = manifest_path(files.prefix)
    if manifest.tokens != files.num_tokens:
        raise UserError(
            f"{path}: says {manifest.tokens} tokens, {files.prefix}.bin has {files.num_tokens}; "
            "they do not belong together, prepare the data again"
        )
    if manifest.tokenizer.eod_id != eod_id:
        raise UserError(
            f"{path}: prepared with end-of-document id {manifest.tokenizer.eod_id}, not {eod_id}; "
            "give that id, or prepare the data with the model's tokenizer"
        )
    if needs_eod and not manifest.options.append_eod:
        raise UserError(
            f"{path}: prepared without end-of-document ids, so nothing can be reset at a "
            "document's start; prepare it without --no-eod"
        )

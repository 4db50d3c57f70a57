"""Loads of megatron-core's checkpoint format that execute nothing.

Four places of it unpickle: `.metadata` (torch's FileSystemReader), `common.pt` (megatron-core), and
what is not a tensor in the shards (torch's DefaultLoadPlanner, two branches). Here the first goes
through a list of allowed classes, the others through torch's weights_only. What else a file asks
for is refused before anything of it runs.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from taid_megatron.config.errors import UserError

_ALLOWED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "ChunkStorageMetadata"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {
        *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"),
    },
    "collections": {"OrderedDict"},
}
_SHARD = re.compile(r"__\d+_\d+\.distcp")
_MEND = "nothing of it was run; load only checkpoints that this system saved"


class _MetadataUnpickler(pickle.Unpickler):
    """Gives out what a checkpoint's metadata consists of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The class, where it is one of the format's own."""
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_metadata(path: Path) -> Metadata:
    """A checkpoint's `.metadata`. Raises UserError where it holds, or points to, anything else."""
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"a {type(metadata).__name__} is no metadata")
        for entry in (metadata.storage_data or {}).values():
            if not _SHARD.fullmatch(entry.relative_path):
                raise pickle.UnpicklingError(f"it points to {entry.relative_path!r}")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; use another checkpoint") from error
    except Exception as error:
        raise refusal(str(path), error) from None
    return metadata


def load_plain(source: Path | io.BytesIO, name: str) -> Any:
    """Tensors and plain containers by torch's weights_only. Raises UserError for what is more."""
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        raise refusal(name, error) from None


def refusal(name: str, error: Exception) -> UserError:
    """What the user is told of something that asked for more than plain data."""
    return UserError(f"{name}: refused, {_cause(error)}; {_MEND}")


def _cause(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if "GLOBAL" in line or "asks for" in line]
    text = " ".join((lines or [str(error) or type(error).__name__])[0].split())
    return text.partition(" was not an allowed")[0][:200]


class CommonStrategy(TorchCommonLoadStrategy):
    """megatron-core's loader of common.pt, its pickle closed."""

    def load_common(self, checkpoint_dir: str | Path) -> Any:
        """The state that is not sharded."""
        path = Path(checkpoint_dir) / "common.pt"
        return load_plain(path, str(path))


@contextmanager
def no_pickle() -> Iterator[None]:
    """Within it torch's distributed checkpoint reader and planner unpickle nothing unlisted."""
    read, load_bytes = FileSystemReader.read_metadata, DefaultLoadPlanner.load_bytes

    def read_listed(self: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self._get_metadata_path(kwargs.get("rank"))))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def load_bytes_plain(self: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        plain = load_plain(value, f"checkpoint entry {name}")
        # torch's own method reads once more: it is given what has just been shown to be plain
        safe = io.BytesIO()
        torch.save(plain, safe)
        safe.seek(0)
        load_bytes(self, read_item, safe)

    FileSystemReader.read_metadata = read_listed  # type: ignore[method-assign]
    DefaultLoadPlanner.load_bytes = load_bytes_plain  # type: ignore[method-assign]
    try:
        yield
    finally:
        FileSystemReader.read_metadata = read  # type: ignore[method-assign]
        DefaultLoadPlanner.load_bytes = load_bytes  # type: ignore[method-assign]

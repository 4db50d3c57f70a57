"""The weights in a Hugging Face folder: names, shapes, and any slice of any tensor.

Nothing is kept between two reads: a file is mapped for one slice and let go, so that what a rank
holds in memory is its own share and one slice. Files of pickled tensors (`.bin`) go through torch's
`weights_only` loader.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from taid_megatron.config.errors import UserError

_KINDS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class HFFolder:
    """Tensors of one model, by name."""

    folder: Path
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def read(self, tensor: str, axis: int, start: int, stop: int) -> Tensor:
        """tensor[start:stop] along an axis, a copy of its own. Raises UserError where it ends."""
        shape = self.shapes[tensor]
        # slices clamp in silence
        if not 0 <= start < stop <= shape[axis]:
            raise UserError(
                f"{self.files[tensor]}: {tensor} has shape {list(shape)}, wanted {start} to {stop} "
                f"along axis {axis}; the file does not fit its config.json"
            )
        index = (slice(None),) * axis + (slice(start, stop),)
        path = self.files[tensor]
        if path.suffix == ".bin":
            return _load_bin(path)[tensor][index].clone()
        with safe_open(path, framework="pt") as file:
            return file.get_slice(tensor)[index].clone()


def open_folder(folder: Path) -> HFFolder:
    """The model in a folder: safetensors, else .bin, sharded or not.

    Reads the files' headers. Raises UserError where a file is missing or damaged.
    """
    for name in _KINDS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            listed = _listed(index)
            return _described(folder, sorted({folder / file for file in listed.values()}), listed)
        if (folder / name).is_file():
            return _described(folder, [folder / name], None)
    raise UserError(
        f"{folder}: no weights there (none of {', '.join(_KINDS)}, nor their .index.json); give "
        "the whole folder of a Hugging Face model"
    )


def _listed(index: Path) -> dict[str, str]:
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = set(listed.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: no index of weights ({error!r}); get the file anew") from None
    if any(Path(name).name != name for name in names):
        raise UserError(f"{index}: names files outside its folder; get the file anew")
    return listed


def _described(folder: Path, paths: list[Path], listed: dict[str, str] | None) -> HFFolder:
    found = HFFolder(folder, {}, {}, {})
    for path in paths:
        for name, (shape, dtype) in _header(path).items():
            found.files[name], found.shapes[name], found.dtypes[name] = path, shape, dtype
    for name, file in (listed or {}).items():
        if name not in found.files or found.files[name].name != file:
            raise UserError(f"{folder / file}: has no {name}, which the index says; get it anew")
    return found


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    if not path.is_file():
        raise UserError(f"{path}: missing, the index names it; get the whole folder")
    if path.suffix == ".bin":
        return {name: (tuple(t.shape), t.dtype) for name, t in _load_bin(path).items()}
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: (tuple(part.get_shape()), _dtype(path, name, part.get_dtype()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); get the file anew") from None


DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""safetensors' names of the types that weights may have."""


def _dtype(path: Path, name: str, given: str) -> torch.dtype:
    # masks and counters of old models are of other types; a weight is refused where it is used
    return DTYPES.get(given, torch.uint8)


def _load_bin(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: not read ({reason}); damaged, more than plain tensors, or of the time before "
            "torch 1.6: convert it to safetensors"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(f"{path}: holds something else than named tensors; give a model's file")
    return content

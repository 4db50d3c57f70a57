"""A safetensors file written tensor by tensor; the package's own writer wants all of them at once.

Format: 8 bytes with the header's length (little-endian), the header as JSON, then the tensors'
bytes in order without gaps. Source: the format's description, huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from taid_megatron.conversion.hf_folder import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Spec(NamedTuple):
    """A tensor to come."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(path: Path, specs: Mapping[str, Spec], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a file and flush it to the disk; tensors come in the order of specs, one at a time."""
    with path.open("wb") as file:
        file.write(_header(specs))
        expected = iter(specs.items())
        for name, tensor in tensors:
            assert (name, Spec(tuple(tensor.shape), tensor.dtype)) == next(expected), name
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        assert next(expected, None) is None, "tensors are missing"
        file.flush()
        os.fsync(file.fileno())


def _header(specs: Mapping[str, Spec]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.num_bytes
        header[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text

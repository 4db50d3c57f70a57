"""The software that runs stand on: versions looked up, nothing of it imported."""

from __future__ import annotations

import importlib.util
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

# What was run together; see pyproject.toml.
NEEDED = {
    "torch": ">=2.6,<2.14",
    "megatron-core": ">=0.16.1,<0.17",
    "numpy": ">=1.26",
    "psutil": ">=5.9",
    "pydantic": ">=2.7,<3",
}
# words -> the packages that bring it, one of which is enough, and the versions that were tried
OPTIONAL: dict[str, tuple[tuple[str, ...], str]] = {
    "Transformer Engine": (("transformer-engine", "transformer_engine_torch"), ">=2.9,<2.12"),
    "Apex": (("apex",), ""),
    "NCCL": (("nvidia-nccl-cu13", "nvidia-nccl-cu12"), ""),
    "cuDNN": (("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"), ""),
    "DALI": (("nvidia-dali-cuda130", "nvidia-dali-cuda120"), ">=2.0"),
    "Triton": (("triton", "pytorch-triton"), ""),
    "transformers": (("transformers",), ">=4.57"),
    "tokenizers": (("tokenizers",), ">=0.20"),
    "safetensors": (("safetensors",), ">=0.4.3"),
    "pyarrow": (("pyarrow",), ">=17"),
    "lm-eval": (("lm-eval",), ">=0.4.9,<0.5"),
    "W&B": (("wandb",), ""),
}
MISSING = "not installed"


def installed(package: str) -> str | None:
    """Its version; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def optional(name: str) -> tuple[str, str] | None:
    """(package, version) of what is installed of OPTIONAL's `name`."""
    for package in OPTIONAL[name][0]:
        if version := installed(package):
            return package, version
    return None


def gpu_platform() -> str | None:
    """The CUDA (or ROCm) that torch was built for, read in its files; None: for the CPU alone."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        return None
    try:
        text = Path(found.submodule_search_locations[0], "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    version = re.search(r"^(?:cuda|hip)\b[^=\n]*= *['\"]([^'\"]+)", text, re.MULTILINE)
    return version[1] if version else None


def cuda_of_package(package: str) -> int | None:
    """The CUDA generation in a package's name: nvidia-nccl-cu12, nvidia-dali-cuda120."""
    found = re.search(r"-cu(?:da)?(\d\d)", package)
    return int(found[1]) if found else None


def versions() -> Iterator[tuple[str, str]]:
    """(words, version) of all of it, what is missing named as missing."""
    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in NEEDED:
        yield package, installed(package) or MISSING
        if package == "torch":
            yield "CUDA of torch", gpu_platform() or "none, a CPU build"
    for name in OPTIONAL:
        found = optional(name)
        yield name, found[1] if found else MISSING

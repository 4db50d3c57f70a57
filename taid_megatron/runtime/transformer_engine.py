"""Whether Transformer Engine can be used here, found out once per process.

Without CUDA, or with a build for another CUDA or torch, importing it raises RuntimeError, OSError
or whatever its library comes upon. megatron-core expects ImportError alone and could then not be
imported either. So it is tried here first, before megatron-core is imported, and where it fails it
is hidden: megatron-core then finds it missing and does without.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys

import torch

_NAME = "transformer_engine"


@functools.cache
def probe() -> tuple[bool, str]:
    """(True, its version), or (False, why it cannot be used)."""
    if importlib.util.find_spec(_NAME) is None:
        return False, "not installed"
    problem = "no GPU"
    if torch.cuda.is_available():
        try:
            importlib.import_module(f"{_NAME}.pytorch")
            return True, importlib.metadata.version(_NAME)
        except Exception as error:
            first_line = next(iter(str(error).splitlines()), "")
            problem = f"its import failed, {type(error).__name__}: {first_line}"
    # what of it was imported goes, too: each import of it, or below it, is then an ImportError
    for module in [name for name in sys.modules if name.split(".")[0] == _NAME]:
        del sys.modules[module]
    sys.modules[_NAME] = None  # type: ignore[assignment]
    return False, problem

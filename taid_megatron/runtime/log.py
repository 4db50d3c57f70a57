"""What a run tells its user: one voice for all ranks.

`say` is for the user: plain lines on stdout, from rank 0 alone. `get_logger` is for what went wrong
or might: lines on stderr, rank 0's warnings and every rank's errors. Nothing here prints the
environment, where clusters keep their secrets.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

from taid_megatron.config.secrets import hidden

_NAME = "taid_megatron"
_MEGATRON = "megatron"
_RENAMED_IN_TORCH = (
    *("ShardedTensor", "load_state_dict", "all_gather_into_tensor", "reduce_scatter_tensor"),
    *("_all_gather_base", "_reduce_scatter_base"),
)


def rank() -> int:
    """This process's rank: torch.distributed's once it runs, else the launcher's RANK, else 0."""
    torch = sys.modules.get("torch")  # where torch is not imported, its groups do not run
    if torch is not None and torch.distributed.is_available():
        if torch.distributed.is_initialized():
            return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def say(text: str) -> None:
    """A line to the user on stdout, at once; silent on other ranks than 0."""
    if rank() == 0:
        print(hidden(text), flush=True)


def get_logger() -> logging.Logger:
    """The program's logger, ready to use. Its lines carry the level, and the rank where not 0."""
    logger = logging.getLogger(_NAME)
    if not any(isinstance(handler, _RankHandler) for handler in logger.handlers):
        logger.addHandler(_RankHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger


def quiet_megatron() -> None:
    """Keep megatron-core's standing remarks from the user; call it before its first import.

    Without Transformer Engine and Apex it warns in half a dozen modules that it will do without,
    every TransformerConfig warns of a default of its own, and its checkpoints call functions that
    torch is about to rename.
    On other ranks than 0 its warnings and its loggers' lines below errors are dropped as well.
    Calling it again changes nothing.
    """
    warnings.filterwarnings("ignore", r".*Apex (is|are) not installed", UserWarning)
    warnings.filterwarnings("ignore", r"full scope is deprecated", UserWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"megatron\.")
    for renamed in _RENAMED_IN_TORCH:
        warnings.filterwarnings("ignore", rf".*{renamed}", FutureWarning)
    if rank() != 0:
        warnings.filterwarnings("ignore", module=r"megatron\.")
        logging.getLogger(_MEGATRON).setLevel(logging.ERROR)


class _RankHandler(logging.Handler):
    """To stderr as it is now: a progress bar or a test may have replaced it since the start."""

    def emit(self, record: logging.LogRecord) -> None:
        here = rank()
        if here != 0 and record.levelno < logging.ERROR:
            return
        try:
            where = f"rank {here}: " if here != 0 else ""
            text = hidden(self.format(record))
            print(f"{where}{record.levelname.lower()}: {text}", file=sys.stderr)
        except Exception:
            self.handleError(record)

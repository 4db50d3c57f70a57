"""The quick start: a teacher trained, distilled by several methods, exported and reported."""

from taid_megatron.quickstart.run import run
from taid_megatron.quickstart.stages import LONG, Sizes

__all__ = ["LONG", "Sizes", "run"]

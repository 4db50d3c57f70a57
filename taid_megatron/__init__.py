"""Pre-training distillation by TAID on Megatron: see README.md for the map of the code."""

__version__ = "0.1.0"

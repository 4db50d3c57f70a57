"""Weights between Hugging Face folders and Megatron's parameters.

Read families.py (the tables) and segments.py (from a parameter to parts of tensors) first.
"""

from taid_megatron.runtime import cpu_engine, log

# before the first import of megatron-core, see training/__init__.py
log.quiet_megatron()
cpu_engine.prepare_import()

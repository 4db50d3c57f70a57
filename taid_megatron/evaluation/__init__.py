"""How good a checkpoint is: held-out text, its teacher, last words, public suites. Read run.py."""

from taid_megatron.runtime import cpu_engine, log

# before the first import of megatron-core, see training/__init__.py
log.quiet_megatron()
cpu_engine.prepare_import()

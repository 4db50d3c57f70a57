"""Training: everything here needs megatron-core, so it is imported the right way first."""

from taid_megatron.runtime import cpu_engine, log

log.quiet_megatron()
cpu_engine.prepare_import()

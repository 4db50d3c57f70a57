"""The sample index of a run, built before it on one machine, for all of its ranks."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from taid_megatron.config.schema import Config
from taid_megatron.training.setup import open_datasets


def prebuild(config: Config, num_ranks: int) -> Path:
    """Writes the shuffled indices that a run of `config` on `num_ranks` ranks will look for.

    Needs no GPU and no model. Returns the folder. Raises UserError for what is wrong in the data.
    """
    # A group of one: megatron-core writes the index of a blend only where there are ranks.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        open_datasets(config, num_ranks)
    finally:
        dist.destroy_process_group()
    return config.data.cache or config.run.folder / "cache"

"""A rank of a run whose ranks talk over gloo, whatever the device.

python -m tests.gpu.rank_over_gloo STORE CONFIG [section.key=value ...], with RANK, WORLD_SIZE and
LOCAL_RANK set. `distributed.start` joins ranks only where nothing has joined them before.
"""

import os
import sys

import torch.distributed as dist

from taid_megatron.config.load import load
from taid_megatron.training import loop

if __name__ == "__main__":
    store, config, *overrides = sys.argv[1:]
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    code = loop.run(load(config, overrides))
    dist.destroy_process_group()
    sys.exit(code)

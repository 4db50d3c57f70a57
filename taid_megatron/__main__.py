"""`python -m taid_megatron`, which torchrun starts on every rank."""

import sys

from taid_megatron.cli import main

# Guarded: checkpoint saves spawn a process that imports this module again.
if __name__ == "__main__":
    sys.exit(main())

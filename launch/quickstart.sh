#!/usr/bin/env bash
# Set up .venv where needed, then run the quick start; options go to `taid-megatron quickstart`.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
bash "$root/launch/setup.sh"
exec "$root/.venv/bin/taid-megatron" quickstart "$@"

#!/usr/bin/env bash
# Everything CI runs: style, types, tests. Arguments go to pytest (`bash tests/run.sh -k schedule`).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$root"
bash launch/setup.sh --test

# Tests start several ranks at once: more threads than one each would fight for the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
bin="$root/.venv/bin"
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
exec "$bin/python" -m pytest -m "not slow and not slurm and not browser" "$@"

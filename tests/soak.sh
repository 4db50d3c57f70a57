#!/usr/bin/env bash
# Faults again and again, seeded: kills, stopped ranks, signals, damage. An hour by default.
#
#   bash tests/soak.sh [seconds] [seed] [--only kill] [--out soak.json]
#
# Prints a table and writes the same as JSON; exit code 1 where a run could not go on, a checkpoint
# was not whole, a fault was not found or a process was left over.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$root"
python="${PYTHON:-$root/.venv/bin/python}"
[ -x "$python" ] || { bash launch/setup.sh --test; }
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" -m tests.faults.soak "$@"

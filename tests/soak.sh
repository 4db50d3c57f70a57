#!/usr/bin/env bash
# kill -9 again and again, in every window of a save and at random moments; an hour by default.
#
#   bash tests/soak.sh [seconds] [seed]
#
# Prints how many kills there were; fails where a run could not go on or a checkpoint was not whole.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$root"
python="${PYTHON:-$root/.venv/bin/python}"
[ -x "$python" ] || { bash launch/setup.sh --test; }
export SOAK_SECONDS="${1:-3600}" SOAK_SEED="${2:-0}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" -m pytest -q -s -m slow tests/faults/test_kill.py

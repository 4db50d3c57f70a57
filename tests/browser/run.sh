#!/usr/bin/env bash
# The pages of report and plan in a real browser; screenshots go to runs/screenshots.
#
#   bash tests/browser/run.sh
#
# Needs Chromium. Where there is none and apt-get may install, Debian's package is installed.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"
cd "$root"
bash launch/setup.sh --test
if ! command -v chromium >/dev/null; then
    apt-get install --yes --no-install-recommends chromium fonts-dejavu-core ||
        { echo "run.sh: no chromium; install it (Debian: apt-get install chromium)" >&2; exit 2; }
fi
mkdir -p runs/screenshots
SCREENSHOTS="$root/runs/screenshots" exec "$root/.venv/bin/python" -m pytest -m browser tests/browser "$@"

#!/usr/bin/env bash
# Benchmarks: ratios side by side in one run, as tables and as JSON in runs/benchmarks.
#
#   bash tests/benchmarks/run.sh [loss|attention|pair|collectives|data|timeline|checkpoint|loss_gpu|readers ...]
#
# None named: all but loss_gpu, which needs a CUDA device, and readers, which needs DALI.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"
cd "$root"
bash launch/setup.sh --test
python="$root/.venv/bin/python"
mkdir -p runs/benchmarks

for name in "${@:-loss attention pair collectives data timeline checkpoint}"; do
    for benchmark in $name; do
        if [ ! -f "tests/benchmarks/$benchmark.py" ]; then
            echo "run.sh: no benchmark '$benchmark'; there are: loss attention pair collectives data timeline checkpoint loss_gpu readers" >&2
            exit 2
        fi
        echo "== $benchmark"
        PYTHONPATH="$root" "$python" -W ignore "tests/benchmarks/$benchmark.py" \
            --json "runs/benchmarks/$benchmark.json"
    done
done

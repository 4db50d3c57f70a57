#!/usr/bin/env bash
# The conversion's tests against each generation of transformers; by hand, not in CI.
#
#     bash tests/transformers_matrix.sh              the versions below
#     bash tests/transformers_matrix.sh 4.57.1 5.0.0
#
# Each version gets a virtual environment of its own, which sees the packages of the project's behind
# its own: torch and megatron-core are there once. Needs a package index.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$root"
python="${PYTHON:-$root/.venv/bin/python}"
environments="${MATRIX:-$root/.venv/transformers}"
versions=("$@")
[ ${#versions[@]} -gt 0 ] || versions=("4.57.*" "5.0.*" "5.*")

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH="$root"
failed=()
for version in "${versions[@]}"; do
    environment="$environments/${version//[^0-9.]/x}"
    if [ ! -f "$environment/installed" ]; then
        rm -rf "$environment"
        "$python" -m venv "$environment"
        packages=$("$environment/bin/python" -c 'import site; print(site.getsitepackages()[0])')
        "$python" -c 'import site; print(site.getsitepackages()[0])' >"$packages/project.pth"
        "$environment/bin/python" -m pip install --quiet "transformers==$version"
        touch "$environment/installed"
    fi
    echo "== $("$environment/bin/python" -c 'import transformers; print("transformers", transformers.__version__)')"
    "$environment/bin/python" -m pytest -q -p no:cacheprovider \
        tests/distributed/test_hf_import.py tests/distributed/test_hf_export.py \
        tests/unit/conversion || failed+=("$version")
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi

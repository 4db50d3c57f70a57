#!/usr/bin/env bash
# Make .venv in the project's folder with everything installed; instant where that is done.
#
#   bash launch/setup.sh [--test]      --test: also what the tests need
#
# PYTHON=/path/to/python picks the interpreter; else the first of 3.10 to 3.13 on the PATH is taken.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
stamp="$venv/.installed"
unfinished="$venv/.unfinished"
log="$venv/setup.log"
oldest_pip="21.3" # the first that installs a pyproject.toml folder as editable

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 2
}

extra=base
case "${1:-}" in
"") ;;
--test) extra="test" ;;
*) die "unknown option '$1'; the only one is --test" ;;
esac

# The folder is part of it: a moved project has stale paths in its .venv.
fingerprint="$(cksum <"$root/pyproject.toml") $root"

is_done() {
    [ -x "$venv/bin/python" ] && [ -f "$stamp" ] || return 1
    local had
    had="$(cat "$stamp")"
    # What the tests need includes all that a run needs.
    [ "$had" = "$fingerprint $extra" ] || [ "$had" = "$fingerprint test" ]
}

fits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; }
makes_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

# Prints the interpreter to use.
find_python() {
    local name other="" bare=""
    if [ -n "${PYTHON:-}" ]; then
        fits "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.10 to 3.13; set another, or unset it"
        makes_venv "$PYTHON" ||
            die "PYTHON=$PYTHON has no venv module; install it (Debian, Ubuntu: python3-venv)"
        printf '%s\n' "$PYTHON"
        return
    fi
    for name in python3.12 python3.11 python3.10 python3.13 python3 python; do
        command -v "$name" >/dev/null || continue
        if ! fits "$name"; then
            other="${other:-$("$name" --version 2>/dev/null || true)}"
        elif ! makes_venv "$name"; then
            bare="${bare:-$name}"
        else
            command -v "$name"
            return
        fi
    done
    [ -z "$bare" ] || die "$bare has no venv module; install it (Debian, Ubuntu: apt install $bare-venv)"
    [ -z "$other" ] || die "found $other, but Python 3.10 to 3.13 is needed; install one, or set PYTHON"
    die "no Python on the PATH; install Python 3.10 to 3.13, or set PYTHON=/path/to/python"
}

make_venv() {
    local python
    python="$(find_python)"
    say "making $venv with $("$python" --version)"
    # --clear: what an interrupted call left is of no use.
    "$python" -m venv --clear "$venv" >/dev/null 2>&1 ||
        die "$python could not make $venv; is the disk full, or its venv module broken?"
}

# The reason of a failed pip without addresses, which say nothing about the mend.
pip_error() {
    local reason
    reason="$(grep 'ERROR: ' "$log" | head -n 1 | cut -c 1-300 |
        sed -E "s/^.*ERROR: //; s#https?://[^ )]*#(address)#g; s/host='[^']*'/host/g")" || true
    printf '%s (all of it: %s)' "${reason:-it gave no reason}" "$log"
}

pip() {
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip "$@" >>"$log" 2>&1
}

install() {
    local target="$root"
    [ "$extra" = base ] || target="${root}[$extra]"
    : >"$log"
    if ! "$venv/bin/python" - "$oldest_pip" <<'PY'; then
import sys, pip
version = tuple(int(part) for part in pip.__version__.split(".")[:2])
sys.exit(version < tuple(int(part) for part in sys.argv[1].split(".")))
PY
        pip install --quiet --upgrade pip ||
            die "pip is older than $oldest_pip and could not be upgraded: $(pip_error)"
    fi
    say "installing, some minutes the first time"
    # A pip that is killed may leave half a package behind: the mark makes the next call start over.
    rm -f "$stamp"
    : >"$unfinished"
    if ! pip install --quiet --editable "$target"; then
        rm -f "$unfinished"
        die "pip failed: $(pip_error)"
    fi
    printf '%s\n' "$fingerprint $extra" >"$stamp"
    rm -f "$unfinished"
}

healthy() { fits "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }

if is_done; then exit 0; fi
{ mkdir -p "$venv" && [ -w "$root" ] && [ -w "$venv" ]; } 2>/dev/null ||
    die "cannot write to $venv; make the folder writable, or copy the project elsewhere"
if [ -f "$unfinished" ] || ! healthy; then make_venv; fi
install
say "done"

#!/usr/bin/env bash
# Run a taid-megatron command on the ranks of one node, or of many: call it once on each node.
#
#   bash launch/torchrun.sh [OPTIONS] train CONFIG.yaml [section.key=value ...]
#   bash launch/torchrun.sh [OPTIONS] COMMAND [ARGUMENTS]      another command that takes ranks
#
# Options, and the environment variables that stand for them:
#   --nproc-per-node N        NPROC_PER_NODE     ranks on this node (default: its GPUs, else 1)
#   --nnodes N                NNODES             default 1
#   --rdzv-endpoint HOST:PORT RDZV_ENDPOINT      node that all nodes reach, and a free port on it;
#                                                needed with several nodes
#   --rdzv-id ID              RDZV_ID            the same on all nodes (default: taid)
#   --node-rank N             NODE_RANK          0 on the node of the endpoint, else another number
#                                                (default: under Slurm the task's node, else found
#                                                by the endpoint's name)
#   --shutdown-timeout S      SHUTDOWN_TIMEOUT   seconds the ranks have for a checkpoint after a
#                                                signal, before they are killed (default: 600)
# PYTHON picks the interpreter (default: .venv of the project, else python3).
#
# SIGTERM, SIGUSR1, SIGINT and SIGHUP go on to the ranks.
# Exit code: 2 where a rank refused something that you can mend (its line comes last); else of
# `train` the one in RUN/run_status.json, where this run wrote it (torchrun itself knows 0 and 1
# only); else torchrun's. 75, too, where a signal came before the ranks were started.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
NAME=torchrun.sh
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"

# From the start on: Slurm's SIGUSR1 would end a script that has no trap yet.
usr1=USR1
trap 'forward_signal TERM TERM' TERM
trap 'forward_signal INT INT' INT
trap 'forward_signal HUP HUP' HUP
trap 'forward_signal USR1 "$usr1"' USR1

# Also after a command that failed: a signal to the whole group ended it.
end_if_signalled() {
    [ -z "$caught" ] || {
        say "SIG$caught before the ranks were started: nothing was run"
        exit 75
    }
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        printf '%s\n' "$PYTHON"
    elif [ -x "$root/.venv/bin/python" ]; then
        printf '%s\n' "$root/.venv/bin/python"
    else
        printf 'python3\n'
    fi
}

count_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        # -1 and what follows it are hidden
        printf '%s\n' "${CUDA_VISIBLE_DEVICES%%-1*}" | tr ',' '\n' | grep -c . || true
    else
        nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true
    fi
}

whole() { # whole OPTION VALUE LEAST
    [[ "$2" =~ ^[0-9]+$ ]] && [ "$2" -ge "$3" ] ||
        die "$1 '$2': expected a whole number from $3 up"
}

nproc_per_node="${NPROC_PER_NODE:-}"
nnodes="${NNODES:-1}"
endpoint="${RDZV_ENDPOINT:-}"
rdzv_id="${RDZV_ID:-taid}"
node_rank="${NODE_RANK:-${SLURM_NODEID:-}}"
shutdown_timeout="${SHUTDOWN_TIMEOUT:-600}"
while [[ "${1:-}" == --* ]]; do
    [ $# -ge 2 ] || die "$1: a value is missing"
    case "$1" in
    --nproc-per-node) nproc_per_node="$2" ;;
    --nnodes) nnodes="$2" ;;
    --rdzv-endpoint) endpoint="$2" ;;
    --rdzv-id) rdzv_id="$2" ;;
    --node-rank) node_rank="$2" ;;
    --shutdown-timeout) shutdown_timeout="$2" ;;
    *) die "unknown option '$1'; the first lines of launch/torchrun.sh have them all" ;;
    esac
    shift 2
done
[ $# -ge 1 ] || die "no command given, such as: train CONFIG.yaml"
if [ -z "$nproc_per_node" ]; then
    nproc_per_node="$(count_gpus)"
    [ "$nproc_per_node" -gt 0 ] || nproc_per_node=1
fi
whole --nproc-per-node "$nproc_per_node" 1
whole --nnodes "$nnodes" 1
whole --shutdown-timeout "$shutdown_timeout" 0
[ -z "$node_rank" ] || whole --node-rank "$node_rank" 0
[ "$nnodes" = 1 ] || [[ "$endpoint" =~ ^.+:[0-9]+$ ]] ||
    die "--rdzv-endpoint '$endpoint': $nnodes nodes need HOST:PORT of one that all of them reach"

python="$(find_python)"
torch="$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])' \
    2>/dev/null)" || {
    end_if_signalled
    die "$python has no torch; run bash launch/setup.sh, or set PYTHON"
}

# The configuration is read once here, so that a bad one is refused before any rank starts.
status="" tensor=1 context=1
if [ "$1" = train ]; then
    [ $# -ge 2 ] || die "train: no CONFIG.yaml given"
    values="$("$python" -m taid_megatron.config.value "${@:2}" -- \
        run.folder parallel.tensor parallel.context)" || {
        code=$?
        end_if_signalled
        exit "$code"
    }
    { read -r status && read -r tensor && read -r context; } <<<"$values"
    status="$status/run_status.json"
fi

# torchrun would fail to listen there, or join whatever does, and end with 1.
if [ -n "$endpoint" ] && [ "$node_rank" = 0 ]; then
    "$python" -c 'import socket, sys; socket.create_server(("", int(sys.argv[1]))).close()' \
        "${endpoint##*:}" 2>/dev/null || {
        end_if_signalled
        die "--rdzv-endpoint '$endpoint': this node, number 0, cannot listen on that port; name a" \
            "free one from 1024 to 65535 (RDZV_PORT in a batch job)"
    }
fi

# --- Environment of the ranks. What is set already stays.

# With one hardware queue, kernels run in the order of their launch. Megatron relies on it to overlap
# the messages of tensor and context parallelism with the matrix products launched behind them.
if [ "$tensor" -gt 1 ] || [ "$context" -gt 1 ]; then
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
fi
# Every rank would else start a thread per core of the node (torchrun itself: one thread, which
# starves the optimizer and the loss on a CPU).
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    threads=$(($(nproc) / nproc_per_node))
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi
# gloo else looks up the host's own name, which not every machine can resolve.
if [ "$nnodes" = 1 ] && [ -e /sys/class/net/lo ]; then
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
fi

# --- torchrun

# No restarts: it would restart ranks that stopped with a checkpoint, too.
options=(--nnodes "$nnodes" --nproc-per-node "$nproc_per_node" --max-restarts 0)
if [ -n "$endpoint" ]; then
    options+=(--rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$rdzv_id")
    # A host may know itself by another name than the endpoint's: said outright, nothing is guessed.
    case "$node_rank" in
    "") ;;
    0) options+=(--rdzv-conf is_host=1) ;;
    *) options+=(--rdzv-conf is_host=0) ;;
    esac
else
    options+=(--standalone)
fi
start=("$python")
if grep -q -e '"--signals-to-handle"' "$torch/distributed/run.py"; then
    options+=("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
else
    # This torchrun dies of SIGUSR1 and leaves its ranks behind: it never sees one.
    usr1=TERM
    start=(env --ignore-signal=USR1 "$python")
fi
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="$shutdown_timeout"
if grep -q -e '"--shutdown-timeout"' "$torch/distributed/run.py"; then
    options+=(--shutdown-timeout "$shutdown_timeout")
elif ! grep -q -r TORCH_ELASTIC_SHUTDOWN_TIMEOUT --include='*.py' "$torch/distributed/launcher" \
    "$torch/distributed/elastic"; then
    say "this torch kills ranks 30 s after a signal, whatever --shutdown-timeout says: a checkpoint" \
        "that takes longer is lost (torch 2.13 does better)"
fi

# What tells one writing of the status file from another. Opened first: a network file system then
# asks its server, where a plain stat may answer from a cache.
written() { { stat -Lc '%i %y %s' /dev/stdin <"$status"; } 2>/dev/null || true; }

# The code in a status file that this run wrote; nothing where there is none.
status_code() {
    [ -n "$status" ] && [ "$(written)" != "$before" ] || return 0
    "$python" -c 'import json, sys
code = json.load(open(sys.argv[1])).get("exit_code")
print(code if isinstance(code, int) else "")' "$status" || say "$status cannot be read"
}

# Ranks that refuse what you can mend add their line to this file: torchrun hides their exit codes.
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
export TAID_REFUSALS="$folder/refusals"

before="$([ -z "$status" ] || written)"
end_if_signalled
code=0
forwarding "${start[@]}" -m torch.distributed.run "${options[@]}" -m taid_megatron "$@" || code=$?
written_code="$(status_code)"
# A run is done where both say so: a rank may die after the status was written.
if [ "${written_code:-0}" != 0 ]; then code="$written_code"; fi
if [ "$code" != 0 ] && [ -s "$TAID_REFUSALS" ]; then die "$(head -n 1 "$TAID_REFUSALS")"; fi
exit "$code"

#!/usr/bin/env bash
# What the batch scripts beside this file do inside their allocation, on its first node.
#
# Read the settings at the head of generic.sbatch. In order: refuse what cannot work, time the
# network (`doctor --network`), train, requeue where the run stopped with a checkpoint, export,
# evaluate. Everything on other nodes goes through srun.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"
NAME=job.sh
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"

# From the start on: a job may be warned while it reads its configuration.
stopped_by=""
trap 'stopped_by=USR1; forward_signal USR1 USR1' USR1
trap 'stopped_by=TERM; forward_term' TERM

# No grep -q in a pipe: scontrol would die of the closed end, and with pipefail that is a "no".
is_running() { scontrol show job --oneliner "$SLURM_JOB_ID" | grep 'JobState=RUNNING ' >/dev/null; }

# srun answers SIGTERM by killing its tasks, and hands SIGUSR1 on to them. A job that is cancelled or
# has lost a node is signalled by Slurm, tasks included: once more would be the second signal.
forward_term() {
    if is_running; then
        forward_signal TERM USR1
    else
        caught=TERM
    fi
}

[ -n "${SLURM_JOB_ID:-}" ] ||
    die "runs inside a Slurm job; submit one: sbatch launch/slurm/generic.sbatch CONFIG.yaml"
[ $# -ge 1 ] || die "no CONFIG.yaml given: sbatch ... FILE.sbatch CONFIG.yaml [section.key=value ...]"
nodes="$SLURM_JOB_NUM_NODES"
restarts="${SLURM_RESTART_COUNT:-0}"
max_requeues="${MAX_REQUEUES:-20}"
logs="${LOGS:-$PWD/logs}"
runtime="${CONTAINER_RUNTIME:-none}"
image="${CONTAINER_IMAGE:-}"
tokenizer=(${TOKENIZER:+--tokenizer "$TOKENIZER"})
mounts="$root:$root,$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"

# srun takes no --cpus-per-task from sbatch: each node's ranks would share one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ "$runtime" = none ] && [ -x "$root/.venv/bin/python" ]; then PYTHON="$root/.venv/bin/python"; fi
fi
export PYTHON

# What stands before a command on a node, for srun and for the container.
inside=()
container_flags=()
case "$runtime" in
none) ;;
pyxis)
    container_flags=("--container-image=$image" "--container-mounts=$mounts" "--container-workdir=$PWD")
    ;;
apptainer)
    inside=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$image")
    ;;
*) die "CONTAINER_RUNTIME=$runtime: expected none, pyxis or apptainer" ;;
esac
[ "$runtime" = none ] || [ -n "$image" ] || die "CONTAINER_RUNTIME=$runtime needs CONTAINER_IMAGE"

hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
first="${hosts%%$'\n'*}"
# Jobs that share a node must not share a port; a restart must not meet the one before.
endpoint="$first:${RDZV_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
rdzv_id="$SLURM_JOB_ID-$restarts"

# on_first_node COMMAND...: its output is this script's.
on_first_node() {
    srun --nodes=1 --ntasks=1 "--nodelist=$first" "${container_flags[@]}" "${inside[@]}" "$@"
}
taid_megatron() { on_first_node "$PYTHON" -m taid_megatron "$@"; }

# on_all_nodes COMMAND...: once on each.
on_all_nodes() {
    srun "--nodes=$nodes" "--ntasks=$nodes" --ntasks-per-node=1 \
        "${container_flags[@]}" "${inside[@]}" "$@"
}

# on_all_ranks COMMAND [ARGUMENTS]: a taid-megatron command on every GPU, one log per node.
#
# One task per node: torchrun starts its ranks. A node that ends does not end the others at once
# (they may still be writing the checkpoint they all stopped for), but it does after a while.
on_all_ranks() {
    forwarding srun "--nodes=$nodes" "--ntasks=$nodes" --ntasks-per-node=1 \
        --kill-on-bad-exit=0 "--wait=${NODE_WAIT_SECONDS:-120}" \
        "--output=$logs/$SLURM_JOB_ID-%N.log" --open-mode=append \
        "${container_flags[@]}" "${inside[@]}" \
        bash "$root/launch/torchrun.sh" --nnodes "$nodes" --rdzv-endpoint "$endpoint" \
        --rdzv-id "$rdzv_id" --shutdown-timeout "${SHUTDOWN_TIMEOUT:-540}" "$@"
}

has_command() { taid_megatron "$1" --help >/dev/null 2>&1; }

# requeue_or_end HOW: after a run that stopped.
requeue_or_end() {
    if ! is_running; then
        say "$1, and Slurm is ending the job: not requeued from here"
    elif [ "$stopped_by" = TERM ]; then
        say "$1 by SIGTERM: not requeued; the same sbatch line goes on from its newest checkpoint"
    elif [ "$restarts" -ge "$max_requeues" ]; then
        say "$1 after $restarts restarts, MAX_REQUEUES=$max_requeues: not requeued"
    else
        say "$1: requeueing, restart $((restarts + 1)) of at most $max_requeues"
        scontrol requeue "$SLURM_JOB_ID" || die "scontrol requeue failed; submit the job again"
    fi
    exit 75
}

# A warned job has no time left for what comes next.
go_on_if_not_stopped() { [ -z "$stopped_by" ] || requeue_or_end "stopped before the run began"; }

mkdir -p "$logs" || die "LOGS=$logs cannot be made"
say "job $SLURM_JOB_ID, restart $restarts, $nodes nodes; a log per node: $logs/$SLURM_JOB_ID-*.log"
if scontrol show config 2>/dev/null | grep 'ProctrackType .*proctrack/linuxproc' >/dev/null; then
    # Ranks would get a signal from Slurm and again from torchrun, and take it for a second one.
    say "this Slurm has ProctrackType=proctrack/linuxproc, which signals every process of a step: a" \
        "stop by signal or time limit leaves no new checkpoint; proctrack/cgroup does"
fi
# Also refuses a bad configuration, before hours of queueing become a crash on every node.
# The last line: images of vendors greet on stdout.
values=("$PYTHON" -m taid_megatron.config.value "$@" -- run.folder)
run="$(on_first_node "${values[@]}" | tail -n 1)" || exit $?
# A node that cannot read it would refuse it alone, and the others wait for that node.
[ "$nodes" = 1 ] || on_all_nodes "${values[@]}" >/dev/null || exit $?
[ -z "${EXPORT_TO:-}" ] || has_command export ||
    die "EXPORT_TO=$EXPORT_TO: this version has no 'taid-megatron export'; submit without it"
[ "${EVALUATE:-no}" = no ] || has_command evaluate ||
    die "EVALUATE=$EVALUATE: this version has no 'taid-megatron evaluate'; submit without it"

code=0
if [ "${DOCTOR:-yes}" = no ]; then
    say "DOCTOR=no: the network is not timed"
elif ! has_command doctor; then
    say "this version has no 'taid-megatron doctor': the network is not timed"
else
    say "doctor --network"
    on_all_ranks doctor "$@" --network || code=$?
    go_on_if_not_stopped
    [ "$code" = 0 ] || {
        say "doctor ended with $code (see the logs); DOCTOR=no trains in spite of it"
        exit "$code"
    }
fi

go_on_if_not_stopped
say "train"
on_all_ranks train "$@" || code=$?
if [ "$code" = 75 ]; then requeue_or_end "stopped with a checkpoint"; fi
# Ranks that were still starting die of the signal; one with a bad configuration would do it again.
if [ "$code" != 0 ] && [ "$code" != 2 ] && [ -n "$stopped_by" ]; then
    requeue_or_end "stopped with code $code, without a checkpoint of its own"
fi
if [ "$code" != 0 ]; then
    say "train ended with $code: not requeued; the logs say why"
    exit "$code"
fi
if [ -n "${EXPORT_TO:-}" ]; then
    say "export to $EXPORT_TO"
    taid_megatron export "$run" --out "$EXPORT_TO" "${tokenizer[@]}"
fi
if [ "${EVALUATE:-no}" != no ]; then
    say "evaluate"
    on_all_ranks evaluate "$run" --out "$run/evaluation" "${tokenizer[@]}"
fi
say "done"

# What the launch scripts share; sourced, not run.
# shellcheck shell=bash

# NAME of the script that speaks is set by it.
say() { printf '%s: %s\n' "$NAME" "$*" >&2; }
die() {
    say "$*"
    exit 2
}

child=""
caught="" sent=""

# forward_signal SEEN SENT: hand a signal on to the running command, or to the next one.
forward_signal() {
    caught="$1" sent="$2"
    [ -z "$child" ] || kill -s "$2" "$child" 2>/dev/null || true
}

# forwarding COMMAND...: run it and return its exit code; traps that call forward_signal reach it.
#
# It gets a process group of its own (set -m). In the script's group it would get what a terminal or
# Slurm sends to the whole group, and once more from the trap; to the ranks a second signal means
# "leave at once, without a checkpoint".
forwarding() {
    local code="" last
    set -m
    "$@" </dev/null &
    child=$!
    set +m
    # one that came before there was a child
    [ -z "$caught" ] || kill -s "$sent" "$child" 2>/dev/null || true
    while :; do
        caught=""
        last=0
        wait "$child" || last=$?
        # 127 the second time: it was waited for before, and its code is known.
        if [ -z "$code" ] || [ "$last" != 127 ]; then code="$last"; fi
        # A trapped signal ends the wait, not the command: wait for it again.
        [ -n "$caught" ] || break
    done
    child=""
    return "$code"
}

#!/usr/bin/env bash
# mpirun.sh RANKS [HOSTFILE] [key=value...]: trains on so many ranks, here or on the machines of a file ("host slots=N" a line). SIGTERM and
# Ctrl-C have the ranks save and leave (exit code 140); a second one ends them at once.
set -euo pipefail
ranks=${1:?how many ranks}
shift
where=()
if [ $# -gt 0 ] && [[ $1 != *=* ]]; then
    where=(--hostfile "$1")
    shift
fi
# The same file on all machines: what ssh finds by name depends on how a shell is started there.
polyhead=$(command -v polyhead) || { echo "polyhead is not in PATH" >&2; exit 127; }
here=$(cd "$(dirname "$0")" && pwd)

# In a process group of its own, so that Ctrl-C reaches this script alone.
set -m
mpirun -n "$ranks" "${where[@]}" --bind-to none ${RAYON_NUM_THREADS:+-x RAYON_NUM_THREADS} \
    "$here/rank.sh" "$polyhead" train recipes/cluster/run.toml --out checkpoints/cluster "$@" < /dev/null &
job=$!
# mpirun passes this signal on at once; SIGTERM it would pass on late, and kill the ranks a second later, before they have saved.
trap 'kill -USR2 "$job" || true' TERM INT HUP
# A signal ends `wait`, not the job.
code=0
wait "$job" || code=$?
while kill -0 "$job" 2> /dev/null; do
    code=0
    wait "$job" || code=$?
done
exit "$code"

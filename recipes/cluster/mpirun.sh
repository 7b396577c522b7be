#!/usr/bin/env bash
# mpirun.sh RANKS [HOSTFILE] [key=value...]: trains on so many ranks, here or on the machines of a file ("host slots=N" a line).
set -euo pipefail
ranks=${1:?how many ranks}
shift
where=()
if [ $# -gt 0 ] && [[ $1 != *=* ]]; then
    where=(--hostfile "$1")
    shift
fi
# So many seconds mpirun waits after SIGTERM before it passes it on, and again before it kills; its own second is too short to save.
case "$(mpirun --version | head -1)" in
    *") "[1-4].*) grace=(--mca odls_base_sigkill_timeout 30) ;;
    *) grace=(--prtemca odls_base_sigkill_timeout 30) ;;
esac
cores=$(($(nproc) / ranks))
exec mpirun -n "$ranks" "${where[@]}" "${grace[@]}" --bind-to none -x RAYON_NUM_THREADS=$((cores > 0 ? cores : 1)) \
    polyhead train recipes/cluster/run.toml --out checkpoints/cluster "$@"

#!/bin/sh
# rank.sh COMMAND...: a rank that Open MPI has started, with its share of the machine's cores as threads: all of them, or the CPU limit of
# the container (control groups of version 2), divided by the ranks that run on this machine. RAYON_NUM_THREADS, where it is set, stays.
cores=$(nproc)
limits=/sys/fs/cgroup/cpu.max
if [ -r "$limits" ] && read -r quota period < "$limits" && [ "$quota" != max ] && [ $((quota / period)) -lt "$cores" ]; then
    cores=$((quota / period))
fi
share=$((cores / ${OMPI_COMM_WORLD_LOCAL_SIZE:-1}))
export RAYON_NUM_THREADS="${RAYON_NUM_THREADS:-$((share > 0 ? share : 1))}"
exec "$@"

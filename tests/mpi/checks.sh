# shellcheck shell=bash disable=SC2154
# What the scripts of this folder share; read with `.` in a folder of their own, where what a command said is in `told`, and its process in `job`.

export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
failed=0

check() { # WHAT, and a command that must succeed
    local what=$1
    shift
    if "$@"; then printf 'ok      %s\n' "$what"; else
        failed=$((failed + 1))
        printf 'FAILED  %s\n' "$what"
        [ -e told ] && tail -n 12 told | sed 's/^/        /'
    fi
}

# The bits of a run: weights, state of the optimizer, and what was logged but for times and memory.
bits() {
    cat "$1"/step-00000006/{model,optimizer}.safetensors
    sed -E 's/"(tokens_per_second|memory|memory\/rank_[0-9]+|throughput\/communication_share)":[^,}]*,?//g; s/,}/}/' "$1/metrics.jsonl"
}
same() { cmp -s <(bits "$1") <(bits "$2"); }

steps_begin() { # FOLDER of a run that was started; waits for its first steps
    for _ in $(seq 300); do
        [ "$(cat "$1/metrics.jsonl" 2> /dev/null | wc -l)" -ge 3 ] && return 0
        sleep 0.1
    done
    return 1
}

ends() { # the code that the process `job` ends with, within 10 s
    local since=$SECONDS
    while kill -0 "$job" 2> /dev/null; do
        [ $((SECONDS - since)) -gt 10 ] && kill -KILL "$job" && return 99
        sleep 0.1
    done
    wait "$job"
}

conclude() {
    echo
    [ "$failed" -eq 0 ] && echo "all passed" || echo "$failed failed"
    [ "$failed" -eq 0 ]
}

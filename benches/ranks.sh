#!/usr/bin/env bash
# Two ranks of one thread beside one process of two threads, alternately: tokens a second, the share of communication, peak memory of each rank.
#
#   benches/ranks.sh [BINARY] [ROUNDS] [STEPS]      BINARY: built with --features mpi; without it, a release build in target/mpi
#
# The small work of side_by_side: a vocabulary of 4096, d_model 256, 6 layers, 8 heads, 8 rows of 256 tokens a step. A table of medians goes
# to standard output. Wants two idle cores.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
binary=${1:-} rounds=${2:-5} steps=${3:-30}
if [ -z "$binary" ]; then
    binary=$root/target/mpi/release/polyhead
    CARGO_TARGET_DIR=$root/target/mpi cargo build --release --manifest-path "$root/Cargo.toml" -p polyhead --features mpi
fi
binary=$(realpath "$binary")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

cat > recipe.toml <<END
[model.decoder]
d_model = 256
n_layers = 6
tie_embeddings = false
[model.decoder.attention.softmax]
n_heads = 8
[data.induction]
vocab = 4096
[training]
steps = $steps
seq_len = 256
batch_size = 8
[metrics]
log_freq = 1
tensorboard = false
observe = false
[validation]
interval = 0
batches = 1
[checkpoint]
interval = 0
[parallel]
mode = "data"
END

# NAME, RANKS, THREADS of each, rows of a pass, settings
ways=(
    "one process, 2 threads|1|2|8|"
    "2 ranks, 1 thread each|2|1|4|"
    "2 ranks, no overlap|2|1|4|parallel.overlap=false"
    "2 ranks, zero1|2|1|4|parallel.optimizer_sharding=zero1"
    "2 ranks, 2 passes each|2|1|2|"
    "2 ranks, 2 passes each, no overlap|2|1|2|parallel.overlap=false"
    "2 ranks, 2 passes each, fast|2|1|2|parallel.gradient_reduction=fast"
)
# What a log says last of a number.
last() { # KEY, LOG
    grep -o "\"$1\":[0-9.e+-]*" "$2" | tail -n 1 | cut -d: -f2
}
# The median of a number in the lines of a log after the first, which has the warm-up.
median() { # KEY, LOG
    tail -n +2 "$2" | grep -o "\"$1\":[0-9.e+-]*" | cut -d: -f2 | sort -g \
        | awk '{ all[NR] = $1 } END { if (NR) print (all[int((NR + 1) / 2)] + all[int((NR + 2) / 2)]) / 2; else print 0 }'
}
for round in $(seq "$rounds"); do
    for at in "${!ways[@]}"; do
        IFS='|' read -r name ranks threads rows settings <<< "${ways[$at]}"
        mpirun --oversubscribe --bind-to none -n "$ranks" -x RAYON_NUM_THREADS="$threads" \
            "$binary" train recipe.toml --out run training.batch_size="$rows" training.gradient_accumulation_steps=$((8 / rows)) $settings \
            > told 2>&1 || { cat told >&2; exit 1; }
        log=run/metrics.jsonl
        # One process writes its memory under another name.
        peaks=("$(last memory $log)")
        [ "$ranks" -eq 1 ] || for rank in $(seq 0 $((ranks - 1))); do peaks[rank]=$(last "memory/rank_$rank" $log); done
        echo "$(median tokens_per_second $log) $(median throughput/communication_share $log) ${peaks[*]}" >> "way-$at"
        rm -rf run
    done
    echo "round $round of $rounds" >&2
done

of() { cut -d' ' -f"$2" "way-$1" | sort -g | awk '{ all[NR] = $1 } END { print (all[int((NR + 1) / 2)] + all[int((NR + 2) / 2)]) / 2 }'; }
echo "| way | tokens/s | against one process | communication | peak MiB of each rank |"
echo "|---|---|---|---|---|"
for at in "${!ways[@]}"; do
    IFS='|' read -r name ranks _ <<< "${ways[$at]}"
    memory=""
    for rank in $(seq "$ranks"); do memory+=" $(of "$at" $((rank + 2)) | awk '{ printf "%.0f", $1 / 1048576 }')"; done
    awk -v name="$name" -v speed="$(of "$at" 1)" -v base="$(of 0 1)" -v share="$(of "$at" 2)" -v memory="$memory" \
        'BEGIN { printf "| %s | %.0f | %.2fx | %.1f %% |%s |\n", name, speed, speed / base, 100 * share, memory }'
done

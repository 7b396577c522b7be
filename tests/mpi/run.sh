#!/usr/bin/env bash
# Several ranks with Open MPI on this machine: the same bits on 1, 2 and 4 of them, a change of their number, signals, kills, panics, a rank without memory;
# and comparisons whose runs mpirun starts.
#
#   tests/mpi/run.sh [BINARY]       BINARY: built with --features mpi; without it, it is built in target/mpi
#
# tests/mpi/hosts.sh does the same for two machines.
#
# Open MPI and libclang are installed where apt-get can. Takes two minutes besides the build.
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
as_root=""
[ "$(id -u)" -eq 0 ] || as_root="sudo"
if ! command -v mpirun > /dev/null || ! command -v mpicc > /dev/null; then
    $as_root apt-get update -q > /dev/null \
        && $as_root apt-get install -y -q --no-install-recommends libopenmpi-dev openmpi-bin libclang-dev clang > /dev/null \
        || { echo "no Open MPI, and apt-get installs none: install libopenmpi-dev, openmpi-bin and libclang-dev" >&2; exit 1; }
fi
binary=${1:-}
if [ -z "$binary" ]; then
    binary=$root/target/mpi/debug/polyhead
    CARGO_TARGET_DIR=$root/target/mpi cargo build --manifest-path "$root/Cargo.toml" -p polyhead --features mpi || exit 1
fi
binary=$(realpath "$binary")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1

. "$root/tests/mpi/checks.sh"
export RAYON_NUM_THREADS=1
ranks() { mpirun --oversubscribe --bind-to none -n "$@"; }

cat > recipe.toml <<'END'
[model.decoder]
d_model = 16
n_layers = 2
[model.decoder.attention.mixture_of_head]
n_heads = 4
shared_heads = 1
top_k = 2
[data.markov]
states = 6
[training]
steps = 6
seq_len = 16
batch_size = 4
gradient_accumulation_steps = 4
dropout = 0.1
penalty_weight = 0.1
[lr_scheduler]
decay = "constant"
[parallel]
mode = "data"
[metrics]
log_freq = 1
[validation]
interval = 2
batches = 6
[checkpoint]
interval = 3
END

train() { # RANKS, FOLDER, settings
    local n=$1 out=$2
    shift 2
    ranks "$n" "$binary" train recipe.toml --out "$out" "$@" > told 2>&1
}

# 4 passes of 1 process, 2 of each of 2, 1 of each of 4. Muon's matrices have one owner each.
for optimizer in adamw muon; do
    settings=("optimizer.$optimizer.lr=0.01")
    "$binary" train recipe.toml --out "$optimizer-alone" "${settings[@]}" > told 2>&1
    check "$optimizer: one process without a launcher" test -e "$optimizer-alone/step-00000006"
    for n in 1 2 4; do
        train "$n" "$optimizer-$n" "${settings[@]}"
        check "$optimizer, gradients in the backward pass: $n ranks have the bits of one process" same "$optimizer-alone" "$optimizer-$n"
        train "$n" "$optimizer-zero1-$n" "${settings[@]}" parallel.optimizer_sharding=zero1 parallel.overlap=false
        check "$optimizer, zero1, gradients after it: $n ranks have the bits of one process" same "$optimizer-alone" "$optimizer-zero1-$n"
    done
done

# FocuSFT, whose passes have several backwards each and fast weights that count when clipping; SenD, which drops units from the third step on.
# shellcheck disable=SC2034 # both are read by name
bilevel="rank=2, alpha=4.0, inner_lr=0.3, layer_fraction=0.5, clip_includes_fast=true, second_order=true"
# shellcheck disable=SC2034
neuron_dropout="interval=1, window=2, refresh=2, k=0.25, tracking_texts=4"
for procedure in bilevel neuron_dropout; do
    settings=("procedure.$procedure={${!procedure}}")
    "$binary" train recipe.toml --out "$procedure-alone" "${settings[@]}" parallel.mode=data > told 2>&1
    check "$procedure: one process without a launcher" test -e "$procedure-alone/step-00000006"
    train 2 "$procedure-2" "${settings[@]}" parallel.optimizer_sharding=zero1
    check "$procedure, zero1: 2 ranks have the bits of one process" same "$procedure-alone" "$procedure-2"
    train 4 "$procedure-4" "${settings[@]}"
    check "$procedure: 4 ranks have the bits of one process" same "$procedure-alone" "$procedure-4"
done

train 2 fast optimizer.adamw.lr=0.01 parallel.gradient_reduction=fast
check "fast: 2 ranks come to the end" test -e fast/step-00000006
check "the share of communication is logged" grep -q '"throughput/communication_share":0\.' fast/metrics.jsonl
check "the memory of every rank is logged" grep -q '"memory/rank_0":[0-9].*"memory/rank_1":[0-9]' fast/metrics.jsonl
check "rank 0 alone speaks" test "$(grep -c '^resume\|^model:' told)" -eq 1

# On another number of ranks, with another [parallel].
train 4 parts optimizer.adamw.lr=0.01 training.steps=3 parallel.optimizer_sharding=zero1
train 2 parts optimizer.adamw.lr=0.01 training.steps=5
train 1 parts optimizer.adamw.lr=0.01 parallel.optimizer_sharding=zero1
bits_of_weights() { cat "$1"/step-00000006/{model,optimizer}.safetensors; }
check "4 ranks, then 2, then 1: the bits of one process" cmp -s <(bits_of_weights parts) <(bits_of_weights adamw-alone)

# What is wrong is refused before anything runs.
refused() { # WORDS, RANKS, settings
    local words=$1 n=$2
    shift 2
    train "$n" refused "$@"
    [ $? -eq 2 ] && grep -q -- "$words" told && ! ls refused/step-* > /dev/null 2>&1
}
check "several ranks without parallel.mode" refused 'set parallel.mode = "data"' 2 parallel.mode=none
check "more ranks than passes" refused "must be at least the number of ranks (4)" 4 training.gradient_accumulation_steps=2

# Long runs, which do not end by themselves.
long=(training.steps=1000000 checkpoint.interval=0 validation.interval=0)
begin() { # FOLDER: two ranks in the background; waits for their first steps
    out=$1
    mpirun --oversubscribe --bind-to none -n 2 "$binary" train recipe.toml --out "$out" "${long[@]}" > told 2>&1 &
    job=$!
    steps_begin "$out"
}
pid_of_rank() { # the process of a rank of this run
    local pid
    for pid in $(pgrep -f "$binary train recipe.toml --out $out"); do
        tr '\0' '\n' < "/proc/$pid/environ" 2> /dev/null | grep -qx "OMPI_COMM_WORLD_RANK=$1" && echo "$pid" && return
    done
}
for rank in 0 1; do
    begin "term-$rank"
    kill -TERM "$(pid_of_rank "$rank")"
    ends
    check "SIGTERM to rank $rank: all leave with 143" test $? -eq 143
    check "SIGTERM to rank $rank: saved" ls "term-$rank"/step-*/manifest.json
    begin "kill-$rank"
    kill -KILL "$(pid_of_rank "$rank")"
    ends
    code=$?
    check "SIGKILL of rank $rank, as by the kernel without memory: ended ($code)" test $code -ne 0 -a $code -ne 99
    check "SIGKILL of rank $rank: rank and host are named" grep -q "rank $rank .*on node $(hostname) exited on signal 9" told
done
begin usr2
kill -USR2 "$job"
ends
check "SIGUSR2 to mpirun: all leave with 140" test $? -eq 140
check "SIGUSR2 to mpirun: saved" ls usr2/step-*/manifest.json
check "what was killed goes on" eval "ranks 2 '$binary' train recipe.toml --out kill-1 training.steps=6 > told 2>&1"

# What one of two ranks meets, whose work is larger.
large=("${long[@]}" training.batch_size=64 training.seq_len=128 model.decoder.d_model=128)
limited() { # FOLDER, LIMITS: rank 1 alone runs within limits of the shell
    mpirun --oversubscribe --bind-to none \
        -n 1 "$binary" train recipe.toml --out "$1" "${large[@]}" : \
        -n 1 sh -c "$2; exec '$binary' train recipe.toml --out $1 ${large[*]}" > told 2>&1 &
    job=$!
}
ends_once_said() { # WORDS: the code that the job ends with, within 10 s after them
    for _ in $(seq 600); do
        grep -q "$1" told || ! kill -0 "$job" 2> /dev/null && break
        sleep 0.1
    done
    ends
}
# The system gives it no threads.
limited panic "ulimit -v 3000000; export RAYON_NUM_THREADS=20000"
ends_once_said "panicked at"
check "a panic of rank 1 ends all within 10 s, with 101" test $? -eq 101
check "a panic names rank and host" grep -q "rank 1 on $(hostname) panicked" told
# The system gives it no memory.
large+=(training.batch_size=256 --ignore-memory)
limited memory "ulimit -v 700000"
ends_once_said "memory allocation of .* failed"
code=$?
check "rank 1 without memory: ends all within 10 s ($code)" test $code -ne 0 -a $code -ne 99
check "rank 1 without memory: said" grep -q "memory allocation of .* bytes failed" told
check "rank 1 without memory: rank and host are named" grep -q "rank 1 .*on node $(hostname) exited on signal 6" told

# A rank that alone cannot go on says why and ends the others.
mpirun --oversubscribe --bind-to none -n 1 "$binary" train recipe.toml --out alone "${long[@]}" : \
    -n 1 "$binary" train recipe.toml --out alone "${long[@]}" training.device=cuda > told 2>&1 &
job=$!
ends
check "a rank that fails alone ends all with its code" test $? -eq 1
check "a rank that fails alone is named" grep -q "rank 1 on $(hostname): error: device cuda" told

# Comparisons: every arm and seed is a job of its own.
cat > arms.toml << 'END'
extends = "recipe.toml"
seeds = [1, 2]
[recipe]
parallel.mode = "none"
[[arm]]
name = "a"
[[arm]]
name = "b"
recipe.training.penalty_weight = 0.2
END
check "a comparison in processes of this machine" eval "'$binary' compare arms.toml --out here --launcher env > told 2>&1"
check "a comparison with --launcher mpirun" eval "'$binary' compare arms.toml --out jobs --jobs 2 --launcher mpirun > told 2>&1"
check "its runs have the same bits" test \
    "$(cat here/runs/*/step-00000006/model.safetensors | sha256sum)" = "$(cat jobs/runs/*/step-00000006/model.safetensors | sha256sum)"
sed 's/^\[recipe\]$/&\ntraining.steps = 1000000\ncheckpoint.interval = 0\nvalidation.interval = 0/' arms.toml > long.toml
OMPI_MCA_odls_base_sigkill_timeout=2 "$binary" compare long.toml --out long --jobs 2 --launcher mpirun > told 2>&1 &
job=$!
for _ in $(seq 300); do
    [ "$(cat long/runs/*/metrics.jsonl 2> /dev/null | wc -l)" -ge 6 ] && break
    sleep 0.1
done
kill -TERM "$job"
ends
check "SIGTERM to a comparison: ends with 143" test $? -eq 143
check "SIGTERM to a comparison: the runs that mpirun started have saved" test "$(ls long/runs/*/step-*/manifest.json | cut -d/ -f3 | sort -u | wc -l)" -eq 2
conclude

#!/usr/bin/env bash
# The CUDA kernels of crates/kernels/src/cuda without a GPU: they run on the processor (emulate.h) against the definition in f64, faults that are put into
# them have to be found, and NVRTC compiles them for cards of two generations.
#
#   tests/cuda/check.sh             all of it, in about two minutes
#   tests/cuda/check.sh emulated    without NVRTC, which wants Python with venv and fetches NVIDIA's packages
set -euo pipefail
cd "$(dirname "$0")"
kernels=../../crates/kernels/src/cuda
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# build SOURCES OUT WIDTH VALUE_WIDTH ELEMENT SIXTEENS
build() {
    "${CXX:-g++}" -std=c++20 -O2 -U_FORTIFY_SOURCE -Wall -Wextra -Werror -Wno-unknown-pragmas -I. -I"$1" \
        -DWIDTH="$3" -DVALUE_WIDTH="$4" -DELEMENT="\"$5\"" -DSIXTEENS="$6" attention.cpp -o "$2"
}

for form in "64 64 bf16 2" "64 64 f16 1" "128 128 bf16 1" "64 128 f16 1" "96 80 f16 1" "16 16 f16 2"; do
    # shellcheck disable=SC2086 # four words
    build "$kernels" "$work/attention" $form
    "$work/attention"
done

# FILE|what is there|what is put there: each has to be found.
faults=(
    'tiles.cuh|lane / 16 \* 8) \* PLACE<COLUMNS> + lane / 8 % 2 \* 8|lane / 8 % 2 * 8) * PLACE<COLUMNS> + lane / 16 * 8'
    'tiles.cuh|near\[0\], near\[1\]|near[1], near[0]'
    'tiles.cuh|rounded(far\[0\], far\[1\])|rounded(far[2], far[3])'
    'tiles.cuh|const bool there = row < rows.count|const bool there = true'
    'tiles.cuh|if (row + 8 < rows.count)|if (row < rows.count)'
    'tiles.cuh|to = max(to, own\[1\])|to = own[1] - 1'
    'tiles.cuh|query < queries ? ranges\[2 \* query + 1\]|query < queries ? 1 + ranges[2 * query + 1]'
    'tiles.cuh|if (key < seen_from|if (key + 1 < seen_from'
    'tiles.cuh|first + COUNT <= seen_to|first + COUNT - 1 <= seen_to'
    'tiles.cuh|if (seen_from <= first|if (seen_from - 1 <= first'
    'attend.cu|sums\[m\]\[n\]\[j\] \*= factor|sums[m][n][j] *= 1.0f'
    'attend.cu|__shfl_xor_sync(~0u, x, 2));|x);'
    'attend.cu|sinks\[head\] \* LOG2_E|sinks[head]'
    'attend.cu|buffer ^ 1);|buffer);'
    'attend.cu|^        wait_for_copies();|        ;'
    'attend.cu|^        __syncthreads();|        ;'
    'back_to_queries.cu|^        __syncthreads();|        ;'
    'back_to_queries.cu| - mean\[half\]| + mean[half]'
    'back_to_queries.cu|^    __syncthreads();|    ;'
    'back_to_keys.cu|^        __syncthreads();|        ;'
    'back_to_keys.cu|span\[1\] > first_key|span[1] > first_key + KEYS'
    'back_to_keys.cu|query + kind - 2|query + kind - 1'
    'back_to_keys.cu|key >= seen_to|key > seen_to'
    'back_to_keys.cu|first_own + 16 <= seen_to|first_own + 15 <= seen_to'
)
for fault in "${faults[@]}"; do
    IFS='|' read -r file there put <<< "$fault"
    rm -rf "$work/faulty"
    cp -r "$kernels" "$work/faulty"
    sed -i "s|$there|$put|" "$work/faulty/$file"
    if cmp -s "$kernels/$file" "$work/faulty/$file"; then
        echo "the fault '$there' is in no line of $file" >&2
        exit 1
    fi
    build "$work/faulty" "$work/attention" 64 64 f16 2
    if "$work/attention" > "$work/said" 2>&1; then
        echo "nobody finds '$put' in place of '$there' in $file" >&2
        exit 1
    fi
    echo "found: '$put' in place of '$there' in $file"
done
[ "${1:-}" = emulated ] && exit

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    nvidia-cuda-nvrtc==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 nvidia-cuda-crt==13.0.88
"$work/venv/bin/python" compile.py "$kernels"

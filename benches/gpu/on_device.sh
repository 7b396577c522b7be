#!/usr/bin/env bash
# Runs what benches/gpu/stage.sh built, on a machine with a GPU and without Rust. Three slices of less than ten minutes, the most
# important first; every step has a time limit of its own and writes what it finds into $OUT as it goes, so that nothing is lost when
# one fails or hangs.
#
#   on_device.sh 1    the device; every kernel against the CPU; attention by both its kernels; 12 steps of every mechanism against the CPU
#   on_device.sh 2    linear maps through Burn and cuBLASLt; products; products and attention in PyTorch; decoders of 350 million parameters beside PyTorch
#   on_device.sh 3    steps of every mechanism; a profile; memory by length; the 12 steps in bf16
set -uo pipefail
slice=${1:-}
case "$slice" in 1 | 2 | 3) ;; *) echo "on_device.sh 1, 2 or 3" >&2; exit 2 ;; esac
here=$(cd "$(dirname "$0")" && pwd)
device=${DEVICE:-cuda}
python=${PYTHON:-python3}
out=$(mkdir -p "${OUT:-results}" && cd "${OUT:-results}" && pwd)
work=${TMPDIR:-/tmp}/polyhead-gpu

# Unpacked once; by Python where there is no xz.
if [ ! -x "$work/measure" ] || [ "$here/polyhead-gpu.tar.xz" -nt "$work/BUILT.seen" ]; then
    rm -rf "$work"
    "$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' \
        "$here/polyhead-gpu.tar.xz" "$(dirname "$work")" || exit 1
    touch "$work/BUILT.seen"
fi
cd "$work" || exit 1
export POLYHEAD="$work/polyhead" POLYHEAD_BENCHES="$work/benches" PYTHONUNBUFFERED=1

# NVRTC, cuBLASLt and CUDA's headers: of the toolkit, else of PyTorch's packages.
[ -n "${CUDA_PATH:-}" ] || for folder in /usr/local/cuda /opt/cuda; do [ -d "$folder/include" ] && export CUDA_PATH=$folder; done
packages=$("$python" -c 'import nvidia, os; print(list(nvidia.__path__)[0])' 2> /dev/null || true)
if [ -z "${CUDA_PATH:-}" ] && [ -n "$packages" ]; then
    for folder in "$packages"/cu13 "$packages"/cuda_runtime; do [ -d "$folder/include" ] && export CUDA_PATH=$folder; done
fi
libraries=$(find ${CUDA_PATH:+"$CUDA_PATH/"} ${packages:+"$packages/"} \( -name 'libnvrtc.so*' -o -name 'libcublasLt.so*' \) -printf '%h\n' 2> /dev/null | sort -u | tr '\n' ':')
export LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:-}"

failed=()
# step NAME SECONDS COMMAND...: everything that it says goes to $OUT/SLICE-NAME.txt
step() {
    local name=$1 limit=$2 file="$out/$slice-$1.txt" start=$SECONDS
    shift 2
    printf '== %s (at most %s s)\n' "$name" "$limit"
    timeout --kill-after=5 "$limit" "$@" > "$file" 2>&1
    local code=$?
    printf '   exit %s after %s s\n' "$code" "$((SECONDS - start))" | tee -a "$file"
    tail -n 25 "$file"
    [ "$code" -eq 0 ] || failed+=("$name")
    return "$code"
}

facts() {
    date -u '+%Y-%m-%d %H:%M UTC'
    cat BUILT
    nvidia-smi || echo "no nvidia-smi"
    echo "CUDA_PATH ${CUDA_PATH:-none}; libnvrtc and libcublasLt in ${libraries:-none}; $(nproc) cores"
    "$python" -c 'import torch; print("PyTorch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())'
    ./polyhead doctor
    ./measure facts --device "$device"
}
export -f facts
export python libraries device

# Whoever has no GPU learns it in the first step, and nothing else is tried.
if ! step facts 45 bash -c facts; then
    echo "the device cannot be used; nothing else was tried"
    exit 1
fi
case "$slice" in
1)
    step kernels 170 env CUBECL_AUTOTUNE_LEVEL=minimal ./kernels "backends::${device%%:*}" --nocapture --test-threads=1
    step attention 110 ./measure attention --device "$device"
    step losses 240 env CUBECL_AUTOTUNE_LEVEL=minimal ./it "backends::${device%%:*}_and_flex_train_alike" --exact --nocapture --test-threads=1
    ;;
2)
    step linear-maps 90 ./measure linear-maps --device "$device"
    step products 80 ./measure products --device "$device"
    step pytorch 45 "$python" benches/attention.py
    # Three processes each; a row is written as soon as its process ends, torch.compile last.
    step decoder 190 ./side_by_side --device cuda --python "$python" --only 350M --rounds 1 --steps 16 --peak-tflops 989
    step decoder-gda 140 ./side_by_side --device cuda --python "$python" --only "350M, GDA 3:1" --rounds 1 --steps 16 --peak-tflops 989
    ;;
3)
    step mechanisms 270 ./measure mechanisms --device "$device" --polyhead ./polyhead
    step profile 60 ./measure profile --device "$device" --polyhead ./polyhead
    step memory 70 ./measure memory --device "$device"
    step losses-bf16 120 env CUBECL_AUTOTUNE_LEVEL=minimal ./it "backends::${device%%:*}_and_flex_train_alike_in_bf16" --exact --nocapture --test-threads=1
    ;;
esac
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }

#!/usr/bin/env bash
# Builds what a machine with an NVIDIA GPU, a driver, NVRTC and PyTorch, but without Rust and network, needs for benches/gpu/on_device.sh,
# and packs it into benches/gpu/staged, which git ignores and which stays below 60 MB.
#
#   benches/gpu/stage.sh              a release build: a quarter of an hour on two cores
#   PROFILE=dev benches/gpu/stage.sh  to try the scripts
#   FEATURES=wgpu ...                 another backend, likewise
set -euo pipefail
cd "$(dirname "$0")/../.."
profile=${PROFILE:-release} features=${FEATURES:-cuda-nvrtc}
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/target-$features}"
# The oldest CUDA that the programs are to run with: without it the bindings are those of the newest one known.
export CUDARC_CUDA_VERSION="${CUDARC_CUDA_VERSION:-13000}"
staged=benches/gpu/staged
limit=$((60 * 1000 * 1000))

# The stand-in for Burn's LLVM replaces a package in the lock file; the project's own stays as it is.
lock=$(mktemp)
cp Cargo.lock "$lock"
trap 'cp "$lock" Cargo.lock; rm -f "$lock"' EXIT
options=(--profile "$profile" --package polyhead --package polyhead-kernels --features "polyhead/$features")
[ "$features" = cuda-nvrtc ] && options+=(--config 'patch.crates-io.cubecl-llvm.path="benches/gpu/cubecl-llvm"')
# One build of all, so that what they share is compiled once; the program comes with the tests that run it. Messages name the executables.
messages=$(cargo test --no-run "${options[@]}" --lib --test it --bench gpu --bench side_by_side \
    --message-format=json-render-diagnostics)
# The executable of a target: name, kind, and whether it is a test harness (yes, no, or any).
executable() {
    python3 -c '
import json, sys
name, kind, harness = sys.argv[1:]
wanted = {"yes": [True], "no": [False], "any": [True, False]}[harness]
for line in sys.stdin:
    made = json.loads(line)
    target = made.get("target", {})
    if made.get("executable") and target["name"] == name and kind in target["kind"] and made["profile"]["test"] in wanted:
        print(made["executable"])
' "$@" <<< "$messages" | tail -n 1
}

work=$(mktemp -d)
mkdir -p "$work/polyhead-gpu/benches"
take() {
    [ -n "$2" ] && [ -f "$2" ] || { echo "cargo built no $1" >&2; exit 1; }
    strip --strip-all -o "$work/polyhead-gpu/$1" "$2"
}
take polyhead "$(executable polyhead bin no)"
take kernels "$(executable polyhead_kernels lib yes)"
take it "$(executable it test yes)"
take measure "$(executable gpu bench any)"
take side_by_side "$(executable side_by_side bench any)"
cp benches/pytorch.py benches/gpu/attention.py "$work/polyhead-gpu/benches/"
{
    echo "commit $(git rev-parse HEAD)$(git diff --quiet HEAD || echo ' and changes')"
    echo "profile $profile, features $features, $(rustc --version), bindings of CUDA $CUDARC_CUDA_VERSION"
    (cd "$work/polyhead-gpu" && sha256sum polyhead kernels it measure side_by_side)
} > "$work/polyhead-gpu/BUILT"

rm -rf "$staged"
mkdir -p "$staged"
tar -C "$work" -cf - polyhead-gpu | xz -9 > "$staged/polyhead-gpu.tar.xz"
cp benches/gpu/on_device.sh "$staged/"
rm -rf "$work"
size=$(du -sb "$staged" | cut -f1)
echo "$staged: $((size / 1000000)) MB"
[ "$size" -le "$limit" ] || { echo "$staged is larger than $((limit / 1000000)) MB" >&2; exit 1; }
cat <<END

On the machine with the GPU, in a copy of this folder, one slice after the other, ten minutes each; what they find goes to \$OUT:

  OUT=\${OUT:-results} bash $staged/on_device.sh 1
  OUT=\${OUT:-results} bash $staged/on_device.sh 2
  OUT=\${OUT:-results} bash $staged/on_device.sh 3
END

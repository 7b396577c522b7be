#!/bin/sh
# Builds for CUDA without network, checks against the CPU, measures. Arguments go to the benchmark.
set -eu
cd "$(dirname "$0")/../.."
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target/cuda}"
# The stand-in replaces a package in the lock file; the project's own stays as it is.
cp Cargo.lock "${TMPDIR:-/tmp}/polyhead-Cargo.lock"
trap 'cp "${TMPDIR:-/tmp}/polyhead-Cargo.lock" Cargo.lock' EXIT
set -- --device cuda --steps 20 "$@"
stand_in='patch.crates-io.cubecl-llvm.path="benches/cuda/cubecl-llvm"'
cargo test --release --package polyhead --features cuda-nvrtc --config "$stand_in" --test it -- backends
cargo test --release --package polyhead-kernels --features cuda --config "$stand_in" --lib -- cuda
cargo bench --features cuda-nvrtc --config "$stand_in" --bench side_by_side -- "$@"

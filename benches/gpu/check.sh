#!/usr/bin/env bash
# Every kernel and 12 steps of training on Burn's WGSL backend against the CPU's numbers, on a GPU if there is one, else on the processor
# through Mesa's software driver, which is installed where apt-get can.
#
#   benches/gpu/check.sh          every kernel, and one mechanism
#   benches/gpu/check.sh all      every mechanism: a software driver compiles for minutes
set -euo pipefail
cd "$(dirname "$0")/../.."
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/target-wgpu}"
found() { compgen -G "/usr/share/vulkan/icd.d/*.json" || compgen -G "/etc/vulkan/icd.d/*.json"; }
if ! found > /dev/null || ! ldconfig -p | grep libvulkan.so.1 > /dev/null; then
    as_root=$([ "$(id -u)" = 0 ] || echo sudo)
    options=() from=()
    # Debian 12 has Mesa 22; what was tried is the newer one of its backports, which are read without being set up for good.
    if grep -qs VERSION_CODENAME=bookworm /etc/os-release; then
        list=$(mktemp --suffix .list)
        trap 'rm -f "$list"' EXIT
        chmod 644 "$list"
        echo "deb http://deb.debian.org/debian bookworm-backports main" > "$list"
        options=(-o "Dir::Etc::sourcelist=$list") from=(-t bookworm-backports)
    fi
    $as_root apt-get "${options[@]}" update \
        && $as_root apt-get "${options[@]}" install -y --no-install-recommends "${from[@]}" mesa-vulkan-drivers libvulkan1 \
        || { echo "no Vulkan driver, and apt-get installs none: install mesa-vulkan-drivers and libvulkan1" >&2; exit 1; }
fi
# The driver wants a folder of its own, and threads are better spent by one process at a time.
export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-/tmp}"
options=(--package polyhead --package polyhead-kernels --features polyhead/wgpu)
cargo test "${options[@]}" --lib -- backends --nocapture --test-threads=1
what=backends::wgpu_and_flex_train_alike
[ "${1:-}" = all ] && what=backends::wgpu_trains_every_mechanism
cargo test "${options[@]}" --test it -- "$what" --exact --nocapture

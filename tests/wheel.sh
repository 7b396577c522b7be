#!/usr/bin/env bash
# The wheel as a person gets it: built, installed into a fresh environment with no Rust on the path, used. A release build: minutes.
#   tests/wheel.sh [WHEEL]        WHEEL: one that is there already, instead of building it (needs maturin)
# With TORCH=1 the weights are read into PyTorch, which is downloaded; without it, by safetensors and NumPy.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
wheel=${1:-}
if [ -z "$wheel" ]; then
    (cd "$root" && maturin build --release --out "$work/dist")
    wheel=$(ls "$work"/dist/*.whl)
fi
wheel=$(realpath "$wheel")
# The package and the licences are in it.
python3 -m zipfile --list "$wheel" > "$work/files"
for file in polyhead/__init__.py polyhead/__main__.py scripts/polyhead licenses/LICENSE-MIT licenses/LICENSE-APACHE; do
    grep -q "$file" "$work/files" || { echo "$wheel has no $file" >&2; exit 1; }
done

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "$wheel" safetensors numpy
[ -z "${TORCH:-}" ] || "$work/venv/bin/pip" install --quiet torch --index-url https://download.pytorch.org/whl/cpu
mkdir "$work/home" && cd "$work/home"
clean() { env -i PATH="$work/venv/bin:/usr/bin:/bin" HOME="$work/home" "$@"; }
if clean sh -c 'command -v cargo' >/dev/null; then echo "there is a Rust on the path" >&2; exit 1; fi

installed=$SECONDS
clean polyhead --version
[ "$(clean python -m polyhead --version)" = "$(clean polyhead --version)" ]
# A project out of nothing, and the quickstart of the clone, which finds no Rust documentation here and takes the project's texts.
clean polyhead new mine
(cd mine && clean polyhead train pretrain.toml training.steps=20 lr_scheduler.warmup_steps=2 --out run)
clean polyhead train "$root/recipes/quickstart.toml" training.steps=4 lr_scheduler.warmup_steps=1 metrics.log_freq=1 validation.batches=1 --out quickstart
[ $((SECONDS - installed)) -lt 60 ] || { echo "the first losses took $((SECONDS - installed)) s after the installation" >&2; exit 1; }
clean python - <<'END'
import json
first = json.loads(open("quickstart/metrics.jsonl").readline())
print("first loss of the quickstart:", first["loss"])
assert first["step"] == 1 and 4.0 < first["loss"] < 7.0, first
import polyhead
from safetensors import safe_open
folder = polyhead.checkpoint("mine/run")
assert folder == polyhead.checkpoint(folder) and folder.name == "step-00000020", folder
with safe_open(folder / "model.safetensors", "numpy") as weights:
    names = set(weights.keys())
assert names and polyhead.binary().endswith("polyhead")
try:
    import torch
except ImportError:
    print(f"{len(names)} tensors; no PyTorch here")
else:
    state = polyhead.load_state_dict("mine/run")
    assert set(state) == names and all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    print(f"{len(state)} tensors in PyTorch")
END
echo "the wheel works: $(basename "$wheel")"

#!/usr/bin/env bash
# Checks exports in transformers: golden numbers of the PyTorch classes, every mechanism, the page "From the hub and back", lm-eval. Not part of `cargo test`.
#   tests/hf/run.sh BINARY PYTHON...       e.g. tests/hf/run.sh target/release/polyhead venv4/bin/python venv5/bin/python
# Each PYTHON has torch, transformers (4.57 or 5) and safetensors; where it has lm-eval too, that runs on an export of each.
set -euo pipefail
binary=$(realpath "${1:?the polyhead binary}"); shift
here=$(cd "$(dirname "$0")" && pwd)
[ $# -gt 0 ] || { echo "give at least one Python that has transformers" >&2; exit 2; }
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error HF_MODULES_CACHE
HF_MODULES_CACHE=$(mktemp -d); trap 'rm -rf "$HF_MODULES_CACHE"' EXIT
for python in "$@"; do
  "$python" -W ignore "$here/check_golden.py"
  "$python" -W ignore "$here/check_export.py" "$binary"
  "$python" -W ignore "$here/check_page.py" "$binary"
  if "$python" -c 'import lm_eval' 2>/dev/null; then "$python" -W ignore "$here/check_lm_eval.py" "$binary" 2>/dev/null; fi
done

#!/usr/bin/env bash
# Trains SmolLM2-135M and its conversions on, each with all weights and with low-rank pairs; 307,200 tokens a run.
#   run.sh MODEL [OUT] [KEY=VALUE ...]
# MODEL is the folder in Hugging Face's format. Interrupted and called again, it goes on where it was. A run that fails does not
# stop the others: it is named at the end, and the exit status is 1. KEY=VALUE changes all recipes: training.steps=2 tries them.
# POLYHEAD names another binary than target/release/polyhead.
set -euo pipefail
cd "$(dirname "$0")/../../.."
model=$(realpath "${1:?the folder of the model}") out=${2:-checkpoints/smollm2}
shift $(($# < 2 ? $# : 2))
polyhead=${POLYHEAD:-target/release/polyhead}
mkdir -p "$out"
failed=()

# NAME RECIPE KEY=VALUE...
run() {
    local name=$1 recipe=recipes/convert/smollm2/$2.toml
    shift 2
    echo "== $name"
    "$polyhead" train "$recipe" model.pretrained="$model" "$@" --out "$out/$name" 2>&1 | tee -a "$out/$name.log" && return
    # 130 and 143: interrupted, and saved. Then it is not for the next run to begin.
    local code=${PIPESTATUS[0]}
    [[ $code == 130 || $code == 143 ]] && exit "$code"
    failed+=("$name")
}

# All weights, then low-rank pairs. Fusion moves operators and weights together, so that low-rank pairs do not go with it.
for recipe in parent grouped_query_mean grouped_query_norm decoupled_head mixture_of_head; do
    run "$recipe" "$recipe" "$@"
    run "$recipe-lora" "$recipe" 'lora={rank = 16, alpha = 32.0}' optimizer.adamw.lr=1e-3 "$@"
done
run decoupled_head_fused_67 decoupled_head_fused_67 "$@"
run decoupled_head_fused_33 decoupled_head_fused_33 "$@"

echo "== validation loss, last of each run"
for log in "$out"/*.log; do
    printf '%-28s %s\n' "$(basename "$log" .log)" "$(grep -o 'validation loss: [0-9.]*' "$log" | tail -1)"
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "== failed: ${failed[*]} (their logs say why: $out/NAME.log)" >&2
    exit 1
fi

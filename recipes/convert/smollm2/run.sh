#!/usr/bin/env bash
# Trains SmolLM2-135M and its conversions on, each with all weights and with low-rank pairs; 307,200 tokens a run.
#   run.sh MODEL [OUT] [KEY=VALUE ...]
# MODEL is the folder in Hugging Face's format. Interrupted and called again, it goes on where it was. KEY=VALUE changes all
# recipes: training.steps=2 tries them. POLYHEAD names another binary than target/release/polyhead.
set -euo pipefail
cd "$(dirname "$0")/../../.."
model=$(realpath "${1:?the folder of the model}") out=${2:-checkpoints/smollm2}
shift $(($# < 2 ? $# : 2))
polyhead=${POLYHEAD:-target/release/polyhead}
mkdir -p "$out"

# NAME RECIPE KEY=VALUE...
run() {
    local name=$1 recipe=recipes/convert/smollm2/$2.toml
    shift 2
    echo "== $name"
    "$polyhead" train "$recipe" model.pretrained="$model" "$@" --out "$out/$name" 2>&1 | tee -a "$out/$name.log"
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

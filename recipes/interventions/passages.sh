#!/usr/bin/env bash
# What methods do that move a model's attention to a passage of its prompt: sixteen small prompts, whose answer is in the passage.
#
#   recipes/interventions/passages.sh MODEL [FOLDER]     MODEL: a model that reads English; FOLDER: where results are kept
#
# Prints the loss of the answers (nats) without the method, with it, and with the same moved elsewhere, and for how many prompts the
# method is better than each. What is there is not measured again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
model=${1:?a model} out=${2:-checkpoints/passages}
mkdir -p "$out"
printf '%-6s %8s %8s %10s %14s %14s\n' method plain tuned elsewhere 'beats plain' 'beats elsewhere'
for method in vhr var gift; do
    row=0
    while IFS=$'\t' read -r passage question prompt answer; do
        row=$((row + 1)) file="$out/$method-$row"
        [ -s "$file.json" ] && continue
        asked=()
        [ "$method" = gift ] && asked=(--question "$question")
        rm -f "$file.toml" "$file.safetensors"
        polyhead tune "$method" "$model" --prompt "$prompt" --passage "$passage" --answer "$answer" "${asked[@]}" --out "$file.toml" \
            --json --quiet > "$file.part" < /dev/null && mv "$file.part" "$file.json"
    done < "$here/passages.tsv"
    cat "$out/$method"-*.json | awk -v method="$method" '
        /"plain":/ { plain = $2 + 0 } /"tuned":/ { tuned = $2 + 0 }
        /"elsewhere":/ { other = $2 + 0; n++; p += plain; t += tuned; e += other; a += tuned < plain; b += tuned < other }
        END { printf "%-6s %8.3f %8.3f %10.3f %8d of %2d %9d of %2d\n", method, p / n, t / n, e / n, a, n, b, n }'
done

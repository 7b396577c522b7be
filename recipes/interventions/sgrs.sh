#!/usr/bin/env bash
# What SGRS does to answers: the sixteen prompts of passages.tsv, continued by three tokens with a threshold and without.
#
#   recipes/interventions/sgrs.sh MODEL [FOLDER] [SEED...]     MODEL: one that reads English; FOLDER: where texts are kept; seeds: 0
#
# Prints how many answers begin as they should, and how tokens were taken. What is there is not written again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
model=${1:?a model} out=${2:-checkpoints/sgrs} seeds=("${@:3}")
[ ${#seeds[@]} -gt 0 ] || seeds=(0)
mkdir -p "$out"
printf '%-5s %8s %8s %14s %14s\n' alpha right answers 'after refusals' 'most salient'
for alpha in 0 0.6; do
    right=0 answers=0
    for seed in "${seeds[@]}"; do
        row=0
        while IFS=$'\t' read -r _ _ prompt answer; do
            row=$((row + 1)) file="$out/sgrs-$alpha-$seed-$row.out"
            [ -s "$file" ] || { polyhead generate "$model" --prompt "$prompt" --max-new-tokens 3 --sgrs "$alpha" --seed "$seed" \
                > "$file.part" 2> "$file.err" < /dev/null && mv "$file.part" "$file"; }
            read -r first _ <<< "$answer"
            answers=$((answers + 1))
            [[ "$(cat "$file")" == "$prompt $first"* ]] && right=$((right + 1))
        done < "$here/passages.tsv"
    done
    files=()
    for seed in "${seeds[@]}"; do files+=("$out/sgrs-$alpha-$seed-"*.out.err); done
    tail -qn 1 "${files[@]}" | awk -v alpha="$alpha" -v right="$right" -v all="$answers" '
        { after += $9; most += $12 } END { printf "%-5s %8d %8d %14d %14d\n", alpha, right, all, after, most }'
done

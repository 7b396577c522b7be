#!/usr/bin/env bash
# Runs every command that README.md, AGENTS.md and the pages of docs/src show, page by page, in folders of their own.
#
#   docs/check.sh [BINARY] [PAGE...]        BINARY: default target/debug/polyhead
#
# A block that begins with ```sh is run; one that says why not (```sh hours, download, GPU) is only counted. Training is cut short by
# the variable below, so that a page takes seconds: what is checked is that the commands work one after the other.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
binary=$(realpath "${1:-$root/target/debug/polyhead}")
shift || true
pages=("$@")
[ ${#pages[@]} -gt 0 ] || mapfile -t pages < <(cd "$root" && ls README.md AGENTS.md && find docs/src -name '*.md' | sort)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Steps become few and batches small, whatever a page says, and the last step is saved.
short="training.steps=4 training.batch_size=4 lr_scheduler.warmup_steps=1 validation.batches=1 validation.interval=4 metrics.log_freq=2 checkpoint.interval=4"
mkdir "$work/bin"
cat > "$work/bin/polyhead" <<END
#!/usr/bin/env bash
case "\$1" in
train)
    [[ "\$*" == *neuron_dropout* ]] && set -- "\$@" procedure.neuron_dropout.interval=1
    # All questions about a world are asked with each validation.
    [[ "\$*" == *recipes/hallucination/facts* ]] && set -- "\$@" data.facts.n_entities=16
    exec "$binary" "\$@" $short generation.sampling.max_new_tokens=8 ;;
eval | convert) [[ " \$* " == *" --task "* || " \$* " == *" --text-file "* ]] && exec "$binary" "\$@" || exec "$binary" "\$@" --batches 1 ;;
plan) [[ " \$* " == *" --no-probe"* ]] && exec "$binary" "\$@" || exec "$binary" "\$@" --no-probe ;;
*) exec "$binary" "\$@" ;;
esac
END
chmod +x "$work/bin/polyhead"
export PATH="$work/bin:$PATH"

failed=0 run=0 marked=0
for page in "${pages[@]}"; do
    folder="$work/$(echo "$page" | tr '/' '-')"
    mkdir "$folder"
    ln -s "$root/recipes" "$root/datasets" "$root/README.md" "$folder/"
    awk '/^```sh$/ {on = 1; next} /^```/ {on = 0} on' "$root/$page" > "$folder/commands"
    marked=$((marked + $(grep -c '^```sh .' "$root/$page")))
    # What most pages start from is trained once.
    if grep -q checkpoints/quickstart "$folder/commands" && ! grep -q 'train recipes/quickstart.toml *$' "$folder/commands"; then
        (cd "$folder" && polyhead train recipes/quickstart.toml) > "$folder/log" 2>&1
    fi
    while IFS= read -r line; do
        # The two commands of the README are the quickstart and the tests themselves.
        case "$line" in '' | cargo\ *) continue ;; esac
        run=$((run + 1)) began=${EPOCHREALTIME/./}
        (cd "$folder" && eval "$line") > "$folder/log" 2>&1 < /dev/null
        code=$?
        printf '%7d ms  %s: %s\n' $(((${EPOCHREALTIME/./} - began) / 1000)) "$page" "$line" >> "$work/times"
        if [ "$code" -ne 0 ]; then
            failed=$((failed + 1))
            printf '%s: %s\n' "$page" "$line"
            tail -n 5 "$folder/log" | sed 's/^/    /'
        fi
    done < "$folder/commands"
done
echo "The slowest:"
sort -rn "$work/times" | head -n 10
echo "$run commands of ${#pages[@]} pages run, $failed failed; $marked blocks are marked as needing hours, a download or a GPU"
[ "$failed" -eq 0 ]

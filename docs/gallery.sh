#!/usr/bin/env bash
# Makes the pictures of the gallery from real small runs, and checks the pages for people who cannot see them. Minutes.
#
#   docs/gallery.sh BINARY [OUT]        OUT: default docs/src/images/gallery
#
# Needs Chromium. TensorBoard is shown where `tensorboard` is on the path; pages are checked by axe where `npm` is.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
polyhead=$(realpath "${1:?the polyhead binary}")
out=${2:-$root/docs/src/images/gallery}
mkdir -p "$out"
out=$(realpath "$out")
work=${WORK:-$(mktemp -d)} # named, it is kept, and its runs are not trained again
trap '[ -z "${server:-}" ] || kill "$server"; [ -n "${WORK:-}" ] || rm -rf "$work"' EXIT
browse() { chromium --headless --no-sandbox --disable-gpu --no-first-run --hide-scrollbars --user-data-dir="$work/profile" "$@" 2>/dev/null; }
# NAME URL WIDTHxHEIGHT: a picture on light ground and one on dark.
shoot() {
    for scheme in light:1 dark:0; do
        browse --screenshot="$out/$1-${scheme%:*}.png" --window-size="${3/x/,}" --virtual-time-budget=2000 \
            --blink-settings=preferredColorScheme="${scheme#*:}" "$2"
    done
}

mkdir -p "$work" && cd "$work"
[ -d project ] || "$polyhead" new project
cd project
sed -i 's/^steps = .*/steps = 40/; s/^seq_len = .*/seq_len = 64/; s/^warmup_steps = .*/warmup_steps = 4/; s/^interval = .*/interval = 10/; s/^n_layers = .*/n_layers = 2/' pretrain.toml
"$polyhead" train pretrain.toml metrics.log_freq=2 metrics.image_interval=40 --out runs/pretrain
"$polyhead" inspect runs/pretrain --text "Every token asks a question" --layers 1 --out inspect
"$polyhead" compare compare.toml --out comparison

pages="comparison/report.html inspect/inspect.html"
for page in $pages; do
    name=$(basename "$page" .html)
    for size in 400x900 1400x1000; do shoot "$name-${size%x*}" "file://$PWD/$page" "$size"; done
done
cp inspect/maps-layer-01.png "$out/heat-map.png"
if command -v tensorboard >/dev/null; then
    tensorboard --logdir . --port 6099 --host 127.0.0.1 > "$work/tensorboard.log" 2>&1 &
    server=$!
    for _ in $(seq 60); do curl --silent --output /dev/null http://127.0.0.1:6099 && break; sleep 0.5; done
    for scheme in light dark; do
        dark=$([ "$scheme" = dark ] && echo true || echo false)
        browse --screenshot="$out/tensorboard-$scheme.png" --window-size=1400,1000 --virtual-time-budget=15000 \
            "http://127.0.0.1:6099/?darkMode=$dark#timeseries"
    done
fi
if command -v npm >/dev/null; then
    (cd "$work" && npm install --silent --no-save axe-core >/dev/null)
    for page in $pages; do
        # The copy runs axe on itself, and its title becomes what axe found.
        { sed 's|</body>.*||' "$page"; echo "<script>"; cat "$work/node_modules/axe-core/axe.min.js"
          echo "</script><script>axe.run().then(r => document.title = 'axe: ' + (r.violations.map(v => v.id + ' x ' + v.nodes.length).join(', ') || 'nothing'))</script></body></html>"
        } > "$work/axe.html"
        found=$(browse --dump-dom --virtual-time-budget=20000 "file://$work/axe.html" | grep -o '<title>[^<]*</title>' | head -1)
        echo "$page: $found"
        [[ "$found" == *"axe: nothing"* ]] || failed=1
    done
fi
find "$out" -name '*.png' -size +150k -printf '%p is larger than 150 kB\n'
ls -l "$out"
exit "${failed:-0}"

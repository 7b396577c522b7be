#!/bin/sh
# Kills a training, or fails one of its system calls, at every moment of its saves that matters, lets it go on, and compares
# what is there at the end with a run that nothing disturbed: best.json, the checkpoints, their weights.
#
#   sh tests/attack/best_checkpoint.sh target/debug/polyhead [every]     (every: only each n-th injection; default 1)
#
# Needs strace. Prints how many injections there were of each kind and how many left something else; exit code 1 if any did.
set -u
P=$(realpath "${1:?path to the polyhead binary}")
EVERY=${2:-1}
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
cd "$T" || exit 1
export RAYON_NUM_THREADS=1
cat > best.toml <<'RECIPE'
[model.decoder]
d_model = 24
n_layers = 1
[model.decoder.attention.softmax]
n_heads = 2
[tokenizer.bytes]
[data.text]
paths = ["tiny.txt"]
[training]
steps = 90
seq_len = 32
batch_size = 4
[optimizer.adamw]
lr = 1e-2
[lr_scheduler]
decay = "constant"
[validation]
interval = 10
batches = 0
[checkpoint]
interval = 10
keep_latest_k = 1
[metrics]
log_freq = 10
RECIPE
# Little text, so that the best validation comes early and training goes on past it.
i=0
while [ $i -lt 60 ]; do echo "line $i: $((i * 7919 % 1013)) of $((i * 104729 % 997))"; i=$((i + 1)); done > tiny.txt
train() { "$P" train best.toml --out "$1" > /dev/null 2> "$1.err"; }
# What must be equal: the marker, which checkpoints there are, and all weights.
state() { cat "$1/best.json"; (cd "$1" && ls -d step-* && cat step-*/model.safetensors step-*/optimizer.safetensors) | cksum; }
train ref || { echo "the undisturbed run failed: $(cat ref.err)"; exit 1; }
state ref > ref.state
echo "undisturbed: best $(tr -d ' \n' < ref/best.json), checkpoints $(cd ref && echo step-*)"

bad=0
total=0
# inject NAME CALL WHAT: at the 1st, 2nd, ... call of that kind until the run no longer reaches it.
inject() {
    tried=0; failed=0; n=1
    while :; do
        rm -rf run run.err
        strace -f -o trace -e trace="$2" -e inject="$2:$3:when=$n" "$P" train best.toml --out run > /dev/null 2> run.err
        rc=$?
        # Done once the injection no longer falls into the run.
        if ! grep -qE '\(INJECTED\)|killed by SIGKILL' trace; then break; fi
        tried=$((tried + 1))
        case $3 in
            error=*) [ $rc -le 1 ] || { failed=$((failed + 1)); echo "$1 $n: exit code $rc: $(tail -n 2 run.err)"; } ;;
        esac
        grep -q panicked run.err && { failed=$((failed + 1)); echo "$1 $n: panicked"; }
        if train run && state run > run.state && cmp -s ref.state run.state; then :; else
            failed=$((failed + 1))
            echo "$1 $n: went on to something else: $(tr -d ' \n' < run/best.json 2>/dev/null), $(cd run && echo step-*), $(tail -n 1 run.err)"
        fi
        n=$((n + EVERY))
    done
    echo "$1: $tried tried, $((tried - failed)) held"
    total=$((total + tried)); bad=$((bad + failed))
}
inject "kill at rename" rename signal=KILL
inject "kill at fsync" fsync signal=KILL
inject "kill at unlink" unlink,unlinkat,rmdir signal=KILL
inject "EIO at rename" rename error=EIO
inject "ENOSPC at fsync" fsync error=ENOSPC
inject "EACCES at unlink" unlink,unlinkat,rmdir error=EACCES
inject "ENOSPC at fdatasync" fdatasync error=ENOSPC
echo "all: $total tried, $((total - bad)) held"
[ $bad -eq 0 ]

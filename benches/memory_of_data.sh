#!/usr/bin/env bash
# Peak memory of reading 2 GB of text in each form: rows are generated, tokenized byte by byte, and looked at.
#   benches/memory_of_data.sh [BINARY] [FOLDER] [GIGABYTES]
# Needs python3 with pyarrow, GNU time, gzip, and 15 GB in FOLDER. For each form: seconds, peak of the process (RSS), and of it what is
# its own (anonymous), as the rest are pages of mapped files, which the system takes back when it needs them.
set -euo pipefail
binary=$(realpath "${1:-target/release/polyhead}") folder=${2:-$(mktemp -d)} gigabytes=${3:-2}
mkdir -p "$folder"
cd "$folder"
cat > make.py <<'END'
import csv, gzip, json, random, sys
import pyarrow as pa, pyarrow.parquet as pq

random.seed(1)
words = [''.join(random.choices('abcdefghijklmnopqrstuvwxyz', k=random.randint(2, 9))) for _ in range(5000)]
pages = [' '.join(random.choices(words, k=330)) for _ in range(2000)]  # 2 kB each
rows = int(float(sys.argv[1]) * 1e9 / (sum(map(len, pages)) / len(pages)))
text = lambda at: f'{at} {pages[at % 2000]}'
with open('rows.jsonl', 'w') as file, open('rows.csv', 'w', newline='') as table:
    writer = csv.writer(table)
    writer.writerow(['text', 'number'])
    for at in range(rows):
        file.write(json.dumps({'text': text(at), 'number': at}) + '\n')
        writer.writerow([text(at), at])
schema = pa.schema([('text', pa.string()), ('unused', pa.string()), ('number', pa.int64())])
with pq.ParquetWriter('rows.parquet', schema) as writer:
    for start in range(0, rows, 50_000):
        part = range(start, min(start + 50_000, rows))
        writer.write_table(pa.table([[text(at) for at in part], ['x' * 100 for _ in part], list(part)], schema=schema))
END
[ -e rows.parquet ] || python3 make.py "$gigabytes"
[ -e packed.jsonl.gz ] || gzip -1 < rows.jsonl > packed.jsonl.gz
cat > recipe.toml <<'END'
[model.decoder]
d_model = 16
n_layers = 1
[model.decoder.attention.softmax]
n_heads = 2
[data.jsonl]
paths = ["rows.jsonl"]
[training]
steps = 1
seq_len = 64
batch_size = 1
END
printf '%-18s %8s %8s %12s %12s\n' form GB seconds 'peak MiB' 'own MiB'
for form in rows.jsonl rows.csv rows.parquet packed.jsonl.gz; do
    rm -rf datasets
    began=$SECONDS own=0
    /usr/bin/time -f %M -o peak "$binary" preview recipe.toml "data.jsonl.paths=[\"$form\"]" --rows 1 > log 2>&1 &
    while kill -0 $! 2> /dev/null; do
        for process in $(pgrep -P $! || true); do
            now=$(awk '/^RssAnon/ {print $2}' "/proc/$process/status" 2> /dev/null || true)
            own=$((${now:-0} > own ? now : own))
        done
        sleep 0.1
    done
    wait $! || { cat log; exit 1; }
    size=$(stat -c %s "$form")
    printf '%-18s %8s %8s %12s %12s\n' "$form" "$(awk "BEGIN {print $size / 1e9}")" $((SECONDS - began)) $(($(cat peak) / 1024)) $((own / 1024))
done

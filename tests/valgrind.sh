#!/bin/sh
# The kernels' tests under Valgrind's memcheck: no read or write beyond an allocation, and nothing computed from memory
# without values. Needs valgrind (3.19 or newer) and takes some minutes.
#
#   tests/valgrind.sh                # all but those that walk over many large shapes (`tiles_agree`), each half an hour here
#   tests/valgrind.sh tiles_agree    # only tests whose name has this in it
#
# Valgrind does not know AVX-512: it tells programs that the processor has none, and they take AVX2 (ours choose at run
# time, and so does gemm). One thread, because Valgrind runs one at a time anyway. `misuse` is built without the NaN that
# scratch memory is full of in unit tests, so that reading what was not written shows.
set -eu
cd "$(dirname "$0")/.."
export RAYON_NUM_THREADS=1
build() {
    cargo test -p polyhead -p polyhead-kernels "$@" --no-run --message-format=json |
        sed -n 's/.*"name":"\(polyhead_kernels\|polyhead-kernels\|misuse\)".*"executable":"\([^"]*\)".*/\2/p'
}
programs="$(build --lib) $(build --test misuse)"
for program in $programs; do
    echo "== $program" >&2
    valgrind --error-exitcode=9 --errors-for-leak-kinds=none --max-stackframe=4000000 --main-stacksize=16000000 \
        "$program" --test-threads=1 ${1:---skip tiles_agree}
done

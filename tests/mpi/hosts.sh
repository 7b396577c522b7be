#!/usr/bin/env bash
# Two machines on one: "first" and "second", with names and networks of their own (namespaces of Linux, which want root), follow "Two
# machines" of recipes/cluster/README.md.
#
#   tests/mpi/hosts.sh BINARY      BINARY: built with --features mpi
#
# Needs Open MPI, iproute2 and openssh, installed where apt-get can. Takes half a minute.
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
binary=$(realpath "${1:?a polyhead that was built with --features mpi}")
if [ -z "${ON_FIRST:-}" ]; then
    [ "$(id -u)" -eq 0 ] || { echo "wants root: sudo $0 $1" >&2; exit 2; }
    export PATH=$PATH:/usr/sbin
    if ! command -v mpirun ip sshd ssh > /dev/null; then
        apt-get update -q > /dev/null
        apt-get install -y -q --no-install-recommends openmpi-bin iproute2 openssh-server openssh-client > /dev/null || exit 1
    fi
    exec env ON_FIRST=yes unshare --net --uts --mount --pid --fork --mount-proc --kill-child "$0" "$binary"
fi
. "$root/tests/mpi/checks.sh"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1

# This is "first" now, and what it mounts nobody else sees. The machines share all files, as by a network file system.
hostname first
mkdir -p bin ssh /run/sshd
ln -s "$binary" bin/polyhead
ln -s "$root/recipes" .
cp "$root/README.md" text.md
for key in ssh/own ssh/second; do ssh-keygen -q -t ed25519 -N '' -f "$key"; done
printf '127.0.0.1 localhost\n10.77.0.1 first\n10.77.0.2 second\n' > names
printf 'StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\nIdentityFile %s\n' "$work/ssh/own" > ssh/config
mount --bind names /etc/hosts && mount --bind ssh/config /etc/ssh/ssh_config || exit 1

# "second" is a container with a limit of one core.
cat > second.sh << 'END2'
hostname second
mount -t tmpfs none /sys/fs/cgroup && echo 100000 100000 > /sys/fs/cgroup/cpu.max
exec /usr/sbin/sshd -D -f /dev/null -h "$PWD/ssh/second" -o PidFile=none -o StrictModes=no -o "AuthorizedKeysFile=$PWD/ssh/own.pub"
END2
unshare --net --uts --mount sh second.sh &
second=$!
for _ in $(seq 100); do [ "$(nsenter --target "$second" --uts hostname)" = second ] && break; sleep 0.1; done
ip link add name wire type veth peer name wire netns "$second" || exit 1
for end in "ip:10.77.0.1" "nsenter --target $second --net ip:10.77.0.2"; do
    ${end%:*} address add "${end##*:}/24" dev wire
    ${end%:*} link set wire up
    ${end%:*} link set lo up
done
for _ in $(seq 100); do ssh second true 2> /dev/null && break; sleep 0.1; done
export PATH="$work/bin:$PATH"

# What the page says first.
printf 'first slots=2\nsecond slots=2\n' > hosts
check "both machines answer" test "$(mpirun -n 4 --hostfile hosts hostname | sort | tr '\n' ' ')" = "first first second second "

# Threads: the cores of a machine divided by its ranks; a container's limit counts.
threads() { # HOSTFILE's lines, ranks
    printf '%b' "$1" > uneven
    mpirun -n "$2" --hostfile uneven --bind-to none "$root/recipes/cluster/rank.sh" sh -c 'echo $(hostname) $RAYON_NUM_THREADS' | sort | tr '\n' ' '
}
half=$(($(nproc) / 2 > 0 ? $(nproc) / 2 : 1))
check "a machine with one rank has all of its cores, within its limit" test "$(threads 'first slots=1\nsecond slots=1\n' 2)" = "first $(nproc) second 1 "
check "two ranks of a machine have half of its cores each" test "$(threads 'first slots=2\nsecond slots=1\n' 3)" = "first $half first $half second 1 "

settings=(data.text.paths='["text.md"]' training.steps=6 lr_scheduler.warmup_steps=2 validation.batches=1 metrics.log_freq=1 metrics.tensorboard=false
    model.decoder.d_model=32 model.decoder.n_layers=2 training.seq_len=32)
polyhead train recipes/cluster/run.toml --out alone "${settings[@]}" > told 2>&1
check "one process" test -e alone/step-00000006
recipes/cluster/mpirun.sh 4 hosts "${settings[@]}" > told 2>&1
check "the page's command on two machines has the bits of one process" same alone checkpoints/cluster

# Signals and kills, of a rank on the other machine too.
long=(training.steps=1000000 validation.interval=0 checkpoint.interval=0)
of_second() { # the process of a rank there
    local pid
    for pid in $(pgrep -x polyhead); do
        [ "$(nsenter --target "$pid" --uts hostname)" = second ] && echo "$pid" && return
    done
}
begin() {
    rm -rf checkpoints
    recipes/cluster/mpirun.sh 4 hosts "${settings[@]}" "${long[@]}" > told 2>&1 &
    job=$!
    steps_begin checkpoints/cluster
}
begin
kill -TERM "$job"
ends
check "SIGTERM to the script: all leave with 140" test $? -eq 140
check "SIGTERM to the script: saved" ls checkpoints/cluster/step-*/manifest.json
begin
kill -TERM "$(of_second)"
ends
check "SIGTERM to a rank on the second machine: all leave with 143" test $? -eq 143
check "SIGTERM to a rank on the second machine: saved" ls checkpoints/cluster/step-*/manifest.json
begin
kill -KILL "$(of_second)"
ends
code=$?
check "SIGKILL of a rank on the second machine: ended ($code)" test $code -ne 0 -a $code -ne 99
check "SIGKILL of a rank on the second machine: rank and host are named" grep -Eq 'rank [23] .*on node second' told
recipes/cluster/mpirun.sh 4 hosts "${settings[@]}" > told 2>&1
check "the same command goes on" test $? -eq 0
conclude

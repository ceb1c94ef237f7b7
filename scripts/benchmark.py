"""Measures speed and memory as ratios within one run; `--help` says more."""

from hf_bcd.cli import run
from hf_bcd.commands import benchmark


if __name__ == "__main__":
    run(benchmark.main)

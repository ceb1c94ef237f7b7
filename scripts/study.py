"""Runs a grid of recipes, losses and seeds, and reports it. `--help` says more."""

from hf_bcd.cli import run
from hf_bcd.commands import study


if __name__ == "__main__":
    run(study.main)

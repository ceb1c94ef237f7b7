"""Runs a grid of recipes, losses and seeds, and reports it. `--help` says more."""

from hf_bcd.commands import run, study


if __name__ == "__main__":
    run(study.main)

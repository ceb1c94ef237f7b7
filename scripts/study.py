"""Runs a grid of recipes, losses and seeds, and reports it. `--help` says more."""

from hf_bcd.commands import start


if __name__ == "__main__":
    start("study")

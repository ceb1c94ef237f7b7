"""Distils a small segmentation model from a large one; without arguments, the demo. `--help` says more."""

from hf_bcd.cli import run
from hf_bcd.commands import distill


if __name__ == "__main__":
    run(distill.main)

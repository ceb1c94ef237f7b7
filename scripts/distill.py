"""Distils a small segmentation model from a large one; without arguments, the demo. `--help` says more."""

from hf_bcd.commands import start


if __name__ == "__main__":
    start("distill")

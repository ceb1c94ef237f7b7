"""Scores a segmentation model on a labelled data set; `--help` says more."""

from hf_bcd.cli import run
from hf_bcd.commands import evaluate


if __name__ == "__main__":
    run(evaluate.main)

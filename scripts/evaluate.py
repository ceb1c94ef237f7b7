"""Scores a segmentation model on a labelled data set; `--help` says more."""

from hf_bcd.commands import evaluate, run


if __name__ == "__main__":
    run(evaluate.main)

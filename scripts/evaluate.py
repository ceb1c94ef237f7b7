"""Scores a segmentation model on a labelled data set; `--help` says more."""

from hf_bcd.commands import start


if __name__ == "__main__":
    start("evaluate")

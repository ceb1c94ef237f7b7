"""Pushes the finished student of a run's output folder to the Hub; `--help` says more."""

from hf_bcd.commands import start


if __name__ == "__main__":
    start("push")

"""Runs a grid of recipes, losses and seeds, and reports it: tables with intervals, plots, and all students side by side.

    accelerate launch scripts/study.py examples/studies/camvid_components.yaml --data_dir path/to/camvid

Finished runs are skipped and interrupted ones continued, so the same command goes on where it stopped. Under several
processes every run is data-parallel. `--part 2/8` takes every eighth run instead, for processes that share a study.
Other arguments are as for distill.py; they win over the file in every run.
"""

import argparse
import logging
import sys
from pathlib import Path

from ..utils.messages import UserError


def main(argv: list[str] | None = None) -> None:
    """Runs what is left of a study and writes its report; `argv` is the process's own by default."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("study", type=Path, help="YAML file: a recipe with `runs`, `seeds`, `reference` and `split`")
    parser.add_argument("--output_dir", type=Path, help="folder of the study, instead of the file's")
    parser.add_argument("--part", default="1/1", help="i/n: every n-th run, from the i-th on")
    parser.add_argument("--report_only", action="store_true", help="run nothing; report what is finished")
    args, rest = parser.parse_known_args(argv)

    from ..runs.study import read_study, run_study  # imports torch
    from ..runs.study_figure import write_methods_figure
    from ..runs.study_report import collect, write_study_report
    from ..training.hardware import limit_threads
    from ..utils.distributed import is_first_process

    limit_threads()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for fixed in ("--seed", "--config", "--with_baseline"):
        if any(text.partition("=")[0] == fixed for text in rest):
            raise UserError(f"{fixed} belongs into the study file, not on its command line.")
    study = read_study(args.study, args.output_dir, rest)
    failures = [] if args.report_only else run_study(study, _part(args.part))
    if not args.report_only and is_first_process():
        write_methods_figure(study)
    if not failures or collect(study):
        print(write_study_report(study))
    if failures:
        sys.exit(f"error: {len(failures)} runs failed; the same command tries them again.\n" + "\n".join(failures))


def _part(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise UserError(f"--part is {text!r}; expected i/n with 1 <= i <= n, such as 2/8.")
    return int(first), int(count)

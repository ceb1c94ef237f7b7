"""Runs a grid of recipes, losses and seeds, and reports it: tables with intervals, plots, and all students side by side.

    accelerate launch scripts/study.py examples/studies/camvid_components.yaml --data_dir path/to/camvid

Finished runs are skipped and interrupted ones continued, so the same command goes on where it stopped. Under several
processes every run is data-parallel. `--part 2/8` takes every eighth run instead, for processes that share a study.
`--jobs FLAVOR --dry_run` prints the commands that run it on the Hub's hardware.
Other arguments are as for distill.py; they win over the file in every run.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

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
    jobs = parser.add_argument_group("jobs on the Hub")
    jobs.add_argument("--jobs", metavar="FLAVOR", help="hardware as `hf jobs hardware` lists it, such as l4x1")
    jobs.add_argument("--dry_run", action="store_true", help="print the `hf jobs` commands, which you start yourself")
    jobs.add_argument("--parts", type=int, help="number of jobs; one for each run by default")
    jobs.add_argument("--steps_per_second", type=float, help="as a short run on that hardware has measured it")
    jobs.add_argument("--storage", metavar="USER/BUCKET", help="bucket that runs are written to and go on from")
    jobs.add_argument("--dollars_per_hour", type=float, help="price of the hardware, for the cost")
    jobs.add_argument("--package", default="hf_bcd", help="what pip installs in a job (hf_bcd)")
    jobs.add_argument("--image", default="python:3.12", help="Docker image (python:3.12)")
    args, rest = parser.parse_known_args(argv)
    _check_together(args)

    from ..runs.jobs import describe_jobs  # imports torch
    from ..runs.study import read_study
    from ..runs.study_figure import write_methods_figure
    from ..runs.study_report import collect, write_study_report
    from ..runs.study_running import run_study
    from ..training.hardware import limit_threads
    from ..utils.distributed import is_first_process

    limit_threads()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for fixed in ("--seed", "--config", "--with_baseline"):
        if any(text.partition("=")[0] == fixed for text in rest):
            raise UserError(f"{fixed} belongs into the study file, not on its command line.")
    study = read_study(args.study, args.output_dir, rest)
    if args.jobs is not None:
        print(describe_jobs(study, args.study, rest, _jobs(args, len(study.runs))))
        return
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


def _check_together(args: argparse.Namespace) -> None:
    """Refuses what would be ignored: with `--dry_run` and without `--jobs`, all runs would start."""
    of_jobs = ("dry_run", "parts", "steps_per_second", "storage", "dollars_per_hour")
    given = [f"--{name}" for name in of_jobs if getattr(args, name) not in (None, False)]
    if given and args.jobs is None:
        raise UserError(f"{', '.join(given)} would be ignored without --jobs; add it, such as --jobs l4x1.")
    if args.jobs is not None and args.part != "1/1":
        raise UserError(f"--part is {args.part}, which --jobs sets in each job; leave it out, or say --parts N.")


def _jobs(args: argparse.Namespace, runs: int) -> Any:
    from ..runs.jobs import Jobs

    if not args.dry_run:
        raise UserError("--jobs starts nothing; add --dry_run, and start the commands that it prints.")
    if args.steps_per_second is None or not args.steps_per_second > 0:
        raise UserError(
            "--jobs needs --steps_per_second above 0, for time-outs and cost: train for 100 steps on that hardware and divide by "
            "the train_seconds that the last line of its log has."
        )
    if args.storage is None or args.storage.count("/") != 1:
        raise UserError(
            "--jobs needs --storage USER/BUCKET, where runs survive their job: `hf buckets create BUCKET`."
        )
    parts = runs if args.parts is None else args.parts
    price = args.dollars_per_hour
    return Jobs(args.jobs, args.storage, args.steps_per_second, parts, args.package, args.image, price)

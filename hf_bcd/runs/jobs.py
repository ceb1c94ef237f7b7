"""A study as jobs on the Hub's hardware: the commands, one a part, with what they take. Nothing is started here."""

import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..utils.files import read_text
from ..utils.messages import UserError
from ..utils.yaml import read_yaml
from .arguments import build_arguments
from .recipes import EXAMPLES, find_recipe
from .study import Run, Study


# where a job finds what is mounted
STUDY_MOUNT, DATA_MOUNT, RUNS_MOUNT = "/study", "/data", "/runs"
# a job is stopped at its time-out; what was measured elsewhere, and on a quiet machine, is no promise
SLACK, SETUP_MINUTES, ATTEMPTS = 1.5, 15, 3


@dataclass(frozen=True)
class Jobs:
    """What a study's jobs have in common.

    Attributes:
        flavor: hardware as `hf jobs hardware` lists it.
        storage: bucket that all jobs write to, and where one that is started anew goes on: `user/name`.
        steps_per_second: as measured, for the time-out and the cost.
        parts: number of jobs.
        package: what pip installs.
        image: Docker image with Python.
        dollars_per_hour: price of the hardware; None leaves the cost out.
    """

    flavor: str
    storage: str
    steps_per_second: float
    parts: int
    package: str
    image: str
    dollars_per_hour: float | None = None


def describe_jobs(study: Study, file: Path, argv: Sequence[str], jobs: Jobs) -> str:
    """The commands that run a study on the Hub, each under a line with its runs, steps, hours and cost.

    Args:
        study: the study.
        file: its file, or its name in the package.
        argv: further arguments of `hf-bcd study`; a local `--data_dir` is mounted.
        jobs: see `Jobs`.

    Raises:
        UserError: a run counts epochs, whose steps are not known before the data are; there are more parts than runs; or the
            study's file names folders that no job would find.
    """
    if not 1 <= jobs.parts <= len(study.runs):
        raise UserError(
            f"--parts is {jobs.parts}, but the study has {len(study.runs)} runs; give 1 to {len(study.runs)}."
        )
    _check_local(study, argv)
    name, mounts = _study_of_job(file)
    arguments, data = _with_mounted_data(argv)
    volumes = [*mounts, *data, f"hf://buckets/{jobs.storage}:{RUNS_MOUNT}"]
    blocks, total = [], 0.0
    for part in range(1, jobs.parts + 1):
        runs = study.runs[part - 1 :: jobs.parts]
        steps = sum(map(_steps, runs))
        hours = (steps / jobs.steps_per_second + SETUP_MINUTES * 60) / 3600
        total += hours
        command = [
            "hf-bcd",
            "study",
            name,
            "--output_dir",
            f"{RUNS_MOUNT}/{study.name}",
            "--part",
            f"{part}/{jobs.parts}",
        ]
        script = f"pip install --quiet {shlex.quote(jobs.package)} && {shlex.join([*command, *arguments])}"
        words = [
            "hf",
            "jobs",
            "run",
            "--detach",
            "--name",
            f"{study.name}-{part}-of-{jobs.parts}",
            "--flavor",
            jobs.flavor,
        ]
        words += [
            "--timeout",
            f"{math.ceil(hours * SLACK * 60)}m",
            "--attempts",
            str(ATTEMPTS),
            "--secrets",
            "HF_TOKEN",
        ]
        words += [word for volume in volumes for word in ("--volume", volume)]
        words += [jobs.image, "bash", "-c", script]
        named = ", ".join(f"{run.name} (seed {run.seed})" for run in runs)
        blocks.append(f"# {named}: {steps} steps, {_cost(hours, jobs)}\n{shlex.join(words)}")
    blocks.append(
        f"# together {_cost(total, jobs)}, at {jobs.steps_per_second:g} steps per second and {SETUP_MINUTES} minutes of each job "
        f"beside its steps.\n# A job that is stopped goes on where it was, by the same command. When all are done: "
        f"hf-bcd study {shlex.join([str(file), '--report_only', '--output_dir', 'FOLDER', *arguments])}, with {jobs.storage} "
        "copied to FOLDER."
    )
    return "\n\n".join(blocks)


def _check_local(study: Study, argv: Sequence[str]) -> None:
    """Refuses folders of this machine that the study's file names; a typed `--data_dir` is mounted."""
    typed = any(word.partition("=")[0] == "--data_dir" for word in argv)
    for run in study.runs:
        if not typed and (folder := run.arguments.get("data_dir")):
            raise UserError(
                f"the run {run.name} has its data_dir, {folder}, from the study's file, and no job would find it; type --data_dir, "
                "which is mounted."
            )
        for name in ("student", "teacher"):
            given = run.arguments.get(name)
            if isinstance(given, str) and Path(given).is_dir():
                raise UserError(
                    f"the {name} of the run {run.name} is {given}, a folder that no job would find; push it (hf-bcd push), and name "
                    "its Hub id."
                )


def _cost(hours: float, jobs: Jobs) -> str:
    dollars = "" if jobs.dollars_per_hour is None else f", ${hours * jobs.dollars_per_hour:.2f}"
    return f"{hours:.1f} h{dollars}"


def _steps(run: Run) -> int:
    _, _, config = build_arguments(run.arguments)
    if config.max_steps <= 0:
        raise UserError(f"the run {run.name} counts epochs, whose steps are not known here; add --max_steps.")
    return config.max_steps


def _study_of_job(file: Path) -> tuple[str, list[str]]:
    """How a job names the study, and the volume it lies in: the package's own need none."""
    found = find_recipe(file, "studies").resolve()
    if found.is_relative_to(EXAMPLES):
        return found.relative_to(EXAMPLES / "studies").as_posix(), []
    chain = [found]  # and the recipes that it starts from
    while base := (read_yaml(read_text(chain[-1]), str(chain[-1])) or {}).get("base"):
        chain.append((chain[-1].parent / base).resolve())
    folder = Path(os.path.commonpath([path.parent for path in chain]))
    return f"{STUDY_MOUNT}/{found.relative_to(folder).as_posix()}", [f"{folder}:{STUDY_MOUNT}"]


def _with_mounted_data(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments whose local `--data_dir` is where a job finds it, and the volume."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--data_dir=") else [word])]
    if "--data_dir" not in words[:-1]:
        return words, []
    place = words.index("--data_dir") + 1
    folder = Path(words[place]).resolve()
    if not folder.is_dir():
        raise UserError(f"--data_dir is {words[place]}, which is no folder here; it would be copied to the jobs.")
    return [*words[:place], DATA_MOUNT, *words[place + 1 :]], [f"{folder}:{DATA_MOUNT}"]

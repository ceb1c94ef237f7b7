"""A grid of runs over seeds, from one file: what to train, and what is finished."""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..stores.writing import PRECISIONS
from ..utils.files import numbers, read_json
from ..utils.messages import UserError
from ..utils.types import converted
from .arguments import (
    RECIPE_KEYS,
    build_arguments,
    named_teachers,
    read_arguments,
)
from .baseline import with_stored_teachers
from .recipes import find_recipe, merged, read_recipe


logger = logging.getLogger(__name__)

STUDY_KEYS = ("seeds", "runs", "reference", "split", "reinforce")
SPLITS = ("train", "validation", "test")
NAME = r"\w[\w.+-]{,99}"
RESULT_FILE = "study.json"
# arguments that do not decide how a run comes out: where it lies, which may have moved since, and what it shows
SILENT = {"hub_token", "output_dir", "disable_tqdm", "report_to"}


@dataclass(frozen=True)
class Run:
    """One student of a study.

    Attributes:
        name: name of the run, the same for all its seeds.
        seed: seed of weights, data order and augmentation.
        reference: name of the run that it is compared with, seed by seed; its own if with none.
        folder: where the student and its scores lie.
        arguments: recipe of the run.
        reinforce: how its teacher is stored, `{views: 8}`; None if it runs along.
    """

    name: str
    seed: int
    reference: str
    folder: Path
    arguments: dict[str, Any]
    reinforce: dict[str, Any] | None = None

    def result(self) -> dict[str, Any] | None:
        """The results of the finished run; None if it is not finished.

        Raises:
            UserError: if the folder holds a run of another recipe.
        """
        path = self.folder / RESULT_FILE
        if not path.is_file():  # written last
            return None
        result = read_json(path)
        if not isinstance(result, dict) or not isinstance(result.get("arguments"), dict):
            raise UserError(f"{path}: holds no results of a run; remove it to run this one again.")
        there, here = ({**content, "reinforce": stored} for content, stored in (
            (result["arguments"], result.get("reinforce")), (self.arguments, self.reinforce)
        ))  # fmt: skip
        for key in sorted({*here, *there} - SILENT):
            found, expected = there.get(key), json.loads(json.dumps(here.get(key)))
            if found != expected:
                raise UserError(
                    f"{self.folder} holds a finished run with {key} {found!r}, where the study says {expected!r}. "
                    "Choose another --output_dir, or remove that folder to run it again."
                )
        return {
            **result,
            **{
                key: numbers(result[key]) for key in ("scores", "teacher", "more_teachers", "curve") if result.get(key)
            },
        }


@dataclass(frozen=True)
class Study:
    """A study file: a recipe, variations of it, and seeds.

    Attributes:
        name: name of the file.
        folder: output folder of all runs.
        split: split of the final scores; `test` where it is labelled, else `validation`, by default.
        runs: all runs, seed by seed.
        token: access token of the Hub, which no run's arguments hold, so that it is neither written nor compared.
    """

    name: str
    folder: Path
    split: str | None
    runs: list[Run]
    token: str | None = field(default=None, repr=False)


def read_study(path: Path, output_dir: Path | None = None, argv: Sequence[str] = ()) -> Study:
    """Reads a study file: a recipe (with `base`, if it starts from another) and five keys more.

    - `runs`: name -> arguments that differ from the recipe, e.g. `{baseline: {teacher: null}, bcd: {}}`.
    - `seeds`: list of integers.
    - `reference`: the run to compare with, seed by seed; the first one by default. A run may name another one.
    - `split`: split of the final scores, e.g. `validation` where a study chooses something.
    - `reinforce`: `{views: 8}` stores the teacher's outputs once for all runs, see `hf-bcd reinforce`; `precision` as there. A run
      may have its own, or null for a teacher that runs along.

    Args:
        path: YAML file, or its name in the package.
        output_dir: folder of the study, instead of the file's `output_dir`.
        argv: command-line arguments that win over the file in every run, but for what a run itself sets to null: its
            `teacher: null` remains a baseline.

    Raises:
        UserError: for an unknown key, no runs, an unknown reference or split, seeds that are not distinct integers, or
            arguments of a run that would be refused when it begins.
    """
    path = find_recipe(path, "studies")
    recipe = read_recipe(path, {*RECIPE_KEYS, *STUDY_KEYS})
    seeds, variations, reference, split, reinforce = (
        recipe.pop(key, None) for key in ("seeds", "runs", "reference", "split", "reinforce")
    )
    if not isinstance(variations, dict) or not variations:
        raise UserError(f"{path}: runs is {variations!r}; expected a mapping such as {{baseline: {{teacher: null}}}}.")
    for name, own in variations.items():
        if not isinstance(own, dict | None):
            raise UserError(f"{path}: run {name!r} is {own!r}; expected what it changes, such as {{teacher: null}}.")
        if name is None or not re.fullmatch(NAME, str(name)):  # it becomes a folder
            raise UserError(
                f"{path}: a run is called {name!r}; a name has letters, digits, and . + - _ between them, and at most 100."
            )
    if len({str(name).casefold() for name in variations}) < len(variations):  # some file systems ignore the case
        raise UserError(
            f"{path}: two of the runs {', '.join(map(str, variations))} would have one folder; rename one."
        )
    seeds = [42] if seeds is None else seeds
    if (
        not isinstance(seeds, list)
        or not seeds
        or any(type(seed) is not int or not 0 <= seed < 2**32 for seed in seeds)
    ):
        raise UserError(f"{path}: seeds is {seeds!r}; expected a list of integers from 0 on.")
    if len(set(seeds)) != len(seeds):
        raise UserError(f"{path}: seeds {seeds} are not distinct; equal seeds would be one run counted twice.")
    reference = next(iter(variations)) if reference is None else reference
    references = {name: (own or {}).get("reference", reference) for name, own in variations.items()}
    for name in references.values():
        if name not in list(variations):
            raise UserError(f"{path}: reference is {name!r}; choose one of {', '.join(map(str, variations))}.")
    if split not in (None, *SPLITS):
        raise UserError(f"{path}: split is {split!r}; choose one of {', '.join(SPLITS)}.")
    names = sorted(variations, key=lambda name: name not in references.values())  # they run first
    own_folder = converted(recipe.get("output_dir"), str | None, f"{path}: output_dir")
    folder = output_dir or Path(own_folder or f"runs/studies/{path.stem}")
    runs: list[Run] = []
    token = None
    for seed in seeds:
        for name in names:
            given_run = variations[name] or {}
            own = {key: value for key, value in given_run.items() if key not in ("reference", "reinforce")}
            kept = checked_reinforce(given_run.get("reinforce", reinforce), f"{path}: run {name!r}")
            if unknown := set(own) - set(RECIPE_KEYS):
                raise UserError(f"{path}: run {name!r} has the unknown key {sorted(map(str, unknown))[0]!r}.")
            if ours := sorted(set(own) & {"seed", "output_dir", "with_baseline"}):
                raise UserError(f"{path}: run {name!r} sets {ours[0]}, which the study decides; leave it out there.")
            try:
                given = read_arguments(list(argv), recipe=merged(recipe, own))
            except UserError as error:
                raise UserError(f"{path}: run {name!r}: {error}") from error
            given |= dict.fromkeys(
                (key for key, value in own.items() if value is None)
            )  # also with --teacher.weights W
            token = given.pop("hub_token", None) or token
            given.pop("resume_from_checkpoint", None)  # as the message after Ctrl-C says; every run does
            run_folder = folder / str(name) / f"seed_{seed}"
            fixed = {"output_dir": str(run_folder), "seed": seed, "with_baseline": False}
            if seed == seeds[0]:
                try:
                    model_args, _, config = build_arguments({**given, **fixed})  # now, not after the runs before it
                    config.check_teachers(list(named_teachers(with_stored_teachers(model_args, token))))
                except UserError as error:
                    raise UserError(f"{path}: run {name!r}: {error}") from error
            lists = any(isinstance(given.get(key), list) for key in ("teacher", "teacher_store"))  # which add up
            taught = given.get("teacher") is not None and (given.get("teacher_store") is None or lists)
            arguments = {**given, **fixed}
            runs.append(Run(str(name), seed, references[name], run_folder, arguments, kept if taught else None))
    _tell_the_same(path, runs, argv)
    return Study(path.stem, folder, split, runs, token)


def _tell_the_same(path: Path, runs: Sequence[Run], argv: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for run in runs:
        of_run = {key: value for key, value in run.arguments.items() if key not in SILENT}
        other = seen.setdefault(json.dumps([of_run, run.reinforce], sort_keys=True, default=str), run.name)
        if other != run.name:
            where = "; the command line wins over what sets them apart" if argv else ""
            logger.warning("%s: the runs %s and %s are the same%s.", path, other, run.name, where)


def checked_reinforce(given: Any, where: str) -> dict[str, Any] | None:
    """How a teacher is to be stored; a `UserError` names what is wrong about it."""
    if given is None:
        return None
    if not isinstance(given, dict) or not {"views"} <= set(given) <= {"views", "precision"}:
        raise UserError(f"{where}: reinforce is {given!r}; expected {{views: 8}}, with precision where it matters.")
    views, precision = given["views"], given.get("precision", PRECISIONS[0])
    if type(views) is not int or views < 1 or precision not in PRECISIONS:
        raise UserError(
            f"{where}: reinforce is {given!r}; views is a number from 1 on, precision one of {', '.join(PRECISIONS)}."
        )
    return {"views": views, "precision": precision}

"""A grid of runs over seeds, from one file: what to train, what is finished, and going on where it stopped."""

import copy
import dataclasses
import gc
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..adapters import DenseAdapter, read_synonyms
from ..adapters.loading import load_adapter
from ..data import DenseDataset, DenseDatasets
from ..losses.base import DistillationLoss
from ..stores import Store
from ..stores.writing import PRECISIONS
from ..tasks import task_of
from ..training.checkpoints import data_key
from ..training.config import BCDConfig
from ..training.loaders import VIEW_NAMES, view_options
from ..training.teachers import naming, role_of
from ..utils.files import numbers, read_json, write_json, write_text
from ..utils.messages import UserError
from ..utils.types import converted
from .arguments import (
    RECIPE_KEYS,
    DataArguments,
    ModelArguments,
    build_arguments,
    named_teachers,
    read_arguments,
)
from .baseline import STORED_KEYS, check_untrained, open_store, prepare_teacher, teacher_key, with_stored_teachers
from .experiment import alone_in, build_student, evaluate_model, final_split, load_data, name_classes, train_model
from .recipes import find_recipe, merged, read_recipe
from .reinforce import build_reinforcer, make_store
from .report import write_report


logger = logging.getLogger(__name__)

STUDY_KEYS = ("seeds", "runs", "reference", "split", "reinforce")
SPLITS = ("train", "validation", "test")
NAME = r"\w[\w.+-]{,99}"
RESULT_FILE = "study.json"
Live = Mapping[str, tuple[ModelArguments, BCDConfig]]
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
    return Study(path.stem, folder, split, runs, token)


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


@dataclass
class Shared:
    """Data and teachers of a study, loaded, trained and scored once."""

    study: Study
    data: dict[str, DenseDatasets] = field(default_factory=dict)
    teachers: dict[str, DenseAdapter] = field(default_factory=dict)

    def load_data(self, args: DataArguments) -> DenseDatasets:
        """The data set that the arguments name."""
        key = repr(args)
        if key not in self.data:
            self.data[key] = load_data(args)
        return self.data[key]

    def teacher(
        self, args: ModelArguments, config: BCDConfig, data: DenseDatasets, split: str
    ) -> tuple[DenseAdapter | None, dict[str, Any] | None]:
        """A single teacher of a run and its scores; one that is trained here is trained once, with the default seed.

        Its folder is named by what decides it, so runs with other teachers, in whatever order or process, have others.
        """
        if args.teacher is None:
            return None, None
        own = copy.deepcopy(config)
        own.seed, own.data_seed = BCDConfig.seed, None
        key = teacher_key(args, own, data)
        name = digest(key)
        folder = self.study.folder / "teachers" / name
        own.output_dir = str(folder)
        with alone_in(folder, config, wait=True):
            if name not in self.teachers:
                model = prepare_teacher(args, own, data)
                assert model is not None
                self.teachers[name] = model
            return self.teachers[name], self._score(self.teachers[name], key, folder, args, config, data[split])

    def stored(self, run: Run, live: Live, data: DenseDatasets, split: str) -> dict[str, Store]:
        """What is stored of a run's live teachers, by their names: in one store, made once for all runs of the same views and data."""
        if run.reinforce is None or not live:
            return {}
        groups, keys, own = self._groups(run, live), dict[str, Any](), dict[str, BCDConfig]()
        for name, (args, config, recipes) in groups.items():
            own[name] = copy.deepcopy(config)
            own[name].seed, own[name].data_seed = BCDConfig.seed, None
            keys[name] = {"teacher": teacher_key(args, own[name], data), "losses": recipes}
        first = next(iter(own.values()))
        key = {
            **keys.get("", {"teachers": keys}), "views": view_options(task_of(data["train"]), first), **run.reinforce,
            **data_key(data["train"]),
        }  # fmt: skip
        folder = self.study.folder / "stores" / digest(key)
        with alone_in(folder, first, wait=True):
            try:
                store = Store(folder)
            except UserError:  # not there, or not finished
                parts = {}
                for name, (args, config, recipes) in groups.items():
                    with naming(name):
                        teacher, _ = self.teacher(args, config, data, split)
                        own[name].output_dir = str(folder)
                        args = dataclasses.replace(args, student=None)
                        parts[name] = build_reinforcer(args, own[name], data, recipes, copy.deepcopy(teacher))
                make_store(folder, parts, run.reinforce["views"], run.reinforce["precision"])
                store = Store(folder)
        names = {
            name: group
            for name, (args, _) in live.items()
            for group in groups
            if groups[group][0].teacher == args.teacher
        }
        return {name: store.parts[group] for name, group in names.items()}

    def _groups(self, run: Run, live: Live) -> dict[str, tuple[ModelArguments, BCDConfig, list[dict[str, Any]]]]:
        """The teachers of the store that serves a run, with the losses of all runs that read it.

        They are the run's own; or those of a run that has them among more, if it has all that their losses read.
        """
        agreeing = [
            live_teachers(args, config)
            for one in self.study.runs
            if (one.seed, one.reinforce) == (run.seed, run.reinforce)
            and all(one.arguments.get(key) == run.arguments.get(key) for key in VIEW_NAMES)
            for args, _, config in [build_arguments(one.arguments)]
        ]

        def grouped(teachers: Live) -> dict[str, tuple[ModelArguments, BCDConfig, list[dict[str, Any]]]]:
            return {name: (*pair, served_losses(agreeing, *pair)) for name, pair in teachers.items()}

        mine = grouped(live)
        larger = [grouped(teachers) for teachers in agreeing if len(teachers) > len(mine)]
        wanted = [(args.teacher, recipes) for args, _, recipes in mine.values()]
        fitting = [
            one for one in larger if all(pair in [(x.teacher, r) for x, _, r in one.values()] for pair in wanted)
        ]
        return max([mine, *fitting], key=len)

    def _score(
        self,
        model: DenseAdapter,
        teacher: Mapping[str, Any],
        folder: Path,
        args: ModelArguments,
        config: BCDConfig,
        data: DenseDataset,
    ) -> dict[str, Any] | None:
        synonyms = read_synonyms(args.label_synonyms)
        if not model.predicts or model.match(data.id2label, synonyms).missing:
            return None
        scored = {"split": data.split, "image_size": config.image_size, "synonyms": synonyms, **data_key(data)}
        key = {**teacher, **{f"scored.{key}": value for key, value in scored.items()}}
        path = folder / f"scores-{digest(key)}.json"
        if path.is_file():
            found = read_json(path)
            if found["key"] != json.loads(json.dumps(key)):
                raise UserError(f"{path} holds the scores of another teacher or split; remove it to score this one.")
            return numbers(found["scores"])
        scores = evaluate_model(model, config, data, synonyms)
        if config.should_save:
            write_json(path, {"key": key, "scores": scores})
        return scores


def live_teachers(args: ModelArguments, config: BCDConfig) -> dict[str, tuple[ModelArguments, BCDConfig]]:
    """The teachers of a run that no store holds yet, by name, each with arguments and losses of its own."""
    named = named_teachers(args)
    return {name: (own, config.for_teacher(name)) for name, own in named.items() if own.teacher_store is None}


def served_losses(runs: Sequence[Live], args: ModelArguments, config: BCDConfig) -> list[dict[str, Any]]:
    """The losses that what is stored of a teacher serves: a run's, and those of others that agree with it in what is stored.

    Args:
        runs: live teachers of all runs that see the same views.
        args: of the teacher.
        config: with the run's losses of it.
    """

    def losses_of(own: BCDConfig) -> tuple[dict[str, Any], dict[str, Any]]:
        plain: dict[str, Any] = dict(own.loss_parts[""])
        kept = {
            name: {key: x for key, x in (plain[name] or {}).items() if key not in ("weight", "decay")}
            for name, loss in own.loss_options.items()
            if loss.cls.digest is not DistillationLoss.digest
        }
        return plain, kept

    found = [losses_of(own) for run in runs for other, own in run.values() if other.teacher == args.teacher]
    first = next((kept for _, kept in found if kept), {})
    mine = losses_of(config)[1] or first
    joined = [plain for plain, kept in found if kept == mine or (not kept and mine == first)]
    return [recipe for place, recipe in enumerate(joined) if recipe not in joined[:place]]


def digest(key: Mapping[str, Any]) -> str:
    """A short name for what a mapping says, the same in every process."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


def run_study(study: Study, part: tuple[int, int] = (1, 1)) -> list[str]:
    """Trains and scores every run that is not finished; continues one that was interrupted from its last checkpoint.

    Args:
        study: the study.
        part: `(i, n)` takes every n-th run, from the i-th on, so that n processes can share a study.

    Returns:
        One line for each run that failed. The others go on.
    """
    shared, failures = Shared(study), []
    for run in study.runs[part[0] - 1 :: part[1]]:
        try:
            if run.result() is not None:
                logger.warning("finished already: %s, seed %s", run.name, run.seed)
                continue
            logger.warning("running %s, seed %s, in %s", run.name, run.seed, run.folder)
            train_run(run, shared)
        except Exception as error:  # it was refused, it diverged, memory or disk were full: the others go on
            failures.append(f"{run.name}, seed {run.seed}: {error}")
            known = isinstance(error, ValueError | FloatingPointError | RuntimeError | OSError)
            logger.error("failed: %s", failures[-1], exc_info=not known)
        gc.collect()
    return failures


def train_run(run: Run, shared: Shared) -> None:
    """Trains, scores and reports one student; writes its `study.json` last."""
    model_args, data_args, config = build_arguments({**run.arguments, "hub_token": shared.study.token})
    with alone_in(run.folder, config):
        _train_run(run, shared, model_args, data_args, config)


def _train_run(
    run: Run, shared: Shared, model_args: ModelArguments, data_args: DataArguments, config: BCDConfig
) -> None:
    config.resume_from_checkpoint = "true"  # the last checkpoint of its folder, if there is one
    model_args = with_stored_teachers(model_args, config.hub_token)
    recipe = run.arguments | {key: getattr(model_args, key) for key in STORED_KEYS if key in run.arguments}
    data = name_classes(model_args, shared.load_data(data_args))
    split = shared.study.split or final_split(data)
    if split is None or split not in data:
        raise UserError(f"the data set has the splits {', '.join(data)}, but the scores are to come from {split!r}.")
    student = build_student(model_args, config, data)
    check_untrained(model_args, config, data, student)
    taught, models, scores = dict[str, Any](), dict[str, DenseAdapter](), dict[str, Any]()
    stored = shared.stored(run, live_teachers(model_args, config), data, split)
    for number, (name, own) in enumerate(named_teachers(model_args).items(), 1):
        with naming(name):
            of_one = config.for_teacher(name)
            taught[name] = store = open_store(own, of_one)
            if store is not None:
                found = store.scores(split, config.image_size)
            else:
                teacher, found = shared.teacher(own, of_one, data, split)
                assert teacher is not None
                taught[name] = stored.get(name, teacher)
                models[role_of(number)] = teacher
            if found:
                scores[role_of(number)] = found
    teacher_scores = dict(scores)
    given: Any = taught.get("", taught or None)
    trainer = train_model(student, given, config, data, label_synonyms=model_args.label_synonyms)
    models["student"] = load_adapter(str(run.folder), task=trainer.task.name)
    scores["student"] = evaluate_model(models["student"], config, data[split])
    reference = run.folder.parent.parent / run.reference / run.folder.name
    if run.name != run.reference and (reference / RESULT_FILE).is_file() and taught:
        models["baseline"] = load_adapter(str(reference), task=trainer.task.name)
        scores["baseline"] = numbers(read_json(reference / RESULT_FILE)["scores"])
    if config.should_save:
        write_text(run.folder / "recipe.yaml", yaml.safe_dump(run.arguments, sort_keys=False, allow_unicode=True))
        write_report(trainer, models, scores, data, split, recipe)
        result = {
            "arguments": run.arguments,
            "reinforce": run.reinforce,
            "split": split,
            "images": len(data[split]),
            "scores": scores["student"],
            "teacher": teacher_scores.pop("teacher", None),
            "more_teachers": list(teacher_scores.values()),
            "steps": trainer.state.global_step,
            "train_seconds": trainer.train_seconds,
            "task": trainer.task.name,
            "curve": evaluation_curve(trainer.state.log_history, trainer.task.scores[0].key),
        }
        write_json(run.folder / RESULT_FILE, result)
    trainer.accelerator.wait_for_everyone()


def evaluation_curve(history: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, float]]:
    """Step, seconds of training so far and the score `key` of every evaluation in a trainer's log."""
    curve, seconds = [], 0.0
    for entry in history:
        seconds = entry.get("train_seconds", seconds)
        if f"eval_{key}" in entry:
            curve.append({"step": entry["step"], "seconds": seconds, key: entry[f"eval_{key}"]})
    return curve

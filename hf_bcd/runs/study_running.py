"""Running a study: what is finished, data and teachers that runs share, and going on where it stopped."""

import copy
import dataclasses
import gc
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..adapters import DenseAdapter, read_synonyms
from ..adapters.loading import load_adapter
from ..data import DenseDataset, DenseDatasets
from ..losses.base import DistillationLoss
from ..losses.recipe import read_losses
from ..stores import Store
from ..tasks import Score, task_of
from ..training.checkpoints import data_key
from ..training.config import BCDConfig
from ..training.loaders import VIEW_NAMES, view_options
from ..training.teachers import naming, role_of
from ..utils.files import numbers, read_json, write_json, write_text
from ..utils.messages import UserError
from .arguments import (
    DataArguments,
    ModelArguments,
    build_arguments,
    named_teachers,
)
from .baseline import STORED_KEYS, check_untrained, open_store, prepare_teacher, teacher_key, with_stored_teachers
from .experiment import alone_in, build_student, evaluate_model, final_split, load_data, name_classes, train_model
from .reinforce import build_reinforcer, make_store
from .report import write_report
from .study import RESULT_FILE, Run, Study


logger = logging.getLogger(__name__)

MADE_FOR = "made_for.json"  # in the folder of a store
Live = Mapping[str, tuple[ModelArguments, BCDConfig]]


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
        shown = {
            "views": view_options(task_of(data["train"]), first), **run.reinforce, **data_key(data["train"]),
        }  # fmt: skip
        folder = self.study.folder / "stores" / digest({**keys.get("", {"teachers": keys}), **shown})
        made = json.loads(json.dumps({"teachers": keys, "shown": shown}))
        folder = next(
            (path.parent for path in sorted(folder.parent.glob(f"*/{MADE_FOR}")) if serves(path, made)), folder
        )
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
                if first.should_save:
                    write_json(folder / MADE_FOR, made)
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
            name: _read(plain[name])
            for name, loss in own.loss_options.items()
            if loss.cls.digest is not DistillationLoss.digest
        }
        return plain, kept

    found = [losses_of(own) for run in runs for other, own in run.values() if other.teacher == args.teacher]
    first = next((kept for _, kept in found if kept), {})
    mine = losses_of(config)[1] or first
    joined = [plain for plain, kept in found if kept == mine or (not kept and mine == first)]
    return [recipe for place, recipe in enumerate(joined) if recipe not in joined[:place]]


def serves(path: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether a study's store has all that the losses of further runs read, so that a new method needs no new store.

    Args:
        path: what the store was made for: teachers with the losses that read them, and the views shown to them.
        wanted: likewise, of the runs.
    """
    made = read_json(path)
    if made["shown"] != wanted["shown"] or made["teachers"].keys() != wanted["teachers"].keys():
        return False
    for name, group in wanted["teachers"].items():
        there = made["teachers"][name]
        if there["teacher"] != group["teacher"]:
            return False
        known = [{loss: _read(options) for loss, options in recipe.items()} for recipe in there["losses"]]
        scores = any("logits" in loss.needs for recipe in there["losses"] for loss in read_losses(recipe).values())
        for recipe in group["losses"]:
            for loss, parsed in read_losses(recipe).items():
                same = any(loss in one and one[loss] == _read(recipe[loss]) for one in known)
                if not same and not (scores and parsed.needs <= {"logits", "labels"}):
                    return False
    return True


def _read(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of a loss that may decide what it reads."""
    return {key: x for key, x in (options or {}).items() if key not in ("weight", "decay", "optional")}


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
    reference = run.folder.parent.parent / run.reference / run.folder.name
    compared = run.name != run.reference and (reference / RESULT_FILE).is_file() and bool(taught)
    alone = numbers(read_json(reference / RESULT_FILE)["scores"]) if compared else {}
    if told := behind(teacher_scores, alone, run.reference, task_of(data["train"]).scores[0]):
        logger.warning("%s", told)
    given: Any = taught.get("", taught or None)
    trainer = train_model(student, given, config, data, label_synonyms=model_args.label_synonyms)
    models["student"] = load_adapter(str(run.folder), task=trainer.task.name)
    scores["student"] = evaluate_model(models["student"], config, data[split])
    if compared:
        models["baseline"], scores["baseline"] = load_adapter(str(reference), task=trainer.task.name), alone
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


def behind(teachers: Mapping[str, Mapping[str, Any]], alone: Mapping[str, Any], name: str, score: Score) -> str | None:
    """A sentence if no teacher's score exceeds that of the run called `name`; None also where a score is not known."""
    best = max((scores[score.key] for scores in teachers.values()), default=None)
    if best is None or not alone or best > alone[score.key]:
        return None
    return (
        f"the teacher's {score.title} ({score.text(best)}) does not exceed that of {name} ({score.text(alone[score.key])}): it has "
        "nothing to teach. Take a better one, or train it longer."
    )


def evaluation_curve(history: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, float]]:
    """Step, seconds of training so far and the score `key` of every evaluation in a trainer's log."""
    curve, seconds = [], 0.0
    for entry in history:
        seconds = entry.get("train_seconds", seconds)
        if f"eval_{key}" in entry:
            curve.append({"step": entry["step"], "seconds": seconds, key: entry[f"eval_{key}"]})
    return curve

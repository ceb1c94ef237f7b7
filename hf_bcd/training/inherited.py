"""Arguments and data sets of `Trainer`: each is used here, or refused before training."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import IntervalStrategy

from ..data import DenseStream
from ..data.dataset import TransformedDataset, torch_seed
from ..tasks import Task
from ..utils.messages import UserError, unknown_key_message
from ..utils.text import shortened
from .config import FIRST_SCORE, BCDConfig


logger = logging.getLogger(__name__)

REFUSED = {
    "compute_metrics": "the data's task decides the scores, which are streamed; see `trainer.evaluate()`",
    "preprocess_logits_for_metrics": "no logits are gathered; `trainer.predict(data).predictions` are label maps",
    "compute_loss_func": "losses are given by name, `BCDConfig(losses={...})`; CONTRIBUTING shows how to add one",
    "model_init": "give the model itself",
}


def refuse(arguments: Mapping[str, Any]) -> None:
    """Refuses arguments of `Trainer` that have no meaning here; the `UserError` says what does the same."""
    for name, instead in REFUSED.items():
        if arguments.get(name) is not None:
            raise UserError(f"BCDTrainer takes no {name}: {instead}.")


def settle_evaluation(args: BCDConfig, eval_dataset: Any, task: Task) -> None:
    """Changes arguments in place to what the evaluation data allow.

    Raises:
        UserError: if `args` are of another class; these are a stream, which never ends, or have no labels; or a best model is asked for without them, or by a score that
            there is not.
    """
    if not isinstance(args, BCDConfig):
        raise UserError(f"args is a {type(args).__name__}; give a BCDConfig, which has the same options and more.")
    if isinstance(eval_dataset, DenseStream):
        raise UserError(
            f"eval_dataset is a stream of {eval_dataset.name}, which never ends; load it without streaming."
        )
    for dataset in eval_dataset.values() if isinstance(eval_dataset, Mapping) else [eval_dataset]:
        if getattr(dataset, "labelled", None) == 0:
            raise UserError(f"eval_dataset: the pictures of {dataset.name} have no labels, so no score; leave it out.")
    if eval_dataset is None and args.eval_strategy != "no":
        if args.load_best_model_at_end:
            raise UserError(
                "load_best_model_at_end compares evaluations, but there are no evaluation data; leave it out."
            )
        logger.warning("no evaluation data, so training goes on without evaluations")
        args.eval_strategy = IntervalStrategy.NO
    sets = [f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, Mapping) else [""]
    known = {of + score.key: score for of in sets for score in task.scores}
    if args.metric_for_best_model == FIRST_SCORE:
        args.metric_for_best_model = next(iter(known))
    if args.metric_for_best_model is not None:
        name = args.metric_for_best_model.removeprefix("eval_")
        if name not in known:
            raise UserError(unknown_key_message("metric_for_best_model", args.metric_for_best_model, known))
        args.greater_is_better = known[name].higher_is_better


def settle_early_stopping(args: BCDConfig, callbacks: Iterable[Any], first_score: str) -> None:
    """Gives early stopping the task's first score where no other is named; refuses it without evaluations."""
    if any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks):
        if args.eval_strategy == IntervalStrategy.NO:
            raise UserError("EarlyStoppingCallback compares evaluations, but eval_strategy is no; set eval_strategy.")
        if args.metric_for_best_model is None:
            args.metric_for_best_model, args.greater_is_better = first_score, True


def check_samples(task: Task, num_labels: int, **datasets: Any) -> None:
    """Looks at the first sample of data sets from elsewhere; a `UserError` says what no model here could use."""
    for name, given in datasets.items():
        parts: Any = given.items() if isinstance(given, Mapping) else [("", given)]
        for part, dataset in parts:
            if dataset is None or isinstance(dataset, TransformedDataset | IterableDataset) or not len(dataset):
                continue
            with torch_seed(0):  # the data set's own random numbers must not move those of the run
                sample = dataset[0]
            task.check_sample(sample, num_labels, f"{name}[{part!r}]" if part else name, name == "eval_dataset")


def check_classes(**datasets: Any) -> None:
    """Compares task and class names of the data sets of a run, as far as they state any: a model has one order of classes.

    Raises:
        UserError: two have another task, another number of classes, or a class in another place, of which other names are only
            warned; or the training data are several sets.
    """
    if isinstance(splits := datasets.get("train_dataset"), Mapping):
        raise UserError(
            f"train_dataset holds the splits {', '.join(splits)}; give one of them, such as data['train']."
        )
    named = [
        (f"{name}[{part!r}]" if part else name, getattr(dataset, "dataset", dataset))
        for name, given in datasets.items()
        for part, dataset in (given.items() if isinstance(given, Mapping) else [("", given)])
    ]
    stated = [(name, dataset) for name, dataset in named if getattr(dataset, "id2label", None)]
    for name, dataset in stated[1:]:
        first, reference = stated[0]
        ours, theirs = ([label.casefold() for label in one.id2label.values()] for one in (reference, dataset))
        if reference.task != dataset.task:
            raise UserError(f"{first} is for {reference.task}, but {name} for {dataset.task}; give data of one task.")
        moved = [label for place, label in enumerate(theirs) if label in ours and ours.index(label) != place]
        if moved or len(ours) != len(theirs):
            example = f", such as {moved[0]!r} as {ours.index(moved[0])} and {theirs.index(moved[0])}" if moved else ""
            raise UserError(
                f"{first} has the {len(ours)} classes {shortened(', '.join(ours))}, but {name} the {len(theirs)} classes "
                f"{shortened(', '.join(theirs))}{example}. Class i of the one must be class i of the other: load both with the "
                "same id2label, and store the same ids."
            )
        if ours != theirs:
            logger.warning(
                "%s names its classes %s, %s %s; class i of the one is taken for class i of the other.",
                first,
                ours,
                name,
                theirs,
            )

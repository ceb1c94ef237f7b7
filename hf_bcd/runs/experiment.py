"""The steps of a run: data, teacher, undistilled baseline, distilled student, scores, report, push."""

import logging
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub.utils import WeakFileLock
from transformers import PreTrainedModel, set_seed

from ..adapters import DenseAdapter, adapt, image_processor, read_synonyms
from ..adapters.loading import build_model, class_names_of
from ..adapters.specs import ModelSpec
from ..data import (
    DenseDataset,
    DenseDatasets,
    DenseStream,
    holds_only_pictures,
    keep_in_memory,
    load_dense_dataset,
    load_pictures,
)
from ..data.labels import MAX_LABELS
from ..hub.pushing import fetch_checkpoint
from ..stores import Store
from ..tasks import task_of
from ..training.checkpoints import last_checkpoint
from ..training.config import BCDConfig
from ..training.evaluation import evaluate
from ..training.loaders import own_sampler
from ..training.teaching import adopt_labels, check_checkpointing, check_task
from ..training.trainer import BCDTrainer
from ..utils.files import write_text
from ..utils.messages import UserError
from ..utils.text import shortened
from ..utils.yaml import parse_mapping
from .arguments import DataArguments, ModelArguments, named_teachers


logger = logging.getLogger(__name__)

# arguments of `load_dense_dataset` that the command line calls by another name
NAMES = {"config": "dataset_config", "revision": "dataset_revision"}


def load_data(args: DataArguments, for_training: bool = True) -> DenseDatasets:
    """Loads the data set that the arguments name, cut to the sample limits.

    Args:
        args: the data set.
        for_training: whether there must be a training split.

    Raises:
        UserError: if neither a data set nor a folder is named, a limit is not positive, or there is no training split.
    """
    source = args.dataset_name or (args.data_dir and Path(args.data_dir))  # which is a folder, whatever it is called
    if for_training and (found := load_label_free(args)) is not None:
        return found
    if not source:
        raise UserError("no data: give --dataset_name (catalog name, Hub id or folder) or --data_dir.")
    for name in ("max_train_samples", "max_eval_samples"):
        if (limit := getattr(args, name)) is not None and limit < 1:
            raise UserError(f"--{name} is {limit}; take at least one image, or leave it out for all.")
    if args.cache_images and args.streaming:
        raise UserError("streaming is for data that no memory holds: leave --cache_images or --streaming out.")
    given = args.dataset_options or {}
    of_one = parse_mapping(given, "dataset_options") if isinstance(given, str) else given
    options = {
        "data_dir": args.data_dir if args.dataset_name else None,
        "config": args.dataset_config,
        "revision": args.dataset_revision,
        "image_column": args.image_column,
        "label_column": args.label_column,
        "id2label": args.id2label,
        "reduce_labels": args.reduce_labels,
        "ignore_labels": args.ignore_labels,
        "streaming": args.streaming,
        "shuffle_buffer": args.shuffle_buffer,
        "max_eval_samples": args.max_eval_samples,
        "task": args.task,
        "box_format": args.box_format,
    }
    if twice := sorted(options.keys() & of_one):
        raise UserError(
            f"dataset_options sets {', '.join(twice)}, which every data set has; give arguments of their own instead "
            f"(--{shortened(', --'.join(NAMES.get(name, name) for name in twice))})."
        )
    data = load_dense_dataset(source, **options, **of_one)
    if for_training and "train" not in data:
        raise UserError(f"{source} has no training split, only {', '.join(data)}.")
    if for_training and final_split(data) is None:
        logger.warning("%s has neither a test nor a validation split with truth, so this run gives no scores.", source)

    def cut(split: Any, limit: int | None) -> Any:
        if isinstance(split, DenseStream):
            return split if limit is None else split.take(limit)
        return split if limit is None or limit >= len(split) else split.select(range(limit))

    limits = {name: args.max_train_samples if name == "train" else args.max_eval_samples for name in data}
    splits = {name: cut(split, limits[name]) for name, split in data.items()}
    if for_training:
        splits["train"] = with_pictures(splits["train"], args)
    if args.cache_images and for_training:
        splits |= {name: keep_in_memory(splits[name]) for name in ("train", "validation") if name in splits}
    return DenseDatasets(splits)


def load_label_free(args: DataArguments) -> DenseDatasets | None:
    """Pictures without any labels, where the arguments name nothing else; their classes are to be the teacher's.

    Raises:
        UserError: an option is given that says how to read labels.
    """
    folder = Path(args.data_dir).expanduser() if args.data_dir else None
    if args.dataset_name or (folder is not None and not holds_only_pictures(folder)):
        return None
    sources: list[Any] = [source for source in (folder, *named_pictures(args)) if source is not None]
    if not sources:
        return None
    own = (
        "dataset_config",
        "dataset_revision",
        "label_column",
        "id2label",
        "reduce_labels",
        "ignore_labels",
        "streaming",
        "task",
    )
    if useless := [name for name in own if getattr(args, name)]:
        raise UserError(f"{sources[0]} holds pictures without labels: leave {', '.join(useless)} out.")
    train, *more = [load_pictures(source, image_column=args.image_column) for source in sources]
    for pictures in more:
        train = train.with_unlabelled(pictures)
    if args.max_train_samples is not None:
        train = train.select(range(min(args.max_train_samples, len(train))))
    logger.warning(
        "%s: %d pictures without labels, so the run distils in the teacher's classes, without a task loss and without scores.",
        ", ".join(map(str, sources)),
        len(train),
    )
    return DenseDatasets({"train": keep_in_memory(train) if args.cache_images else train})


def named_pictures(args: DataArguments) -> list[Any]:
    """Where the arguments say that pictures without labels lie."""
    folder = args.unlabelled_dir and Path(args.unlabelled_dir)
    return [source for source in (folder, args.unlabelled_dataset) if source]


def with_pictures(train: Any, args: DataArguments) -> Any:
    """A training split as the arguments want it: without its labels, and with pictures that have none.

    Raises:
        UserError: it is a stream, or not of label maps.
    """
    sources = named_pictures(args)
    if not sources and not args.label_free:
        return train
    if not isinstance(train, DenseDataset) or train.task != DenseDataset.task:
        kind = "a stream" if isinstance(train, DenseStream) else f"for {task_of(train).title}"
        raise UserError(
            f"{train.name} is {kind}; pictures without labels are for label maps that are read at random: leave unlabelled_dir, "
            "unlabelled_dataset, label_free and streaming out."
        )
    train = train.without_labels() if args.label_free else train
    for source in sources:
        pictures = load_pictures(source)
        logger.info("%s: %d pictures without labels", source, len(pictures))
        train = train.with_unlabelled(pictures)
    return train


def name_classes(args: ModelArguments, data: DenseDatasets) -> DenseDatasets:
    """Gives pictures without labels, which have no classes, those of the teacher; of several, of the first that has some.

    Raises:
        UserError: there is no teacher, it has no classes or too many, or the student is to be trained without it too.
    """
    train = data["train"]
    if getattr(train, "labelled", None) == 0 and args.with_baseline:
        raise UserError("with_baseline trains the student without its teacher, but there are no labels: leave it out.")
    if train.id2label:
        return data
    teachers = list(named_teachers(args).values())
    if not teachers:
        raise UserError(
            f"{train.source} has no labels, so that there is nothing to learn from without a teacher: name one."
        )
    refusals = []
    for own in teachers:
        try:
            return DenseDatasets({"train": replace(train, id2label=classes_of(own))})
        except UserError as error:  # a teacher of features
            refusals.append(error)
    raise refusals[0]


def classes_of(args: ModelArguments) -> dict[int, str]:
    """The classes of a single teacher.

    Raises:
        UserError: it has none, or too many.
    """
    if args.teacher_store is not None:
        return dict(enumerate(Store.open(str(args.teacher_store)).content["classes"]))
    spec = ModelSpec.parse(args.teacher or "", "teacher")
    names = class_names_of(spec, trust_remote_code=args.trust_remote_code)
    if len(names) > MAX_LABELS:
        raise UserError(f"the teacher has {len(names)} classes; a label map holds at most {MAX_LABELS}.")
    return names


def build_student(args: ModelArguments, config: BCDConfig, data: DenseDatasets) -> DenseAdapter:
    """Builds the untrained student for the data set's classes; the same seed gives the same weights.

    Raises:
        UserError: if the arguments name no student, or it cannot take images as they are in training or evaluation, or has
            no activation checkpointing.
    """
    if args.student is None:
        raise UserError("no student: give --student (Hub id, folder, or {backbone: ..., head: ...}).")
    set_seed(config.seed)
    spec = ModelSpec.parse(args.student, "student")
    model = build_model(spec, data["train"].id2label, trust_remote_code=args.trust_remote_code)
    student = adapt(model, task_of(data["train"]).name)
    check_checkpointing(student.model, config)
    check_sizes(student, config, data)
    return student


@contextmanager
def alone_in(folder: str | Path, config: BCDConfig, *, wait: bool = False) -> Iterator[None]:
    """Keeps other runs out of a folder, whose files would mix; the ranks of this one enter together.

    The system itself holds the lock, so that of a process that died is free.

    Args:
        folder: created where missing.
        config: tells which process is the first one.
        wait: for the end of the other run, instead of refusing.

    Raises:
        UserError: another process is in the folder; names it and its machine.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: the output folder cannot be created ({error.strerror}).") from error
    with ExitStack() as stack:
        if config.process_index == 0:
            owner = folder / "_lock_owner"
            try:
                stack.enter_context(WeakFileLock(folder / "_lock", timeout=1))
            except TimeoutError:
                who = owner.read_text(encoding="utf-8") if owner.is_file() else "another process"
                if not wait:
                    raise UserError(
                        f"{folder} is in use by {who}; wait for it, or choose another --output_dir."
                    ) from None
                logger.warning("%s is in use by %s; waiting for it", folder, who)
                stack.enter_context(WeakFileLock(folder / "_lock"))
            write_text(owner, f"process {os.getpid()} on {platform.node()}")
        PartialState().wait_for_everyone()
        yield


def check_sizes(model: DenseAdapter, config: BCDConfig, data: DenseDatasets) -> None:
    """Checks data and options, and runs a model on black images of the sizes that it will be shown, see `check_size`."""
    task = task_of(data["train"])
    check_task(model, task)
    task.check_args(config)
    own_sampler(data["train"], config)  # for what it refuses
    for size in task.train_sizes(config):
        model.check_size(size)
    if (split := final_split(data)) is not None:
        transform = task.eval_transform(image_processor(model, **task.processor_size(config)))
        height, width = transform(data[split][0])["pixel_values"].shape[-2:]
        model.check_size((height, width))


def train_model(
    model: PreTrainedModel | DenseAdapter,
    teacher: PreTrainedModel | DenseAdapter | Store | Mapping[str, DenseAdapter | Store] | None,
    config: BCDConfig,
    data: DenseDatasets,
    role: str = "student",
    label_synonyms: str | None = None,
) -> BCDTrainer:
    """Trains a model from the checkpoint that `checkpoint_of` names, if any, and saves it in the output folder."""
    checkpoint = checkpoint_of(config, role)
    train: Any = data["train"]
    trainer = BCDTrainer(
        model=model,
        teacher_model=teacher,
        args=config,
        # without a teacher, pictures without labels would only take time
        train_dataset=train.only_labelled() if teacher is None and isinstance(train, DenseDataset) else train,
        eval_dataset=data.get("validation"),
        label_synonyms=label_synonyms,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(config.output_dir, _internal_call=True)  # pushed later, with what the card reports
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()  # the first rank writes what all ranks may read next
    return trainer


def checkpoint_of(config: BCDConfig, role: str) -> str | None:
    """The checkpoint a model continues from: the last of its own folder, or for the student a named one.

    A name is a folder or, where there is none, a Hub id `user/name[@revision]`, whose last checkpoint is downloaded.

    Raises:
        UserError: if there is no such folder, the output folder holds checkpoints of an earlier run that this one would not
            continue, but mix with, or (`HubError`) the repository cannot be read or holds no checkpoint.
    """
    given, folder = config.resume_from_checkpoint, Path(config.output_dir or ".")
    last = last_checkpoint(folder)
    if given in (None, False, "False", "false"):
        if last is not None:
            raise UserError(
                f"{last} is left of an earlier run. Continue that with --resume_from_checkpoint true, choose another "
                "--output_dir, or remove it."
            )
        return None
    if given in (True, "True", "true") or role != "student":
        return last
    if os.path.isdir(given):
        return str(given)
    # `runs/checkpoint-20` looks like a Hub id, but is a checkpoint that save_total_limit removed, or that never was
    if not re.fullmatch(r"[\w.-]+/(?!checkpoint-\d+$)[\w.-]+(@\S+)?", given):
        raise UserError(
            f"resume_from_checkpoint is {given!r}, which is no folder here and no Hub id; name a checkpoint's folder, or true "
            "for the last one of --output_dir."
        )
    logger.info("%s is no folder here; looking for its checkpoint on the Hub", given)
    with config.main_process_first(desc="fetching the checkpoint"):
        return fetch_checkpoint(given, folder, token=config.hub_token)


def final_split(data: DenseDatasets) -> str | None:
    """The split that final numbers come from: `test` where it is labelled, else `validation`."""
    return next((name for name in ("test", "validation") if name in data), None)


def evaluate_model(
    model: PreTrainedModel | DenseAdapter,
    config: BCDConfig,
    data: DenseDataset,
    label_synonyms: str | Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Scores of a model on a split, in the split's classes.

    Raises:
        UserError: if the model is for another task, or lacks some of these classes, and has not as many without names in
            common.
    """
    adapter = adapt(model, task_of(data).name)
    fit_classes(adapter, data, label_synonyms)
    scores = evaluate(adapter.to(config.device), data, config)
    return {name: value for name, value in scores.items() if name != "num_samples"}


def fit_classes(
    adapter: DenseAdapter, data: DenseDataset, label_synonyms: str | Mapping[str, Sequence[str]] | None = None
) -> None:
    """Has a model predict in a split's classes.

    Raises:
        UserError: as `evaluate_model`.
    """
    check_task(adapter, task_of(data))
    if (label_map := adapter.match(data.id2label, read_synonyms(label_synonyms))).missing:
        if len(label_map.teacher) != len(label_map.student):
            raise UserError(
                f"the model's {len(label_map.teacher)} classes are not the {len(label_map.student)} of {data.name}: it has none "
                f"for {shortened(', '.join(label_map.missing))}. Score it on data of its own classes, or say in a "
                "--label_synonyms file which of its classes stand for these."
            )
        adopt_labels(adapter.model, data.id2label)

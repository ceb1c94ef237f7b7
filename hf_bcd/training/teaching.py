"""Student, teacher and criterion of a run: class names are matched, losses are built."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, set_seed

from ..adapters import DenseAdapter, FrozenTeacher, LabelMap, adapt, match_labels, read_synonyms
from ..losses import DistillationCriterion, build_criterion
from ..losses.criterion import join_teachers, teacher_of
from ..losses.recipe import OFFERED_BY_ALL, check_needs, others_that_serve
from ..stores import StoredTeacher
from ..tasks import TASKS, Task, task_of
from ..utils.messages import UserError
from ..utils.text import shortened
from .config import BCDConfig
from .evaluation import moved
from .loaders import spread_samples, with_masks
from .teachers import Teacher, Teachers, answered, check_names, naming, parts_of


logger = logging.getLogger(__name__)

# fixed, so that the teacher's head depends neither on the training batch nor on the number of ranks
CALIBRATION_BATCH = 8
BY_CLASS = frozenset({"logits", "classes"})  # of what losses may need, what is compared class by class
Synonyms = str | Path | Mapping[str, Sequence[str]] | None
Given = PreTrainedModel | DenseAdapter | StoredTeacher


class Prepared(NamedTuple):
    """The parts of a trainer; without a teacher the student is trained by itself."""

    student: DenseAdapter
    teacher: Teacher | Teachers | None
    criterion: DistillationCriterion


def prepare(
    model: PreTrainedModel | DenseAdapter,
    teacher: Given | Mapping[str, Given] | None,
    args: BCDConfig,
    dataset: Any,
    synonyms: Synonyms = None,
    *,
    to_train: bool = True,
) -> Prepared:
    """Adapts both models, gives the student the data set's class names and builds the losses between the two.

    Args:
        model: the student.
        teacher: one, or several by name; None trains the student without one.
        args: losses, seed and the teacher's precision.
        dataset: names the classes by `id2label`; None leaves the student's names.
        synonyms: the teacher's names for these, see `read_synonyms`.
        to_train: whether the student is trained; otherwise it is scored in the data set's classes, if it has them.

    Raises:
        UserError: if the model's classes are not the data set's, or a loss needs what the teacher lacks.
    """
    synonyms, id2label = read_synonyms(synonyms), getattr(dataset, "id2label", None)
    task = task_of(dataset)
    student = adapt(model, task.name)
    if not student.predicts:
        raise UserError(
            f"{type(student.model).__name__} has no head, so it predicts nothing: it can only be a teacher, of features."
        )
    if not to_train and teacher is None and id2label is not None:
        student.match(id2label, synonyms)
    if student.label_map is None:
        adopt_labels(student.model, id2label)
    if to_train:
        student.freeze_unused()
    check_task(student, task)
    if to_train:
        check_checkpointing(student.model, args)
        if args.class_weights is not None and not student.weighs_classes:
            raise UserError(
                f"class_weights: {type(student.model).__name__} has a loss of its own, which weighs no classes; leave it out."
            )
        if args.quantize and student.exported != ("logits",):
            raise UserError(
                f"quantize: int8 files hold label maps only, and {type(student.model).__name__} is for {task.title}; leave it out."
            )
    sizes = []
    if to_train and hasattr(dataset, "with_transform"):  # which brings it to these sizes
        task.check_args(args)
        sizes = task.train_sizes(args)
    for size in sizes:
        student.check_size(size)
    set_seed(args.seed)  # connectors start the same whatever ran before in this process
    if teacher is None:
        return Prepared(student, None, DistillationCriterion({}, {}, []))
    several = isinstance(teacher, Mapping)
    given: Mapping[str, Given] = teacher if several else {"": teacher}
    if several:
        check_names(given)
        if not given:
            raise UserError("the teachers are an empty mapping; name some, or give None to train without any.")
    args.check_teachers(list(given))
    if args.inherit and len(given) > 1:
        raise UserError(f"inherit takes weights from the teacher, but there are {', '.join(given)}; leave it out.")
    parts, criteria = dict[str, Teacher](), dict[str, DistillationCriterion]()
    for name, one in given.items():
        own = args.for_teacher(name)
        with naming(name):
            part = parts[name] = _frozen(one, student, own, task, sizes, synonyms)
            check_losses(part.adapter, part.label_map, own)
            if to_train:
                inherit(student, part.adapter, args.inherit or ())
            criteria[name] = build_losses(student, part.adapter, own, lacking(part))
            if not criteria[name].losses and not args.inherit:
                raise UserError(
                    "losses is empty, so the teacher would teach nothing. Name some, or leave the teacher out."
                )
            if left_out := sorted(own.loss_options.keys() - criteria[name].losses.keys()):
                logger.info("the losses are without %s, which teacher and student cannot serve", ", ".join(left_out))
            if isinstance(part, StoredTeacher):
                part.check(criteria[name])
    criterion = join_teachers(criteria) if several else criteria[""]
    criterion.log_gradients = args.log_gradients
    return Prepared(student, Teachers(parts) if several else parts[""], criterion)


def _frozen(
    teacher: Given, student: DenseAdapter, args: BCDConfig, task: Task, sizes: Sequence[tuple[int, int]], synonyms: Any
) -> Teacher:
    """A teacher that gives constants; what was stored of one does already."""
    if isinstance(teacher, StoredTeacher):
        if args.inherit:
            raise UserError(
                "inherit takes weights from the teacher, which a stored one lacks; name the teacher itself."
            )
        return teacher
    adapter = adapt(teacher, task.name)
    if {id(weight) for weight in adapter.parameters()} & {id(weight) for weight in student.parameters()}:
        raise UserError(
            "student and teacher share weights, which would be frozen as the teacher's, so that nothing would be trained: load the "
            "teacher anew, or give a copy.deepcopy of it."
        )
    check_task(adapter, task)
    for size in sizes:
        adapter.check_shape(size)
    return freeze(adapter, student.id2label, args, synonyms)


def build_losses(
    student: DenseAdapter, teacher: DenseAdapter, args: BCDConfig, lacks: frozenset[str] = frozenset()
) -> DistillationCriterion:
    """The losses between two models; a `UserError` says which option or level is wrong.

    Args:
        student: adapted student.
        teacher: adapted teacher.
        args: the losses.
        lacks: see `lacking`.
    """
    offers = offers_of(teacher, args, student) - lacks
    return build_criterion(
        args.loss_options,
        student.feature_specs,
        teacher.feature_specs,
        num_labels=student.num_labels,
        seed=args.seed,
        offers=offers,
        head_levels=teacher.head_levels,
        pyramids=(student.pyramid_specs, teacher.pyramid_specs),
    )


def inherit(student: DenseAdapter, teacher: DenseAdapter, modules: Sequence[str]) -> None:
    """Starts modules of the student with the weights that the teacher's modules of the same name have.

    Raises:
        UserError: one of the models lacks such a module, shapes differ, or the teacher has other classes.
    """
    for name in modules:
        parts = [dict(model.model.named_modules()).get(name) for model in (student, teacher)]
        ours, theirs = (None if part is None else part.state_dict() for part in parts)
        if not ours or not theirs:
            lacking = student if not ours else teacher
            raise UserError(
                f"inherit: {type(lacking.model).__name__} has no weights {name!r}; name modules of both models."
            )
        shapes = {key: (list(ours[key].shape) if key in ours else None) for key in {**ours, **theirs}}
        for key, shape in shapes.items():
            other = list(theirs[key].shape) if key in theirs else None
            if shape != other:
                raise UserError(
                    f"inherit: {name}.{key} is {shape} in the student and {other} in the teacher. Name smaller modules, whose "
                    "shapes agree, such as neck.fpn_convs."
                )
        if teacher.label_map is not None and not teacher.label_map.is_identity:
            raise UserError(
                f"inherit: the teacher's {name} may score its own classes, which are not the student's in their order; leave "
                "inherit out."
            )
        cast(nn.Module, parts[0]).load_state_dict(theirs)


def check_task(model: DenseAdapter, task: Task) -> None:
    """Refuses a model whose predictions are not of the task's kind."""
    if model.task != task.name:
        raise UserError(
            f"{type(model.model).__name__} is for {TASKS[model.task].title}, but the data are for {task.title}; choose a model "
            f"or data of the other kind, or say `--task {model.task}` where the data serve both."
        )


def check_checkpointing(model: PreTrainedModel, args: BCDConfig) -> None:
    """Refuses activation checkpointing of a model that has none; a `UserError` names it."""
    if args.activation_checkpointing:
        try:
            model.activation_checkpointing_enable()
        except ValueError as error:
            raise UserError(
                f"activation_checkpointing cannot be had: {shortened(error)} Leave it out, and lower per_device_train_batch_size "
                "if memory is short."
            ) from error
        model.activation_checkpointing_disable()


def adopt_labels(model: PreTrainedModel, id2label: Mapping[int, str] | None) -> None:
    """Gives a model with placeholder class names the names of the data set.

    Raises:
        UserError: if the model has another number of classes, or the same names in another order.
    """
    if id2label is None:
        return
    if model.config.num_labels != len(id2label):
        raise UserError(
            f"the model predicts {model.config.num_labels} classes, but the data set has {len(id2label)} "
            f"({', '.join(list(id2label.values())[:5])}, ...). Load the model with num_labels={len(id2label)}, "
            "ignore_mismatched_sizes=True."
        )
    names = {int(index): str(name) for index, name in (model.config.id2label or {}).items()}
    if all(name == f"LABEL_{index}" for index, name in names.items()):
        model.config.id2label = dict(id2label)
        model.config.label2id = {name: index for index, name in id2label.items()}
        return
    label_map = match_labels(names, id2label)
    if not label_map.is_complete:
        logger.warning(
            "the model names its classes %s, the data set %s; class i of the one is taken for class i of the other. "
            "Set id2label when loading the model.",
            list(names.values()),
            list(id2label.values()),
        )
    elif not label_map.is_identity:
        raise UserError(
            f"the model has the data set's classes in another order ({names} against {dict(id2label)}); set "
            "id2label when loading the model, or reorder the data set's."
        )


def freeze(
    teacher: DenseAdapter, id2label: Mapping[int, str], args: BCDConfig, synonyms: Mapping[str, Sequence[str]] | None
) -> FrozenTeacher:
    """A teacher in the precision that the arguments ask for, on their device."""
    dtypes: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}
    automatic = torch.bfloat16 if args.device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    dtype = dtypes.get(args.teacher_dtype, automatic)
    return FrozenTeacher(teacher, dict(id2label), dtype=dtype, label_synonyms=synonyms).to(args.device)


def calibrate(
    criterion: DistillationCriterion,
    teacher: Teacher | Teachers,
    dataset: Any,
    task: Task,
    args: BCDConfig,
    num_labels: int,
    collate: Callable[..., Any] | None = None,
) -> None:
    """Fits what losses fit to the teacher's outputs on training images: the same ones on every rank, so that all agree.

    Args:
        criterion: the losses, on the device of the arguments.
        teacher: there too.
        dataset: transformed training samples.
        task: theirs.
        args: how many images.
        num_labels: number of the student's classes.
        collate: makes batches; the task's own by default.
    """
    batches, quiet = [], args.disable_tqdm
    needed = {teacher_of(name) for name, loss in criterion.by_name().items() if loss.needs_calibration}
    samples = spread_samples(with_masks(dataset), args.calibration_images)
    for start in tqdm(range(0, len(samples), CALIBRATION_BATCH), desc="Teacher on calibration images", disable=quiet):
        batch = moved((collate or task.collate)(samples[start : start + CALIBRATION_BATCH]), args)
        targets = task.targets(batch, num_labels)
        batches.append((answered(teacher, batch, targets.pixel_mask, needed), targets))
    criterion.calibrate(batches, lambda steps: tqdm(steps, desc="Calibrate", disable=quiet))


def offers_of(teacher: DenseAdapter, args: BCDConfig, student: DenseAdapter | None = None) -> frozenset[str]:
    """All that losses may need and this teacher and student (by default any) have.

    A compiled student hides the graph of its task loss.
    """
    offers = teacher.offers if student is None else student.offers_with(teacher)
    return (OFFERED_BY_ALL | offers) - ({"task_loss"} if args.torch_compile else set())


def lacking(teacher: Teacher) -> frozenset[str]:
    """What losses may need and a teacher lacks for these data: scores where it misses a class, or no store keeps them."""
    complete = teacher.label_map is None or teacher.label_map.is_complete
    stored = not isinstance(teacher, StoredTeacher) or "logits" in teacher.store.columns
    return (frozenset() if complete else BY_CLASS) | (frozenset() if stored else {"logits"})


def check_label_free(dataset: Any, teacher: Teacher | Teachers | None, student: DenseAdapter, args: BCDConfig) -> None:
    """Refuses what a training set without any labels cannot serve.

    Raises:
        UserError: there is no teacher to learn from, a loss reads labels, or weights are to be measured against the task.
    """
    if getattr(dataset, "labelled", None) != 0:
        return
    if teacher is None:
        raise UserError(
            f"{dataset.name} has no labels, so that there is nothing to learn from without a teacher: name one."
        )
    for name, part in parts_of(teacher).items():
        own = args.for_teacher(name)
        with naming(name):
            check_needs(own.loss_options, offers_of(part.adapter, own, student) - {"labels", "task_loss"})
    if measured := [name for name, loss in args.loss_options.items() if loss.measured]:
        raise UserError(
            f"weight of {', '.join(measured)} is auto, a share of the task's gradient, but without labels there is none; give a "
            "number."
        )


def check_losses(teacher: DenseAdapter, label_map: LabelMap | None, args: BCDConfig) -> None:
    """Refuses losses that this teacher cannot serve; needs no student, so that it can run before any training.

    Args:
        teacher: adapted teacher.
        label_map: from the teacher's classes to the student's; None of a teacher without classes. Losses that need `logits`
            compare them class by class.
        args: the losses.

    Raises:
        UserError: if one of them cannot be computed; names the losses that can.
    """
    check_needs(args.loss_options, offers_of(teacher, args))
    concerned = [name for name, loss in args.loss_options.items() if BY_CLASS & loss.needs and not loss.optional]
    if concerned and label_map is not None and not label_map.is_complete:
        others = others_that_serve(offers_of(teacher, args) - BY_CLASS)
        raise UserError(
            f"the teacher has no class for {', '.join(label_map.missing)}, but the losses {', '.join(concerned)} compare "
            "class scores. Say in a --label_synonyms file which of the teacher's classes stand for these, or distil "
            f"features only: {', '.join(others)}."
        )

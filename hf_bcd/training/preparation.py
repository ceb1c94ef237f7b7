"""What the trainer sets up before its first step: labels, teacher, transforms and the machine's cores."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from transformers import PreTrainedModel

from ..adapters import DenseAdapter, FrozenTeacher, LabelMap, build_adapter, image_statistics, match_labels
from ..data import DenseDataset, DenseStream, EvalTransform, TrainTransform
from ..losses.recipe import ALWAYS_OFFERED, LOSSES, read_losses
from ..models.heads import PooledBatchNorm2d
from .config import BCDConfig


logger = logging.getLogger(__name__)


def share_cores(args: BCDConfig) -> None:
    """Divides the machine's cores among its processes: more threads and workers than cores slow all of them down."""
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = max(1, (os.cpu_count() or 1) // local_processes)
    torch.set_num_threads(min(torch.get_num_threads(), cores))
    args.dataloader_num_workers = min(args.dataloader_num_workers, cores)
    args.dataloader_persistent_workers = args.dataloader_persistent_workers and args.dataloader_num_workers > 0
    args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type != "cpu"


def accept_single_values(model: nn.Module) -> None:
    """Lets heads with globally pooled branches train on the single image that an epoch's last batch may have."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = PooledBatchNorm2d


def adopt_labels(model: PreTrainedModel, dataset: Any) -> None:
    """Gives a model with placeholder class names the data set's names.

    Raises:
        ValueError: if the model has another number of classes, or the same names in another order.
    """
    id2label = getattr(dataset, "id2label", None)
    if id2label is None:
        return
    if model.config.num_labels != len(id2label):
        raise ValueError(
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
        raise ValueError(
            f"the model has the data set's classes in another order ({names} against {dict(id2label)}); set "
            "id2label when loading the model, or reorder the data set's."
        )


def adapt_to_score(
    model: PreTrainedModel, id2label: Mapping[int, str], synonyms: Mapping[str, Sequence[str]] | None = None
) -> DenseAdapter:
    """Adapts a model that is not trained: with logits in a data set's classes if it has all of them, else in its own.

    Args:
        model: the model; a teacher may have more classes than the data set, or another order.
        id2label: the data set's classes.
        synonyms: the model's names for these, see `match_labels`.
    """
    adapter = build_adapter(model, *image_statistics(model))
    label_map = match_labels(adapter.id2label, id2label, synonyms)
    if label_map.is_complete:
        adapter.label_map = label_map
    return adapter


def check_label_needs(label_map: LabelMap, losses: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Refuses losses that compare class scores where the teacher lacks classes of the student.

    Args:
        label_map: from the teacher's classes to the student's.
        losses: name -> options, as in a recipe. Losses that need `logits` compare them class by class.

    Raises:
        ValueError: if one of them cannot be computed.
    """
    concerned = [name for name, loss in read_losses(losses).items() if "logits" in loss.needs]
    if concerned and not label_map.is_complete:
        others = [name for name, loss in LOSSES.items() if "logits" not in loss.needs]
        raise ValueError(
            f"the teacher has no class for {', '.join(label_map.missing)}, but the losses {', '.join(concerned)} compare "
            "class scores. Say in a --label_synonyms file which of the teacher's classes stand for these, or distil "
            f"features alone: {', '.join(others)}."
        )


def offers_of(teacher: DenseAdapter, compiled: bool = False) -> frozenset[str]:
    """What losses may need of a teacher and any student, see `build_criterion`; `compiled` says whether that is."""
    offers = ALWAYS_OFFERED | {"head"} if teacher.head_levels else ALWAYS_OFFERED
    return offers - {"task_loss"} if compiled else offers


def build_frozen_teacher(
    model: PreTrainedModel,
    student_id2label: dict[int, str],
    args: BCDConfig,
    synonyms: Mapping[str, Sequence[str]] | None = None,
) -> FrozenTeacher:
    """Wraps a teacher in the precision that the arguments ask for."""
    dtypes: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}
    automatic = torch.bfloat16 if args.device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    return FrozenTeacher(
        build_adapter(model, *image_statistics(model)),
        student_id2label,
        dtype=dtypes.get(args.teacher_dtype, automatic),
        label_synonyms=synonyms,
    )


def lay_out(model: nn.Module) -> None:
    """Puts the weights of a convolutional model in channels-last order, in which convolutions compute, in place."""
    if is_convolutional(model):
        model.to(memory_format=torch.channels_last)


def is_convolutional(model: nn.Module) -> bool:
    """Whether most of a model's weights are those of convolutions, so that channels-last layout pays."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    kernels = [weight.numel() for weight in weights if weight.ndim == 4]
    return sum(kernels) > sum(weight.numel() for weight in weights) / 2


def train_transform(args: BCDConfig) -> TrainTransform:
    """The paper's augmentation as the arguments set it."""
    strength = args.color_jitter
    return TrainTransform(
        args.crop_size,
        image_size=args.image_size,
        scale=(args.scale_min, args.scale_max),
        jitter=(strength, strength, strength, 0.0) if strength else None,
    )


def with_transform(dataset: Any, transform: Callable, seed: int) -> Any:
    """Adds a transform to canonical samples; leaves datasets that already yield tensors alone.

    Raises:
        ValueError: for a table of `datasets`, which has no label rule yet.
    """
    if isinstance(dataset, dict):  # Trainer takes several evaluation sets by name
        return {name: with_transform(one, transform, seed) for name, one in dataset.items()}
    columns = getattr(dataset, "column_names", None) or ()
    if columns and "pixel_values" not in columns and getattr(dataset, "format", {}).get("type") != "custom":
        raise ValueError(
            f"a table with the columns {columns}, whose masks nobody has read; hf_bcd.load_dense_dataset(table) turns it "
            "into labelled images."
        )
    return dataset.with_transform(transform, seed=seed) if isinstance(dataset, DenseDataset | DenseStream) else dataset


def eval_transform(adapter: DenseAdapter, image_size: int | None) -> EvalTransform:
    """Shows a model its images as the image processor saved beside it will: aspect ratio kept, or the squares it needs."""
    size = adapter.processor_options(image_size).get("size", {})
    if "height" not in size:
        return EvalTransform(image_size)
    square = [size["height"], size["width"]]
    return EvalTransform(partial(F.resize, size=square, interpolation=InterpolationMode.BILINEAR, antialias=True))

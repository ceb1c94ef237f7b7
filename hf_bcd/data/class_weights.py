"""Weights of classes in the supervised loss of label maps, for rare ones."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..utils.messages import UserError, unknown_key_message
from ..utils.text import shortened
from .labels import UNLABELLED


logger = logging.getLogger(__name__)

COUNTED = 1000  # pictures, spread over the split


def balancing_weights(label_maps: Sequence[Tensor], num_labels: int) -> Tensor:
    """Weight of each class: the square root of the classes' median frequency over its own.

    A class's frequency is its share of the labelled pixels of the pictures that it stands in. Without the root these are the weights
    of Eigen & Fergus (ICCV 2015, Sec. 6.3.2), which cost pixel accuracy: docs/data.md has both, measured.

    Args:
        label_maps: class ids, integer `[H, W]`; ids that are no class are void.
        num_labels: number of classes K.

    Returns:
        `[K]`, float32, > 0; 1 for a class that no picture has.
    """
    pixels, around = torch.zeros(num_labels, dtype=torch.float64), torch.zeros(num_labels, dtype=torch.float64)
    for ids in label_maps:
        counts = torch.bincount(ids.long().flatten(), minlength=num_labels)[:num_labels]
        pixels += counts
        around += torch.where(counts > 0, counts.sum(), 0)
    frequencies = pixels / around.clamp_min(1)
    known = frequencies > 0
    if not known.any():
        return torch.ones(num_labels)
    return torch.where(known, (frequencies[known].quantile(0.5) / frequencies.clamp_min(1e-12)).sqrt(), 1.0).float()


def class_weights(given: str | Mapping[str, float] | None, train: Any, id2label: Mapping[int, str]) -> Tensor | None:
    """Weights `[K]` of the classes in training: `auto` counts the labels, a mapping names every class.

    Args:
        given: `auto`, `{class: weight}`, or None for none.
        train: training samples with `label`, or transformed ones with `labels`; of more than `COUNTED` pictures so many are counted, spread over it, or the first ones of a stream.
        id2label: the classes in their order.

    Raises:
        UserError: a class is unknown or missing, all weights are 0, or there are no labels.
    """
    if given is None:
        return None
    names = list(id2label.values())
    if not isinstance(given, str):
        if unknown := [name for name in given if name not in names]:
            raise UserError(unknown_key_message("class in class_weights", unknown[0], names))
        if missing := [name for name in names if name not in given]:
            raise UserError(
                f"class_weights says nothing of {shortened(', '.join(missing))}; give every class a weight."
            )
        if not any(given.values()):
            raise UserError("class_weights are all 0, so no label would teach; give some class a weight above 0.")
        if getattr(train, "labelled", None) == 0:
            raise UserError("the training pictures have no labels for class_weights to weigh; leave it out.")
        return torch.tensor([float(given[name]) for name in names])
    maps = [ids for ids in map(torch.as_tensor, _label_maps(train)) if int(ids.flatten()[0]) != UNLABELLED]
    if not maps:
        raise UserError(
            "the training pictures have no labels, so class_weights: auto has nothing to count; leave it out."
        )
    weights = balancing_weights(maps, len(names))
    shown = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(names, weights.tolist(), strict=True))
    logger.info("class weights, counted in %d pictures: %s", len(maps), shown)
    return weights


def _label_maps(train: Any) -> Iterator[Any]:
    if hasattr(train, "take"):  # a stream
        samples = iter(train.take(COUNTED))
    else:
        count = min(COUNTED, len(train))
        samples = (train[index * len(train) // count] for index in range(count))
    for sample in samples:
        yield sample["label"] if "label" in sample else sample["labels"]

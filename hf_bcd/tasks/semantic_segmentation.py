"""Semantic segmentation: a class for every pixel."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BaseImageProcessor

from ..data import EvalTransform, TrainTransform, check_one_size, collate
from ..figures.segmentation import comparison_figure, prediction_strip
from ..metrics import SemanticMetrics
from ..outputs import LabelMaps
from .base import Score, Task


class SemanticSegmentation(Task):
    """Label maps: samples have `labels` `[H, W]`, and an adapter's `predict` gives maps of the same size."""

    name = "semantic-segmentation"
    title = "semantic segmentation"
    pipeline_tag = "image-segmentation"
    scores = (
        Score("mean_iou", "mIoU", paired=True, plotted=True),
        Score("overall_accuracy", "pixel accuracy"),
        Score("mean_accuracy", "mean class accuracy", headline=False),
        Score("boundary_f@1", "boundary F@1", headline=False),
        Score("boundary_f@3", "boundary F@3", paired=True, plotted=True),
        Score("boundary_f@5", "boundary F@5", headline=False),
        Score("boundary_iou", "boundary IoU"),
        Score("completeness", "completeness", paired=True),
        Score("connectivity", "connectivity", paired=True, plotted=True),
        Score("fragments", "fragments", percent=False, higher_is_better=False),
        Score("missed", "missed regions", higher_is_better=False, headline=False),
    )
    per_class = "per_class_iou"
    metrics = ("mean_iou", "accuracy")

    def train_transform(self, args: Any) -> TrainTransform:
        """Random scale, crop, flip and colours."""
        scale = (args.scale_min, args.scale_max)
        return TrainTransform(args.crop_size, image_size=args.image_size, scale=scale, jitter=args.color_jitter)

    def eval_transform(self, processor: BaseImageProcessor) -> Callable[..., Mapping[str, Any]]:
        return EvalTransform(processor)

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return collate(samples)

    def targets(self, batch: Mapping[str, Any], num_labels: int) -> LabelMaps:
        check_one_size(batch)
        return LabelMaps(batch["labels"], num_labels)

    def denominator(self, targets: LabelMaps) -> Tensor:  # type: ignore[override]
        """Number of valid pixels."""
        return (targets.ids != targets.ignore_index).sum()

    def with_denominator(self, targets: LabelMaps, denominator: Tensor) -> LabelMaps:  # type: ignore[override]
        return replace(targets, num_valid=denominator)

    def metric(self, num_labels: int) -> SemanticMetrics:
        return SemanticMetrics(num_labels)

    def sizes(self, batch: Mapping[str, Any]) -> list[tuple[int, int]]:
        return [(labels.shape[-2], labels.shape[-1]) for labels in batch["labels"]]

    def score(self, metric: Any, predictions: Sequence[Tensor], batch: Mapping[str, Any]) -> None:
        labels = batch["labels"]
        if isinstance(labels, Tensor):  # of one size: counted together
            metric.update(torch.stack(list(predictions)), labels)
            return
        for prediction, label in zip(predictions, labels, strict=True):
            metric.update(prediction[None], label[None])

    def comparison(
        self, samples: Sequence[Mapping[str, Any]], id2label: Mapping[int, str], path: Path, errors: Sequence[str]
    ) -> None:
        comparison_figure(samples, id2label, path, errors=errors)

    def picture(self, sample: Mapping[str, Any], prediction: Tensor, num_labels: int) -> np.ndarray:
        return prediction_strip(sample["pixel_values"], sample["labels"], prediction.cpu(), num_labels)

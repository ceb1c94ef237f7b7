"""Semantic segmentation: a class for every pixel."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor

from ..data import EvalTransform, TrainTransform, check_one_size, check_sample, collate
from ..figures.predictions import label_overlay, palette_picture
from ..figures.segmentation import comparison_figure, prediction_strip
from ..losses.ops.segmentation import count_valid
from ..metrics import SemanticMetrics
from ..outputs import IGNORE_INDEX, LabelMaps, check_ids
from ..utils.messages import UserError
from .base import Score, Task


logger = logging.getLogger(__name__)

# asked for nothing, the pipeline would give panoptic segments of a universal model
CALL = """pipeline("image-segmentation", {{ model }})({{ picture }}{{ ', subtask="semantic"' if universal }})"""
PIPELINE = """\
from transformers import pipeline

segment = pipeline("image-segmentation", model={{ model }}{{ trust }})
for region in segment({{ picture }}{{ ', subtask="semantic"' if universal }}):  # a path, an address or a PIL image
    covered = region["mask"].histogram()[255] / (region["mask"].width * region["mask"].height)
    print(region["label"], f"{covered:.1%}")
"""
TENSORS = """\
{% if not universal %}
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

processor = AutoImageProcessor.from_pretrained({{ model }}{{ trust }})
model = AutoModelForSemanticSegmentation.from_pretrained({{ model }}{{ trust }}).eval()
image = Image.open({{ picture }}).convert("RGB")
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
(classes,) = processor.post_process_semantic_segmentation(outputs, [image.size[::-1]])
print(classes.shape, [model.config.id2label[index] for index in classes.unique().tolist()])
{% endif %}
"""


def pixels_said(counts: np.ndarray, id2label: Mapping[int, str]) -> dict[str, Any]:
    """What `Task.said` says of a label map of which `counts[c]` pixels have class c."""
    ids = np.flatnonzero(counts)
    parts = (counts[ids] / counts.sum()).tolist()
    return {
        "pixels": {id2label[index]: part for index, part in zip(ids.tolist(), parts, strict=True)},
        "classes": ids.tolist(),
    }


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
    per_class = Score("per_class_iou", "IoU")
    metrics = ("mean_iou", "accuracy")
    limit = "It always answers with one of its classes."
    answer = "one of {} classes for each pixel"
    caption = (
        "the input, its true labels, the prediction of each model, and the errors of the student. The mIoU above a panel "
        "is that of its picture."
    )
    protocol = {
        "inference": "The model sees the whole image at a single scale, without flips.",
        "logits": "Counts are summed over the split. Logits are up-sampled bilinearly to the size of the labels; the largest one decides.",
        "boundary_f@d": "Boundary F@d matches contours within d pixels (Euclidean).",
        "boundary_iou": "Boundary IoU compares bands of 2 % of the image diagonal.",
        "connectivity": "Completeness and connectivity look at 8-connected true regions of at least 64 pixels and at the pieces "
        "of correct pixels in them. Completeness is the largest piece over the region; connectivity is the largest piece over "
        "all of its pieces. Fragments counts the pieces of at least 1 % of the region. Missed regions have no correct pixel.",
    }
    call = CALL
    snippets = (PIPELINE, TENSORS)

    def check_args(self, args: Any) -> None:
        for name, meaning in (("square_size", "crop_size"), ("train_shortest", "scale_min and scale_max")):
            if getattr(args, name) is not None:
                raise UserError(f"{name} is for boxes; for label maps it is {meaning} that sizes the training images.")

    def train_sizes(self, args: Any) -> list[tuple[int, int]]:
        return [(args.crop_size, args.crop_size)]

    def augmentation(self, args: Any) -> str:
        resized = f"short side to {args.image_size}, then " if args.image_size else ""
        jitter = f", brightness, contrast and saturation jitter {args.color_jitter:g}" if args.color_jitter else ""
        scale = f"scale {args.scale_min:g} to {args.scale_max:g}, crop {args.crop_size} x {args.crop_size}"
        held = f" ({args.class_crops:.0%} of them around a class of the picture)" if args.class_crops else ""
        return f"{resized}{scale}{held}, horizontal flip{jitter}"

    def train_transform(self, args: Any) -> TrainTransform:
        """Random scale, crop, flip and colours."""
        scale = (args.scale_min, args.scale_max)
        options = {"image_size": args.image_size, "jitter": args.color_jitter, "class_crops": args.class_crops}
        return TrainTransform(args.crop_size, scale=scale, **options)

    def processor_size(self, args: Any) -> dict[str, Any]:
        return {"shortest_edge": args.image_size}

    def size_args(self, saved: Mapping[str, int], squares: bool) -> dict[str, int]:
        height, width = saved.get("height"), saved.get("width")
        if squares or height is None:
            side = height if squares and height == width else saved.get("shortest_edge")
            return {} if side is None else {"image_size": side}
        logger.warning(
            "the model's processor squashes images to %d x %d; they are scored at their original size here, or with a short "
            "side of --image_size",
            height,
            width,
        )
        return {}

    def eval_transform(self, processor: BaseImageProcessor) -> Callable[..., Mapping[str, Any]]:
        return EvalTransform(processor)

    def check_sample(self, sample: Any, num_labels: int, name: str, evaluated: bool) -> None:
        check_sample(sample, name)
        check_ids(sample["labels"], num_labels, IGNORE_INDEX, f"labels of {name}[0]")

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return collate(samples)

    def targets(self, batch: Mapping[str, Any], num_labels: int) -> LabelMaps:
        check_one_size(batch)
        return LabelMaps(batch["labels"], num_labels, seen=batch.get("seen"))

    def denominator(self, targets: LabelMaps) -> Tensor:  # type: ignore[override]
        """Number of valid pixels, each counted with the weight of its class."""
        return count_valid(targets.ids, targets.ignore_index, targets.class_weights)

    def with_denominator(self, targets: LabelMaps, denominator: Tensor) -> LabelMaps:  # type: ignore[override]
        return replace(targets, num_valid=denominator)

    def metric(self, num_labels: int) -> SemanticMetrics:
        return SemanticMetrics(num_labels)

    def sizes(self, batch: Mapping[str, Any]) -> list[tuple[int, int]]:
        return [(labels.shape[-2], labels.shape[-1]) for labels in batch["labels"]]

    def truths(self, batch: Mapping[str, Any]) -> list[Tensor]:
        return list(batch["labels"])

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
        def score(prediction: Tensor, label: np.ndarray) -> str:
            metric = self.metric(len(id2label))
            metric.update(prediction[None], torch.from_numpy(label)[None])
            return f"{self.scores[0].title} {metric.compute()[self.scores[0].key]:.2f}"

        scored = [
            {**sample, "scores": {name: score(p, sample["label"]) for name, p in sample["predictions"].items()}}
            for sample in samples
        ]
        comparison_figure(scored, id2label, path, errors=errors)

    def picture(self, sample: Mapping[str, Any], prediction: Tensor, num_labels: int) -> np.ndarray:
        return prediction_strip(sample["pixel_values"], sample["labels"], prediction.cpu(), num_labels)

    def mask(self, prediction: Any, num_labels: int) -> Image.Image:
        return palette_picture(np.asarray(prediction), num_labels)

    def overlay(
        self, image: Image.Image, prediction: Any, id2label: Mapping[int, str], least_score: float
    ) -> Image.Image:
        return label_overlay(image, np.asarray(prediction), len(id2label))

    def said(self, prediction: Any, id2label: Mapping[int, str], least_score: float) -> dict[str, Any]:
        return pixels_said(np.bincount(np.asarray(prediction).ravel()), id2label)

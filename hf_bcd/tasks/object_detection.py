"""Object detection: a box and a class for every object."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor

from ..data import BoxEvalTransform, BoxTrainTransform, collate_boxes
from ..data.detection import check_box_sample
from ..figures.detection import detection_figure, detection_strip
from ..figures.predictions import box_overlay
from ..metrics.detection import DetectionMetrics
from ..outputs import Objects
from ..utils.messages import UserError
from .base import Score, Task


CALL = """pipeline("object-detection", {{ model }}{{ trust }})({{ picture }})"""
PIPELINE = """\
from transformers import pipeline

detect = pipeline("object-detection", model={{ model }}{{ trust }})
for found in detect({{ picture }}, threshold=0.5):  # a path, an address or a PIL image
    print(found["label"], f"{found['score']:.2f}", *found["box"].values())  # xmin, ymin, xmax, ymax in pixels
"""
TENSORS = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection

processor = AutoImageProcessor.from_pretrained({{ model }}{{ trust }})
model = AutoModelForObjectDetection.from_pretrained({{ model }}{{ trust }}).eval()
image = Image.open({{ picture }}).convert("RGB")
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
(found,) = processor.post_process_object_detection(outputs, threshold=0.5, target_sizes=[image.size[::-1]])
print(len(found["boxes"]), "objects", sorted({model.config.id2label[index] for index in found["labels"].tolist()}))
"""
SHORTEST = 800  # pixels of the short side, where nothing else is said
# arguments that only label maps have, and their defaults
OF_LABEL_MAPS = {"crop_size": 512, "scale_min": 0.5, "scale_max": 2.0, "class_crops": 0.0, "class_weights": None}


class ObjectDetection(Task):
    """Boxes: samples have `boxes` and `classes`, and an adapter's `predict` gives `boxes`, `scores` and `labels`."""

    name = "object-detection"
    title = "object detection"
    pipeline_tag = "object-detection"
    scores = (
        Score("box_ap", "AP", paired=True, plotted=True),
        Score("box_ap50", "AP50", paired=True, plotted=True),
        Score("box_ap75", "AP75"),
        Score("box_ap_small", "AP small"),
        Score("box_ap_medium", "AP medium"),
        Score("box_ap_large", "AP large"),
        Score("box_ar", "AR", headline=False),
        Score("duplicates", "duplicates", percent=False, higher_is_better=False, paired=True),
        Score("hallucinations", "hallucinations", percent=False, higher_is_better=False, paired=True),
    )
    per_class = Score("per_class_ap", "AP")
    metrics = ("mean-average-precision",)
    limit = "Objects of other classes it leaves out, or takes for one of these."
    answer = "boxes of {} classes"
    caption = (
        "the input, its true objects, as many of each model's best boxes as all these pictures have objects, and the errors of "
        "the student: dashed is what it misses. Found is an object that a box of its class overlaps by at least a half."
    )
    protocol = {
        "inference": "The model sees the whole image at a single scale, without flips.",
        "ap": "AP is COCO's mean over IoU 0.50 to 0.95 of at most 100 detections an image, or "
        "max_detections of the model if that is more (faster-coco-eval); crowds are ignored.",
        "duplicates": "Duplicates are detections of a score of at least 0.5 that overlap a better one of their class by more "
        "than a half, hallucinations such that overlap no object by a tenth; both are numbers per image.",
    }
    call = CALL
    snippets = (PIPELINE, TENSORS)
    decay_per = "epoch"

    def check_args(self, args: Any) -> None:
        for name, usual in OF_LABEL_MAPS.items():
            if getattr(args, name) != usual:
                raise UserError(
                    f"{name} is for label maps; leave it out. Images for a detector are sized by image_size and image_longest, or "
                    "square_size."
                )
        short = _shortest(args)
        if args.square_size is None and args.image_longest < max(short):
            name = "train_shortest" if args.train_shortest else "image_size"
            usual = "" if args.train_shortest or args.image_size else ", as usual"
            raise UserError(
                f"image_longest is {args.image_longest}, less than {name}, which is {max(short)}{usual}. The long side is never "
                f"shorter: raise image_longest, or lower {name}."
            )
        if args.square_size is not None and (args.image_size is not None or args.train_shortest is not None):
            raise UserError("square_size and image_size or train_shortest size images in two ways; give one of them.")
        short = max(args.train_shortest or [args.image_size or SHORTEST])
        if args.square_size is None and short > args.image_longest:
            raise UserError(
                f"the short side of images is {short} pixels (image_size, {SHORTEST} by default, or train_shortest), more than "
                f"image_longest allows the long side, {args.image_longest}."
            )

    def train_sizes(self, args: Any) -> list[tuple[int, int]]:
        if args.square_size is not None:
            return [(args.square_size, args.square_size)]
        short = max(_shortest(args))
        return [(short, min(args.image_longest, 2 * short))]

    def augmentation(self, args: Any) -> str:
        if args.square_size is not None:
            sized = f"resized to {args.square_size} x {args.square_size}"
        else:
            sides = " or ".join(map(str, _shortest(args)))
            sized = f"short side {sides}, long side at most {args.image_longest}"
        jitter = f", brightness, contrast and saturation jitter {args.color_jitter:g}" if args.color_jitter else ""
        return f"{sized}, horizontal flip{jitter}"

    def train_transform(self, args: Any) -> Callable[..., Mapping[str, Any]]:
        sizes = {"longest": args.image_longest, "square": args.square_size}
        return BoxTrainTransform(_shortest(args), **sizes, jitter=args.color_jitter)

    def processor_size(self, args: Any) -> dict[str, Any]:
        return {
            "shortest_edge": args.image_size or SHORTEST,
            "longest_edge": args.image_longest,
            "square_size": args.square_size,
        }

    def sized(self, size: Mapping[str, int]) -> str:
        longest = f", long side at most {size['longest_edge']}" if "longest_edge" in size else ""
        return super().sized(size) + longest

    def size_args(self, saved: Mapping[str, int], squares: bool) -> dict[str, int]:
        height, width = saved.get("height"), saved.get("width")
        if height is None:
            names = {"shortest_edge": "image_size", "longest_edge": "image_longest"}
            return {name: saved[side] for side, name in names.items() if side in saved}
        if height == width:
            return {"square_size": height}
        raise UserError(
            f"the model's processor resizes pictures to {height} x {width}; give --square_size or --image_size to score it "
            "at another size."
        )

    def eval_transform(self, processor: BaseImageProcessor) -> Callable[..., Mapping[str, Any]]:
        return BoxEvalTransform(processor)

    def check_sample(self, sample: Any, num_labels: int, name: str, evaluated: bool) -> None:
        check_box_sample(sample, num_labels, name, evaluated)

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return collate_boxes(samples)

    def targets(self, batch: Mapping[str, Any], num_labels: int) -> Objects:
        # BCD's calibration has masks of pictures with boxes, where their files have any
        masks = {name: batch[name] for name in ("masks", "crowd_masks") if name in batch}
        pixel_values = batch["pixel_values"]
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        crowds = batch["crowd_boxes"] if any(map(len, batch["crowd_boxes"])) else ()
        return Objects(batch["boxes"], batch["classes"], size, num_labels, batch.get("pixel_mask"), crowds, **masks)

    def denominator(self, targets: Objects) -> Tensor:  # type: ignore[override]
        """Number of pictures: detectors count what they divide by themselves, in each batch."""
        return torch.tensor(len(targets.boxes))

    def with_denominator(self, targets: Objects, denominator: Tensor) -> Objects:  # type: ignore[override]
        return targets

    def metric(self, num_labels: int) -> DetectionMetrics:
        return DetectionMetrics(num_labels)

    def sizes(self, batch: Mapping[str, Any]) -> list[tuple[int, int]]:
        return [(int(height), int(width)) for height, width in batch["orig_size"]]

    def truths(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [
            {"boxes": boxes, "labels": classes, "iscrowd": crowd, "area": areas}
            for boxes, classes, crowd, areas in zip(
                *(batch[key] for key in ("boxes", "classes", "crowd", "areas")), strict=True
            )
        ]

    def score(self, metric: Any, predictions: Sequence[Mapping[str, Tensor]], batch: Mapping[str, Any]) -> None:
        metric.update(predictions, self.truths(batch))

    def comparison(
        self, samples: Sequence[Mapping[str, Any]], id2label: Mapping[int, str], path: Path, errors: Sequence[str]
    ) -> None:
        detection_figure(samples, id2label, path, errors)

    def picture(self, sample: Mapping[str, Any], prediction: Mapping[str, Tensor], num_labels: int) -> np.ndarray:
        height, width = (int(side) for side in sample["orig_size"])
        image = torch.nn.functional.interpolate(sample["pixel_values"][None].float(), (height, width), mode="bilinear")
        return detection_strip(image[0].round().to(torch.uint8), sample, prediction, num_labels)

    def overlay(
        self, image: Image.Image, prediction: Mapping[str, Any], id2label: Mapping[int, str], least_score: float
    ) -> Image.Image:
        return box_overlay(image, prediction, id2label, least_score)

    def said(self, prediction: Mapping[str, Any], id2label: Mapping[int, str], least_score: float) -> dict[str, Any]:
        columns = [prediction[key].tolist() for key in ("scores", "labels", "boxes")]
        kept = [one for one in zip(*columns, strict=True) if one[0] >= least_score]
        objects = [{"label": id2label[label], "score": score, "box": box} for score, label, box in kept]
        return {"objects": objects, "classes": sorted({label for _, label, _ in kept})}


def _shortest(args: Any) -> list[int]:
    """The short sides that training draws from."""
    return args.train_shortest or [args.image_size or SHORTEST]
